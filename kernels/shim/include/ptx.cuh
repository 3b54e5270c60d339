// In the place of ../../cuda/ptx.cuh: the same functions, by what the PTX manual says of each instruction.
#pragma once
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace ott {

#if __CUDA_ARCH__ >= 900
constexpr bool BULK_COPIES = true;
#else
constexpr bool BULK_COPIES = false;
#endif

constexpr bool LARGE_SHARED = true;

template <int A, int B>
inline uint32_t spread_signs(uint32_t x) {
    return (x >> (8 * A) & 128 ? 0xffffu : 0) | (x >> (8 * B) & 128 ? 0xffff0000u : 0);
}

// One lane's part of a product: group g = lane / 4, place t = lane % 4.
template <class C>
struct Fragment {
    C* c;            // rows g, g, g + 8, g + 8; columns 2t, 2t + 1 twice
    uint32_t a[4];   // rows g, g + 8, g, g + 8; the quarter of a row t in the lower and in the upper half
    uint32_t b[2];   // column g; as a
};

// c += a * b with K numbers in a row of `a`; `number` takes one out of a register of `a` (left) or `b`.
template <class C, class Sum, int K, class Number>
inline void multiply(void* const* lanes, Number number) {
    // Numbers of a register.
    constexpr int EACH = K / 8;
    Sum a[16][K], b[8][K];
    for (int l = 0; l < 32; ++l) {
        const auto& of = *static_cast<const Fragment<C>*>(lanes[l]);
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < EACH; ++i) {
            for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][r / 2 * K / 2 + t * EACH + i] = number(of.a[r], i, true);
            for (int r = 0; r < 2; ++r) b[g][r * K / 2 + t * EACH + i] = number(of.b[r], i, false);
        }
    }
    for (int l = 0; l < 32; ++l) {
        const auto& of = *static_cast<const Fragment<C>*>(lanes[l]);
        for (int r = 0; r < 4; ++r) {
            const Sum *x = a[l / 4 + r / 2 * 8], *y = b[l % 4 * 2 + r % 2];
            Sum sum = 0;
            for (int k = 0; k < K; ++k) sum += x[k] * y[k];
            of.c[r] = static_cast<C>(of.c[r] + sum);
        }
    }
}

inline void mma_bytes(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                      SHIM_AT) {
    Fragment<int> mine{c, {a0, a1, a2, a3}, {b0, b1}};
    shim::meet({"mma_bytes", file, line}, ~0u, &mine, [](void* const* lanes, uint32_t) {
        multiply<int, int, 32>(lanes, [](uint32_t word, int i, bool left) {
            const uint8_t byte = word >> (8 * i) & 255;
            return left ? static_cast<int>(byte) : static_cast<int>(static_cast<int8_t>(byte));
        });
    });
}

inline float number_of(__half, uint16_t bits) { return __half2float({bits}); }
inline float number_of(__nv_bfloat16, uint16_t bits) { return __bfloat162float({bits}); }

// Sums in binary64: a device's are in binary32 or a little less.
template <class E>
inline void mma_numbers(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                        SHIM_AT) {
    Fragment<float> mine{c, {a0, a1, a2, a3}, {b0, b1}};
    shim::meet({"mma_numbers", file, line}, ~0u, &mine, [](void* const* lanes, uint32_t) {
        multiply<float, double, 16>(lanes, [](uint32_t word, int i, bool) {
            return static_cast<double>(number_of(E(), static_cast<uint16_t>(word >> (16 * i))));
        });
    });
}

// One lane's part of four matrices: the row that it names, and what it gets.
struct Matrices {
    const uint16_t* row;
    uint32_t* x;
};

template <bool TRANSPOSED>
inline void load_of(const shim::Site& site, const void* row, uint32_t (&x)[4]) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) shim::fail("%s:%d: a row of a matrix is not at a multiple of 16", site.file, site.line);
    Matrices mine{static_cast<const uint16_t*>(row), x};
    shim::meet(site, ~0u, &mine, [](void* const* lanes, uint32_t) {
        for (int l = 0; l < 32; ++l)
            for (int m = 0; m < 4; ++m) {
                uint32_t two = 0;
                for (int k = 0; k < 2; ++k) {
                    const int r = TRANSPOSED ? 2 * (l % 4) + k : l / 4, c = TRANSPOSED ? l / 4 : 2 * (l % 4) + k;
                    two |= static_cast<uint32_t>(static_cast<const Matrices*>(lanes[8 * m + r])->row[c]) << (16 * k);
                }
                static_cast<const Matrices*>(lanes[l])->x[m] = two;
            }
    });
}

inline void load_matrices(const void* row, uint32_t (&x)[4], SHIM_AT) {
    load_of<false>({"load_matrices", file, line}, row, x);
}
inline void load_transposed(const void* row, uint32_t (&x)[4], SHIM_AT) {
    load_of<true>({"load_transposed", file, line}, row, x);
}

inline float warp_max_of_positive(float x, SHIM_AT) {
    return __uint_as_float(shim::reduce({"warp_max_of_positive", file, line}, ~0u, __float_as_uint(x), shim::Largest()));
}

inline uint32_t count_in_order(uint32_t* counter) { return __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL); }

inline void copy_16(void* to, const void* from, SHIM_AT) { shim::copy(to, from, {"copy_16", file, line}); }
inline void commit_copies() { shim::commit(); }
template <int N>
inline void wait_copies() {
    shim::wait(N);
}

inline void barrier_init(uint64_t* barrier, SHIM_AT) { shim::barrier_init(barrier, {"barrier_init", file, line}); }
inline void barrier_fence() {}
inline void barrier_expect(uint64_t* barrier, uint32_t len, SHIM_AT) {
    shim::barrier_expect(barrier, len, {"barrier_expect", file, line});
}
inline void copy_bulk(void* to, const void* from, uint32_t len, uint64_t* barrier, SHIM_AT) {
    shim::copy_bulk(to, from, len, barrier, {"copy_bulk", file, line});
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity, SHIM_AT) {
    shim::barrier_wait(barrier, parity, {"barrier_wait", file, line});
}

}  // namespace ott
