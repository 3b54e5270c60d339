// Kernels with one fault each, and some with none: what the shim must see, and must not.
// 128 threads; `out` has one number for each, `in` as many.
#include "ptx.cuh"

#define BROKEN(name) extern "C" __global__ void broken_##name(uint32_t* out, const uint32_t* in)

// ---- barriers

BROKEN(half_a_block_at_a_barrier) {
    if (threadIdx.x < 64) __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
}

BROKEN(two_barriers) {
    if (threadIdx.x < 64)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
}

BROKEN(half_a_warp_shuffles) {
    uint32_t x = in[threadIdx.x];
    if (threadIdx.x % 32 < 16) x = __shfl_xor_sync(~0u, x, 1);
    out[threadIdx.x] = x;
}

BROKEN(a_warp_parts) {
    uint32_t x = in[threadIdx.x];
    if (threadIdx.x % 32 < 16)
        x = __shfl_xor_sync(~0u, x, 1);
    else
        __syncwarp();
    out[threadIdx.x] = x;
}

BROKEN(a_lane_without_part) {
    uint32_t x = in[threadIdx.x];
    if (threadIdx.x % 32 < 16) x = __shfl_sync(0xffffu, x, 20);
    out[threadIdx.x] = x;
}

// ---- races

// Each thread's number by way of its neighbour: in another warp, and in the same.
template <bool BARRIER>
__device__ void by_a_neighbour(uint32_t* out, const uint32_t* in, int next) {
    __shared__ uint32_t numbers[128];
    numbers[threadIdx.x] = in[threadIdx.x];
    if (BARRIER) __syncthreads();
    out[threadIdx.x] = numbers[(threadIdx.x + next) % 128];
}
BROKEN(no_barrier_between_warps) { by_a_neighbour<false>(out, in, 32); }
BROKEN(no_barrier_in_a_warp) { by_a_neighbour<false>(out, in, 1); }
BROKEN(nothing) { by_a_neighbour<true>(out, in, 32); }

// Written again before all have read.
BROKEN(no_second_barrier) {
    __shared__ uint32_t number;
    uint32_t sum = 0;
    for (int i = 0; i < 4; ++i) {
        if (threadIdx.x == 0) number = in[i];
        __syncthreads();
        sum += number;
    }
    out[threadIdx.x] = sum;
}

// ---- memory

BROKEN(beyond_an_array) {
    __shared__ uint32_t numbers[64];
    numbers[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = numbers[threadIdx.x];
}

// By an address, which has no bound that a compiler knows.
namespace ott {
__device__ void beyond_an_address(uint32_t* out, const uint32_t* in) {
    __shared__ uint32_t numbers[64], others[64];
    uint32_t* volatile at = threadIdx.x == 0 ? numbers + 64 : others;
    *at = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = numbers[threadIdx.x % 64] + others[0];
}
}  // namespace ott
BROKEN(beyond_an_address) { ott::beyond_an_address(out, in); }

BROKEN(beyond_dynamic_memory) {
    extern __shared__ __align__(16) uint8_t shared[];
    reinterpret_cast<uint32_t*>(shared)[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = reinterpret_cast<uint32_t*>(shared)[threadIdx.x];
}

BROKEN(beyond_the_output) { out[threadIdx.x + 1] = in[threadIdx.x]; }

BROKEN(beyond_all_memory) {
    const uint32_t* volatile nowhere = nullptr;
    out[threadIdx.x] = nowhere[in[threadIdx.x]];
}

BROKEN(a_crooked_vector) {
    const uint4 four = *reinterpret_cast<const uint4*>(in + 1);
    out[threadIdx.x] = four.x;
}

BROKEN(nobody_wrote) {
    __shared__ uint32_t numbers[128];
    if (threadIdx.x < 127) numbers[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = numbers[threadIdx.x];
}

BROKEN(no_output) {
    if (threadIdx.x < 127) out[threadIdx.x] = in[threadIdx.x];
}

// ---- copies

// Four numbers of each thread of the first warp by way of shared memory.
template <class Wait>
__device__ void copied(uint32_t* out, const uint32_t* in, Wait wait) {
    extern __shared__ __align__(16) uint8_t shared[];
    uint32_t* mine = reinterpret_cast<uint32_t*>(shared) + 4 * threadIdx.x;
    if (threadIdx.x < 32) {
        ott::copy_16(mine, in + 4 * threadIdx.x);
        ott::commit_copies();
        wait();
        __syncwarp();
    }
    __syncthreads();
    out[threadIdx.x] = reinterpret_cast<uint32_t*>(shared)[threadIdx.x];
}
BROKEN(copies_waited_for) {
    copied(out, in, [] { ott::wait_copies<0>(); });
}
BROKEN(copies_not_waited_for) {
    copied(out, in, [] { ott::wait_copies<1>(); });
}
BROKEN(copies_waited_for_too_late) {
    copied(out, in, [] {});
    ott::wait_copies<0>();
}

template <bool INIT, bool EXPECT, bool COPY, bool WAIT>
__device__ void copied_by_the_engine(uint32_t* out, const uint32_t* in) {
    extern __shared__ __align__(16) uint8_t shared[];
    __shared__ uint64_t barrier;
    if (threadIdx.x == 0) {
        if (INIT) ott::barrier_init(&barrier);
        ott::barrier_fence();
        if (EXPECT) ott::barrier_expect(&barrier, 512);
        if (COPY) ott::copy_bulk(shared, in, 512, &barrier);
    }
    __syncthreads();
    if (WAIT) ott::barrier_wait(&barrier, 0);
    out[threadIdx.x] = reinterpret_cast<uint32_t*>(shared)[threadIdx.x];
    if (!WAIT) ott::barrier_wait(&barrier, 0);
}
BROKEN(bulk) { copied_by_the_engine<true, true, true, true>(out, in); }
BROKEN(bulk_without_a_barrier) { copied_by_the_engine<false, true, true, true>(out, in); }
BROKEN(bulk_that_nobody_expects) { copied_by_the_engine<true, false, true, true>(out, in); }
BROKEN(bulk_that_nobody_sends) { copied_by_the_engine<true, true, false, true>(out, in); }
BROKEN(bulk_waited_for_too_late) { copied_by_the_engine<true, true, true, false>(out, in); }
