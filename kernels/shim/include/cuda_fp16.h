// IEEE binary16 with CUDA's rounding: to nearest even, NaN is 0x7fff.
#pragma once
#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline float __half2float(__half h) {
    const uint32_t sign = (h.bits & 0x8000u) << 16, rest = h.bits & 0x7fffu;
    // Exponents of 5 bits count from 15 and of 8 bits from 127; a product puts subnormals right.
    if (rest < 0x7c00u) return shim_bits<float>(sign | shim_bits<uint32_t>(shim_bits<float>(rest << 13) * 0x1p112f));
    return shim_bits<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
}

inline __half __float2half_rn(float x) {
    const uint32_t all = shim_bits<uint32_t>(x), sign = all >> 16 & 0x8000u, rest = all & 0x7fffffffu;
    uint32_t out;
    if (rest > 0x7f800000u) {
        return {0x7fff};
    } else if (rest >= 0x477ff000u) {  // 65520: half way to what would be the next number
        out = 0x7c00u;
    } else if (rest < 0x38800000u) {  // below 2^-14: units of 2^-24, which adding 0.5 rounds to
        out = shim_bits<uint32_t>(shim_bits<float>(rest) + 0.5f) - 0x3f000000u;
    } else {
        out = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
    }
    return {static_cast<uint16_t>(sign | out)};
}

inline __half __float2half(float x) { return __float2half_rn(x); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline int __hisinf(__half h) { return (h.bits & 0x7fffu) != 0x7c00u ? 0 : h.bits & 0x8000u ? -1 : 1; }
inline bool __hisnan(__half h) { return (h.bits & 0x7fffu) > 0x7c00u; }
