// Codes of a section as numbers in shared memory, operands of tensor cores.
//
// A section's row is one scale, one min and N codes in planes (docs/layout.md). Of 2 or 3 bits a code can be one of 4 or 8
// numbers, which are made once and rounded as `stored.cuh` does; then a byte permute picks two of them by two codes. Wider
// codes are multiplied.
#pragma once
#include "cache.cuh"
#include "ptx.cuh"

namespace ott {

// Two numbers in a register, rounded.
template <class E>
__device__ inline uint32_t two_of(float a, float b);
template <>
__device__ inline uint32_t two_of<__half>(float a, float b) {
    const __half2 two = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&two);
}
template <>
__device__ inline uint32_t two_of<__nv_bfloat16>(float a, float b) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&two);
}

// Where 8 numbers from column `8 * eight` on lie in a matrix of rows of COLUMNS numbers, in bytes: those of 8 rows in a row
// are in different banks.
template <int COLUMNS>
__device__ inline int place(int row, int eight) {
    return row * (2 * COLUMNS) + (eight ^ (row & 7)) * 16;
}

// What codes of one row stand for.
template <class E, int BITS>
struct Numbers {
    float scale, min;

    __device__ Numbers(float scale, float min) : scale(scale), min(min) {}

    // Four codes, a byte each: 8388608 + code is exact, and so is what is left of it.
    __device__ void four(uint32_t codes, uint32_t& a, uint32_t& b) const {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float code = __uint_as_float(__byte_perm(codes, 0x4b000000u, 0x7440 + i)) - 8388608.0f;
            x[i] = fmaf(code, scale, min);
        }
        a = two_of<E>(x[0], x[1]);
        b = two_of<E>(x[2], x[3]);
    }
};

// Numbers of codes below 4, two in a register.
template <class E>
__device__ inline void table_of(float scale, float min, int from, uint32_t (&table)[2]) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = __fadd_rn(__fmul_rn(static_cast<float>(from + i), scale), min);
    table[0] = two_of<E>(x[0], x[1]);
    table[1] = two_of<E>(x[2], x[3]);
}

// A byte's code as two places of bytes: 2 * code, 2 * code + 1.
__device__ inline uint32_t places_of(uint32_t codes) { return codes * 0x22 + 0x10101010u; }

template <class E>
struct Numbers<E, 2> {
    uint32_t table[2];

    __device__ Numbers(float scale, float min) { table_of<E>(scale, min, 0, table); }

    __device__ void four(uint32_t codes, uint32_t& a, uint32_t& b) const {
        const uint32_t places = places_of(codes);
        a = __byte_perm(table[0], table[1], places);
        b = __byte_perm(table[0], table[1], places >> 16);
    }
};

template <class E>
struct Numbers<E, 3> {
    uint32_t low[2], high[2];

    __device__ Numbers(float scale, float min) {
        table_of<E>(scale, min, 0, low);
        table_of<E>(scale, min, 4, high);
    }

    __device__ void four(uint32_t codes, uint32_t& a, uint32_t& b) const {
        const uint32_t places = places_of(codes & 0x03030303u);
        // The third bit where a byte has its sign, repeated over a number.
        const uint32_t signs = codes << 5, first = spread_signs<0, 1>(signs), last = spread_signs<2, 3>(signs);
        const uint32_t low_a = __byte_perm(low[0], low[1], places), high_a = __byte_perm(high[0], high[1], places);
        const uint32_t low_b = __byte_perm(low[0], low[1], places >> 16);
        const uint32_t high_b = __byte_perm(high[0], high[1], places >> 16);
        a = (low_a & ~first) | (high_a & first);
        b = (low_b & ~last) | (high_b & last);
    }
};

// A section of rows of N codes.
template <class E, int N, int BITS>
struct Section {
    static constexpr int PLANES = BITS == 4 ? 2 : 4;
    // Bits of a plane.
    static constexpr int WIDTH = BITS == 3 ? 2 : BITS;
    static constexpr int ROW_BYTES = N * BITS / 8;
    // Codes of a plane, and 16-byte parts of it.
    static constexpr int PLANE = N / PLANES;
    static constexpr int PARTS = PLANE / 16;

