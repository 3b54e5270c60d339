// Matrix products with raw codes on tensor cores.
//
// A section of a page is a matrix of codes: ROWS rows (channels of keys, tokens of values) of N codes each, packed in
// planes. The product wanted is `sum over rows of factor[row][column] * code[row][i]` for all i: codes are the left
// operand of `mma.m16n8k32` with 8-bit integers, factors the right one.
//
// - A plane of 2 bits masked in place is `code * 4^plane`, still 8 bits: nothing is shifted, and the power goes into
//   the factor of the result. Per 16 codes: 4 masks.
// - Integers add up exactly. A factor is 16 bits wide, as a high and a low byte in neighbouring columns, so that 8
//   columns hold 4 queries.
// - An operand register holds 4 rows of one code: 4 words of 4 rows are transposed with 8 byte permutes per 64 codes.
//   Thread `t` of a quad takes rows 4 * (SLOTS * t + slot) .. + 3, in the order rotated by t: no bank conflicts.
#pragma once
#include <cstdint>

#include "ptx.cuh"

namespace ott {

// Queries of a tile.
constexpr int QUERIES = 4;

template <int N, int BITS, int ROWS>
struct Codes {
    static constexpr int PLANES = BITS == 3 ? 4 : 8 / BITS;
    static constexpr int ROW_BYTES = N * BITS / 8;
    // Bytes of a plane, and those that one of the 8 thread groups takes.
    static constexpr int PLANE = N / PLANES;
    static constexpr int BYTES = PLANE / 8;
    // Results of one thread, each for one query.
    static constexpr int OUT = N / 8;
    // Operand registers of a thread: 4 rows each.
    static constexpr int SLOTS = ROWS / 16;
    // Words from one column of factors to the next: no bank conflicts.
    static constexpr int STRIDE = SLOTS == 8 ? 36 : 4 * SLOTS;

    // The code that result `o` of thread group `g` belongs to.
    __device__ static constexpr int element(int o, int g) {
        const int i = o / PLANES, p = o % PLANES;
        return i / 4 * 32 + (BYTES < 4 ? BYTES : 4) * g + i % 4 + p * PLANE;
    }

    // 4^-plane where planes are masked in place.
    __device__ static constexpr float weight(int o) { return BITS == 3 ? 1.0f : 1.0f / (1 << (BITS * (o % PLANES))); }

    // Words of this thread group in 4 rows, byte by byte: `out[i]` has byte i of each row.
    __device__ static void transpose(const uint32_t (&w)[4], int g, uint32_t* out) {
        if constexpr (BYTES >= 4) {
            const uint32_t low01 = __byte_perm(w[0], w[1], 0x5140), high01 = __byte_perm(w[0], w[1], 0x7362);
            const uint32_t low23 = __byte_perm(w[2], w[3], 0x5140), high23 = __byte_perm(w[2], w[3], 0x7362);
            out[0] = __byte_perm(low01, low23, 0x5410);
            out[1] = __byte_perm(low01, low23, 0x7632);
            out[2] = __byte_perm(high01, high23, 0x5410);
            out[3] = __byte_perm(high01, high23, 0x7632);
        } else {
            const uint32_t pick = g & 1 ? 0x7362 : 0x5140;
            const uint32_t both01 = __byte_perm(w[0], w[1], pick), both23 = __byte_perm(w[2], w[3], pick);
            out[0] = __byte_perm(both01, both23, 0x5410);
            out[1] = __byte_perm(both01, both23, 0x7632);
        }
    }

    // Plane `p` of four rows.
    __device__ static uint32_t plane(uint32_t low, uint32_t high, int p, int g) {
        if constexpr (BITS == 3)
            return (low >> (2 * p) & 0x03030303u) | (high >> (2 * p + (g >> 2)) & 0x01010101u) << 2;
        constexpr uint32_t mask = ((1u << BITS) - 1) * 0x01010101u;
        return low & mask << (BITS * p);
    }

    // Sums for TILES times 4 queries: [tile][o / 2][o % 2 * 2 + part] is result o of query `t`, high part and low part.
    template <int TILES>
    using Sums = int[TILES][OUT / 2][4];
    // Words from one tile's factors to the next.
    static constexpr int TILE = 8 * STRIDE;

    // High bits of some rows' codes, in 4 rows' bytes that are shifted to this thread group's planes: those of result
    // 2 m and the next, in the place where plane `p` has its lowest bit.
    __device__ static uint32_t high_plane(const uint32_t (&bytes)[4], int m, int odd) {
        const int i = 2 * m / PLANES, p = 2 * m % PLANES + odd;
        if constexpr (BITS == 3) return bytes[i] >> (2 * p) & 0x01010101u;
        // 2 bits: planes 2 p. 4 bits: planes 4 p, 2 further for the second word of codes.
        return bytes[i % 4] >> (2 * (i / 4)) & 0x01010101u << (BITS * p);
    }

