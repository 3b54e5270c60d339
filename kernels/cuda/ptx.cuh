// Instructions that C++ has no name for, one function each: all of the kernels' PTX, and the only file that asks which
// architecture is compiled. What compiles the kernels for something else replaces this file.
#pragma once
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace ott {

// Whether the bulk copy engine brings bytes, or each thread its own 16.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool BULK_COPIES = true;
#else
constexpr bool BULK_COPIES = false;
#endif

// Whether a block may have more than 99 KB of shared memory.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
constexpr bool LARGE_SHARED = false;
#else
constexpr bool LARGE_SHARED = true;
#endif

// The signs of bytes A and B of x, 16 times each. `__byte_perm` does not look at the bit that asks for signs.
template <int A, int B>
__device__ inline uint32_t spread_signs(uint32_t x) {
    uint32_t out;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(out) : "r"(x), "n"(0x8888 | A * 0x11 | B * 0x1100));
    return out;
}

// c (16, 8) += a (16, 32) * b (32, 8): unsigned and signed bytes, integer sums.
__device__ inline void mma_bytes(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                 uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c (16, 8) += a (16, 16) * b (16, 8): numbers of type E, sums in f32.
template <class E>
__device__ void mma_numbers(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                            uint32_t b1);
template <>
__device__ inline void mma_numbers<__half>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                           uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma_numbers<__nv_bfloat16>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                  uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Add 1 and return what was there. What this thread saw written before is written for whoever adds after, on the whole
// device.
__device__ inline uint32_t count_in_order(uint32_t* counter) {
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// The largest of a warp's numbers, none below 0: then their bits are in the order of the numbers.
__device__ inline float warp_max_of_positive(float x) {
    return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x)));
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four matrices of 8 rows of 8 numbers of 16 bits, in shared memory: lane l says where row l % 8 of matrix l / 8 lies, 16
// bytes at a multiple of 16. Register i is two numbers of matrix i: row l / 4, from column 2 (l % 4) on.
__device__ inline void load_matrices(const void* row, uint32_t (&x)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same of transposed matrices: column l / 4, from row 2 (l % 4) on.
__device__ inline void load_transposed(const void* row, uint32_t (&x)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// 16 bytes by this thread: `to` in shared memory, both at multiples of 16.
__device__ inline void copy_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// This thread's copies since the last call are a group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last N groups of this thread have arrived.
template <int N>
__device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// sm_90. A barrier that one thread arrives at.
__device__ inline void barrier_init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// sm_90. The copy engine sees barriers that were made before.
__device__ inline void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// sm_90. The one arrival of a phase, by one thread: `len` bytes are to come.
__device__ inline void barrier_expect(uint64_t* barrier, uint32_t len) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(len)
                 : "memory");
}

// sm_90. `len` bytes by the copy engine, by one thread: all at multiples of 16.
__device__ inline void copy_bulk(void* to, const void* from, uint32_t len, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(from), "r"(len), "r"(shared_address(barrier))
        : "memory");
}

// sm_90. Until the barrier's phase of this parity is over.
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    const uint32_t b = shared_address(barrier);
    uint32_t done = 0;
    while (done == 0)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(b), "r"(parity)
                     : "memory");
}

}  // namespace ott