    // 16 codes of plane `p`: part `part` of row `codes`, as numbers of BITS + BOOST bits to `to(eight)`, where `eight` counts
    // from the row's first code. `high`: a row of one more bit each, in 8 planes.
    template <int BOOST, class To>
    __device__ static void sixteen(const uint32_t (&words)[4], const uint8_t* codes, const uint8_t* high, int part, int p,
                                   const Numbers<E, BITS + BOOST>& numbers, To to) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            const int first = 16 * part + 8 * u;
            uint32_t out[4];
#pragma unroll
            for (int w = 0; w < 2; ++w) {
                uint32_t c = words[2 * u + w] >> (WIDTH * p) & ((1u << WIDTH) - 1) * 0x01010101u;
                const int bit = (PLANE * p + first) / (N / 8), at = first % (N / 8) + 4 * w;
                if (BITS == 3) c |= (*reinterpret_cast<const uint32_t*>(codes + N / 4 + at) >> bit & 0x01010101u) << 2;
                if (BOOST) c |= (*reinterpret_cast<const uint32_t*>(high + at) >> bit & 0x01010101u) << BITS;
                numbers.four(c, out[2 * w], out[2 * w + 1]);
            }
            *reinterpret_cast<uint4*>(to((PLANE * p + first) / 8)) = make_uint4(out[0], out[1], out[2], out[3]);
        }
    }

    __device__ static void load(const uint8_t* codes, int part, uint32_t (&words)[4]) {
        // Rows of 3 bits lie at multiples of 8.
        const uint2 a = *reinterpret_cast<const uint2*>(codes + 16 * part);
        const uint2 b = *reinterpret_cast<const uint2*>(codes + 16 * part + 8);
        words[0] = a.x, words[1] = a.y, words[2] = b.x, words[3] = b.y;
    }

    // Planes FROM .. FROM + COUNT of rows `first ..`, `rows` of them, by THREADS threads: row r to row r - first of a matrix
    // of COLUMNS columns, of which the first is the first code of plane `from`.
    template <int COLUMNS, int COUNT, int ROWS, int THREADS>
    __device__ static void decode(const uint8_t* codes, const uint8_t* scales, const uint8_t* mins, int first, int from,
                                  uint8_t* to) {
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * PARTS; i += THREADS) {
            // Rows in a row: no two of 8 lanes write to the same banks.
            const int row = i % ROWS, part = i / ROWS;
            const uint8_t* bytes = codes + (first + row) * ROW_BYTES;
            const Numbers<E, BITS> numbers(half_at(scales, first + row), half_at(mins, first + row));
            uint32_t words[4];
            load(bytes, part, words);
#pragma unroll
            for (int p = 0; p < COUNT; ++p)
                sixteen<0>(words, bytes, nullptr, part, from + p, numbers,
                           [&](int eight) { return to + place<COLUMNS>(row, eight - PLANE * from / 8); });
        }
    }

    // The rows `channels[i]` once more, with the bit of row i of `high`.
    template <int COLUMNS, int COUNT, int THREADS>
    __device__ static void decode_boosted(const uint8_t* codes, const uint8_t* scales, const uint8_t* mins,
                                          const uint8_t* high, const uint16_t* channels, int boosted, int from, uint8_t* to) {
#pragma unroll 1
        for (int i = threadIdx.x; i < boosted * PARTS * COUNT; i += THREADS) {
            const int b = i / (PARTS * COUNT), part = i / COUNT % PARTS, p = from + i % COUNT, row = channels[b];
            const uint8_t* bytes = codes + row * ROW_BYTES;
            const Numbers<E, BITS + 1> numbers(half_at(scales, row), half_at(mins, row));
            uint32_t words[4];
            load(bytes, part, words);
            sixteen<1>(words, bytes, high + b * (N / 8), part, p, numbers,
                       [&](int eight) { return to + place<COLUMNS>(row, eight - PLANE * from / 8); });
        }
    }
};

}  // namespace ott