    // Add high bits: row `r` of `bits`, one of `count`, has one bit of each code of row `channels[r]`; `factors` are those
    // of all rows. To be called before `multiply`.
    template <int TILES>
    __device__ static void multiply_high(const uint8_t* bits, const uint16_t* channels, int count,
                                         const uint32_t* factors, int lane, Sums<TILES>& result) {
        static_assert(BYTES >= 4, "a thread's codes are bytes of whole words");
        const int g = lane / 4, t = lane % 4;
        const uint8_t* column = reinterpret_cast<const uint8_t*>(factors + g * STRIDE);
#pragma unroll 1
        for (int first = 8 * t; first - 8 * t < count; first += 32) {
            const uint4 four = *reinterpret_cast<const uint4*>(channels + first);
            const uint32_t two[4] = {four.x, four.y, four.z, four.w};
            uint32_t bytes[2][4], b[TILES][2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                uint32_t f[TILES][4], w[4];
#pragma unroll
                for (int x = 0; x < 4; ++x) {
                    const uint32_t c = x % 2 ? two[2 * h + x / 2] >> 16 : two[2 * h + x / 2] & 0xffff;
                    const bool is_row = first + 4 * h + x < count;
#pragma unroll
                    for (int i = 0; i < TILES; ++i) f[i][x] = is_row ? column[i * 4 * TILE + c] : 0;
                    w[x] = *reinterpret_cast<const uint32_t*>(bits + (first + 4 * h + (x + t) % 4) * (N / 8) + g % 4 * 4);
                }
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    const uint32_t word =
                        __byte_perm(__byte_perm(f[i][0], f[i][1], 0x0040), __byte_perm(f[i][2], f[i][3], 0x0040), 0x5410);
                    b[i][h] = __funnelshift_r(word, word, 8 * t);
                }
                transpose(w, g, bytes[h]);
                // Even planes of bits in one half of the thread groups, odd ones in the other.
#pragma unroll
                for (int i = 0; i < 4; ++i) bytes[h][i] >>= g >> 2;
            }
#pragma unroll
            for (int m = 0; m < OUT / 2; ++m) {
                const uint32_t a[4] = {high_plane(bytes[0], m, 0), high_plane(bytes[0], m, 1), high_plane(bytes[1], m, 0),
                                       high_plane(bytes[1], m, 1)};
#pragma unroll
                for (int i = 0; i < TILES; ++i) mma_bytes(result[i][m], a[0], a[1], a[2], a[3], b[i][0], b[i][1]);
            }
        }
        // They are worth more than the codes' own.
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int m = 0; m < OUT / 2; ++m)
#pragma unroll
                for (int k = 0; k < 4; ++k) result[i][m][k] *= 1 << BITS;
    }

    // Add products with codes. `codes`: the section, in shared memory; `factors`: the columns, in shared memory.
    template <int TILES>
    __device__ static void multiply(const uint8_t* codes, const uint32_t* factors, int lane, Sums<TILES>& result) {
        const int g = lane / 4, t = lane % 4;
        const uint8_t* rows[4];
        const int word = (BYTES < 4 ? BYTES * g / 4 : g) * 4;
#pragma unroll
        for (int x = 0; x < 4; ++x) rows[x] = codes + (4 * SLOTS * t + (x + t) % 4) * ROW_BYTES + word;
        // The high bits of 3-bit codes.
        const int high_at = PLANE - word + (BYTES < 4 ? BYTES * (g % 4) / 4 : g % 4) * 4;
        // Two steps at a time: code that is run once must be fetched as well.
#pragma unroll 1
        for (int pair = 0; pair < SLOTS / 4; ++pair) {
            uint32_t b[TILES][4];
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                const uint4 four =
                    *reinterpret_cast<const uint4*>(factors + i * TILE + g * STRIDE + SLOTS * t + 4 * pair);
                b[i][0] = __funnelshift_r(four.x, four.x, 8 * t), b[i][1] = __funnelshift_r(four.y, four.y, 8 * t);
                b[i][2] = __funnelshift_r(four.z, four.z, 8 * t), b[i][3] = __funnelshift_r(four.w, four.w, 8 * t);
            }
#pragma unroll
            for (int k = 0; k < 2; ++k) {
            uint32_t low[2][BYTES], high[2][BYTES] = {};
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int at = (4 * pair + 2 * k + h) * 4 * ROW_BYTES;
#pragma unroll
                for (int u = 0; u < BYTES; u += 4) {
                    uint32_t w[4];
#pragma unroll
                    for (int x = 0; x < 4; ++x) w[x] = *reinterpret_cast<const uint32_t*>(rows[x] + at + 8 * u);
                    transpose(w, g, low[h] + u);
                }
                if constexpr (BITS == 3) {
                    uint32_t w[4];
#pragma unroll
                    for (int x = 0; x < 4; ++x) w[x] = *reinterpret_cast<const uint32_t*>(rows[x] + at + high_at);
                    transpose(w, g, high[h]);
                }
            }
#pragma unroll
            for (int m = 0; m < OUT / 2; ++m) {
                const int i = 2 * m / PLANES, p = 2 * m % PLANES;
                const uint32_t a[4] = {plane(low[0][i], high[0][i], p, g), plane(low[0][i], high[0][i], p + 1, g),
                                       plane(low[1][i], high[1][i], p, g), plane(low[1][i], high[1][i], p + 1, g)};
#pragma unroll
                for (int j = 0; j < TILES; ++j)
                    mma_bytes(result[j][m], a[0], a[1], a[2], a[3], b[j][2 * k], b[j][2 * k + 1]);
            }
            }
        }
    }
};

// 16-bit fixed point: high and low bytes of 4 numbers below 1 / inverse in magnitude, where inverse = LARGEST / max.
constexpr float LARGEST = 32256.0f;

__device__ inline void fix(const float (&x)[4], float inverse, uint32_t& high, uint32_t& low) {
    // 1.5 * 2^23 puts the integer into the low bits; 128 more make the low byte signed after the flip.
    uint32_t i[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) i[k] = __float_as_uint(fmaf(x[k], inverse, 12582912.0f + 128.0f));
    const uint32_t a = __byte_perm(i[0], i[1], 0x5410), b = __byte_perm(i[2], i[3], 0x5410);
    high = __byte_perm(a, b, 0x7531);
    low = __byte_perm(a, b, 0x6420) ^ 0x80808080u;
}

__device__ inline float unfixed(int high, int low) { return static_cast<float>(high * 256 + low); }

}  // namespace ott
