// The CUDA C++ that kernels are written in, for a host compiler: what nvcc knows without an include. Only what the
// kernels use is here, so that what is new does not compile until somebody says what it means.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "shim.h"

// By these words kernels are found (tests/shim/compile.rs). Inline: compiled only where they are launched from.
#define __global__ inline __attribute__((unused))
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One block runs at a time, so that its memory is the library's: all of `.bss`, filled with garbage before each block.
#define __shared__ static

using std::isfinite;
using std::isinf;
using std::isnan;

struct Dim3 {
    uint32_t x, y, z;
};
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From>
inline To shim_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &x, sizeof(To));
    return to;
}

// ---- numbers

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline uint32_t __float_as_uint(float x) { return shim_bits<uint32_t>(x); }
inline int __float_as_int(float x) { return shim_bits<int>(x); }
inline float __uint_as_float(uint32_t x) { return shim_bits<float>(x); }
inline float __int_as_float(int x) { return shim_bits<float>(x); }
// Compiled without contraction: each is one rounding.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
// Approximate on a device, within what attention may be off by.
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline uint32_t __float2uint_rn(float x) { return static_cast<uint32_t>(rintf(x)); }

// ---- bits

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t pick) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
        // As on a device, the fourth bit of a choice does nothing: signs are `spread_signs` of ptx.cuh.
        const uint32_t byte = bytes >> (8 * (pick >> (4 * i) & 7)) & 255;
        out |= byte << (8 * i);
    }
    return out;
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
    return c;
}
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 4; ++i) c += (a >> (8 * i) & 255) * (b >> (8 * i) & 255);
    return c;
}

// ---- memory

template <class T>
inline T __ldg(const T* at) {
    return *at;
}
template <class T>
inline T __ldcg(const T* at) {
    return *at;
}
template <class T>
inline T __ldcs(const T* at) {
    return *at;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
inline T atomicAdd(T* at, T x) {
    return __atomic_fetch_add(at, x, __ATOMIC_RELAXED);
}
inline uint32_t atomicAdd(uint32_t* at, int x) { return __atomic_fetch_add(at, x, __ATOMIC_RELAXED); }
inline uint32_t atomicSub(uint32_t* at, uint32_t x) { return __atomic_fetch_sub(at, x, __ATOMIC_RELAXED); }
inline uint32_t atomicExch(uint32_t* at, uint32_t x) { return __atomic_exchange_n(at, x, __ATOMIC_RELAXED); }
inline uint32_t atomicOr(uint32_t* at, uint32_t x) { return __atomic_fetch_or(at, x, __ATOMIC_RELAXED); }
inline uint32_t atomicMax(uint32_t* at, uint32_t x) {
    uint32_t old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (old < x && !__atomic_compare_exchange_n(at, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

// ---- threads

inline void __syncthreads(SHIM_AT) { shim::meet_block({"__syncthreads", file, line}, true); }
inline int __syncthreads_and(int x, SHIM_AT) { return shim::meet_block({"__syncthreads_and", file, line}, x != 0); }
inline int __syncthreads_or(int x, SHIM_AT) { return !shim::meet_block({"__syncthreads_or", file, line}, x == 0); }
inline void __syncwarp(uint32_t mask = ~0u, SHIM_AT) {
    shim::meet({"__syncwarp", file, line}, mask, nullptr, [](void* const*, uint32_t) {});
}

namespace shim {

template <class T>
struct Shuffle {
    T mine, got;
    uint32_t from;
};

template <class T>
T shuffle(const Site& site, uint32_t mask, T mine, uint32_t from) {
    Shuffle<T> s{mine, mine, from};
    meet(site, mask, &s, [](void* const* brought, uint32_t mask) {
        for (int i = 0; i < 32; ++i) {
            if (!(mask >> i & 1)) continue;
            auto& of = *static_cast<Shuffle<T>*>(brought[i]);
            if (!(mask >> of.from & 1)) fail("lane %d reads lane %u, which does not take part", i, of.from);
            of.got = static_cast<Shuffle<T>*>(brought[of.from])->mine;
        }
    });
    return s.got;
}

// What all lanes of a mask get: `join` of what they brought.
template <class T, class Join>
T reduce(const Site& site, uint32_t mask, T mine, Join) {
    meet(site, mask, &mine, [](void* const* brought, uint32_t mask) {
        const int first = __builtin_ctz(mask);
        T all = *static_cast<T*>(brought[first]);
        for (int i = first + 1; i < 32; ++i)
            if (mask >> i & 1) all = Join::join(all, *static_cast<T*>(brought[i]));
        for (int i = first; i < 32; ++i)
            if (mask >> i & 1) *static_cast<T*>(brought[i]) = all;
    });
    return mine;
}

struct Largest {
    static uint32_t join(uint32_t a, uint32_t b) { return a > b ? a : b; }
};
struct Sum {
    static uint32_t join(uint32_t a, uint32_t b) { return a + b; }
};
struct Any {
    static uint32_t join(uint32_t a, uint32_t b) { return a | b; }
};

}  // namespace shim

template <class T>
inline T __shfl_sync(uint32_t mask, T x, int from, int width = 32, SHIM_AT) {
    const uint32_t base = shim::lane() & ~(width - 1u);
    return shim::shuffle({"__shfl_sync", file, line}, mask, x, base + (from & (width - 1u)));
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T x, uint32_t by, int width = 32, SHIM_AT) {
    const uint32_t mine = shim::lane(), in = mine % width + by < static_cast<uint32_t>(width);
    return shim::shuffle({"__shfl_down_sync", file, line}, mask, x, in ? mine + by : mine);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T x, uint32_t by, int width = 32, SHIM_AT) {
    const uint32_t mine = shim::lane(), in = mine % width >= by;
    return shim::shuffle({"__shfl_up_sync", file, line}, mask, x, in ? mine - by : mine);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T x, int flip, int width = 32, SHIM_AT) {
    const uint32_t mine = shim::lane(), from = mine ^ flip;
    // Earlier groups of `width` lanes can be read, later ones cannot.
    return shim::shuffle({"__shfl_xor_sync", file, line}, mask, x, from / width <= mine / width ? from : mine);
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t x, SHIM_AT) {
    return shim::reduce({"__reduce_max_sync", file, line}, mask, x, shim::Largest());
}
inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t x, SHIM_AT) {
    return shim::reduce({"__reduce_add_sync", file, line}, mask, x, shim::Sum());
}
inline uint32_t __ballot_sync(uint32_t mask, int x, SHIM_AT) {
    return shim::reduce({"__ballot_sync", file, line}, mask, static_cast<uint32_t>(x != 0) << shim::lane(), shim::Any());
}
inline int __any_sync(uint32_t mask, int x, SHIM_AT) { return __ballot_sync(mask, x, file, line) != 0; }
inline int __all_sync(uint32_t mask, int x, SHIM_AT) { return __ballot_sync(mask, !x, file, line) == 0; }
