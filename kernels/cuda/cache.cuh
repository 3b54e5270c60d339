// What every kernel knows: one layer's memory, the rows of a step, and how numbers are read.
// `src/abi.rs` mirrors the structs field by field (`repr(C)`).
#pragma once
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "layout.cuh"

namespace ott {

// Most chunks of one row's window: it is shorter than two groups of 128.
constexpr int WINDOW_CHUNKS = 8;
// No chunk, no place.
constexpr uint32_t NONE = 0xffffffffu;

// One sequence in one step; the same for all layers. Tokens before `sealed * G` are in pages.
struct Row {
    uint32_t past;           // tokens stored before this step
    uint32_t fresh;          // tokens of this step
    uint32_t sealed_before;  // pages before this step
    uint32_t sealed;         // pages after it
    uint32_t table;          // where its block ids begin in `tables`
    // Chunks of the window, from its first open block on: before this step, and after it.
    uint32_t chunk_before[WINDOW_CHUNKS];
    uint32_t chunk[WINDOW_CHUNKS];
};

// One layer of the cache, all on the device.
struct Layer {
    uint8_t* pages;          // (num_blocks, kv_heads, head_bytes)
    uint8_t* staging;        // (chunks, kv_heads, keys (32, k_dim) then values (32, v_dim))
    uint8_t* samples;        // (chunks, kv_heads, 2 sampled tokens, means (k_dim) then roots (k_dim)); none without `weigh`
    uint8_t* traced;         // (places, key (k_dim) then value (v_dim))
    const uint32_t* places;  // (num_blocks, kv_heads, outliers): the places of a page's traced tokens
    uint32_t* faults;        // (rows of the step): see `fault`
    uint32_t kv_heads, k_dim, v_dim, group, k_bits, v_bits, outliers, extra, clip;
    uint32_t boosted;        // key channels with one more bit
    uint32_t rotate;         // 1: values are kept in another basis (rotate.cuh)
    uint32_t weigh;          // 1: errors of keys are weighed by samples of queries (sample.cuh)
    uint32_t num_heads;      // query heads
    uint32_t number;         // of the layer
};

// New queries, keys or values of a step: strides in elements, channels side by side.
struct Fresh {
    const void* data;
    int64_t row, head, token;
};

__device__ inline PageLayout page_layout(const Layer& l) {
    return PageLayout(l.group, l.k_dim, l.v_dim, l.k_bits, l.v_bits, l.outliers, l.boosted);
}

__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(float x) { return x; }
template <class E>
__device__ inline E from_float(float x);
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline float from_float<float>(float x) { return x; }

// Whether f16 holds a number, rounded: scales and mins of any group of such numbers are finite.
template <class E>
__device__ inline bool is_storable(E x) { return fabsf(to_float(x)) < 65520.0f; }

// Row `r` of the step has a number that cannot be kept; the first layer that finds one is told. Layers run one after the
// other, and all threads of one write the same; but where stored tokens are sealed, beside each other, and nobody reads it.
__device__ inline void fault(const Layer& l, int r) {
    if (l.faults[r] == 0) l.faults[r] = l.number + 1;
}

// Scales and mins lie at even offsets.
__device__ inline float half_at(const uint8_t* section, int i) {
    return __half2float(reinterpret_cast<const __half*>(section)[i]);
}

// Bit `j` of `n` in 8 planes.
__device__ inline uint32_t bit_at(const uint8_t* bytes, int n, int j) { return bytes[j % (n / 8)] >> (j / (n / 8)) & 1; }

// The `i`-th channel with one more bit.
__device__ inline int boosted_channel(const uint8_t* section, int i) {
    return reinterpret_cast<const uint16_t*>(section)[i];
}

// Code `j` of `n` codes packed in planes (docs/layout.md).
__device__ inline uint32_t code_at(const uint8_t* bytes, int n, int bits, int j) {
    if (bits == 3) {
        uint32_t low = bytes[j % (n / 4)] >> (2 * (j / (n / 4))) & 3;
        uint32_t high = bit_at(bytes + n / 4, n, j);
        return low | high << 2;
    }
    int len = packed_len(n, bits);
    return bytes[j % len] >> (bits * (j / len)) & ((1u << bits) - 1);
}

// Byte `j` of one section of planes: `width` bits of each of `n` codes, those from bit `from` on.
__device__ inline uint8_t packed_bits(const uint8_t* codes, int n, int from, int width, int j) {
    uint32_t byte = 0;
    for (int p = 0; p < 8 / width; ++p)
        byte |= (codes[j + p * packed_len(n, width)] >> from & ((1u << width) - 1)) << (p * width);
    return static_cast<uint8_t>(byte);
}

// Byte `j` of `n` packed codes, gathered from the codes, of which the low `bits` count.
__device__ inline uint8_t packed_byte(const uint8_t* codes, int n, int bits, int j) {
    if (bits != 3) return packed_bits(codes, n, 0, bits, j);
    return j < n / 4 ? packed_bits(codes, n, 0, 2, j) : packed_bits(codes, n, 2, 1, j - n / 4);
}

template <class E>
struct Token {
    const E* k;
    const E* v;
};

// Token `at` of a chunk of the window.
template <class E>
__device__ inline Token<E> in_chunk(const Layer& l, uint32_t chunk, int at, int head) {
    const size_t width = l.k_dim + l.v_dim;
    const E* base = reinterpret_cast<const E*>(l.staging) + (static_cast<size_t>(chunk) * l.kv_heads + head) * CHUNK * width;
    return {base + at * l.k_dim, base + CHUNK * l.k_dim + at * l.v_dim};
}

// A token of the window, `at` counted from the first open block.
template <class E>
__device__ inline Token<E> staged(const Layer& l, const uint32_t* chunks, int at, int head) {
    return in_chunk<E>(l, chunks[at / CHUNK], at % CHUNK, head);
}

// A token that is not sealed before this step: staged, or new.
template <class E>
__device__ inline Token<E> unsealed(const Layer& l, const Row& row, const Fresh& k, const Fresh& v, int r, int head,
                                    int position) {
    int fresh = position - static_cast<int>(row.past);
    if (fresh < 0)
        return staged<E>(l, row.chunk_before, position - static_cast<int>(row.sealed_before * l.group), head);
    return {static_cast<const E*>(k.data) + r * k.row + head * k.head + fresh * k.token,
            static_cast<const E*>(v.data) + r * v.row + head * v.head + fresh * v.token};
}

// A traced token.
template <class E>
__device__ inline Token<E> traced(const Layer& l, uint32_t place) {
    const E* base = reinterpret_cast<const E*>(l.traced) + static_cast<size_t>(place) * (l.k_dim + l.v_dim);
    return {base, base + l.k_dim};
}

__device__ inline uint8_t* head_part(const Layer& l, uint32_t block, int head, size_t head_bytes) {
    return l.pages + (static_cast<size_t>(block) * l.kv_heads + head) * head_bytes;
}

}  // namespace ott
