// What attention kernels share: their arguments, partial softmaxes and how they are merged.
#pragma once
#include "cache.cuh"

namespace ott {

// Numbers of an item that save a look into tables.
constexpr int ITEM_FIRST = 4;

// A part of one row's context: pages whose blocks are `tables[from .. to]`, or tokens `from .. to` of the window. `first`
// are the first blocks, or the first chunks of the window from that of token `from` on.
struct Item {
    uint32_t row, window, from, to;
    uint32_t first[ITEM_FIRST];
};

// One attention call. Scores are in units of log2: `scale` has log2(e) in it.
struct Query {
    const void* q;           // (rows, num_heads, k_dim), strides in elements
    int64_t row, head;
    void* out;               // (rows, num_heads, v_dim), contiguous
    float* sums;             // (items, num_heads, v_dim + PARTIAL): weighted values, their maximum, their sum
    uint32_t* arrived;       // (rows, kv_heads, tiles): items that are done; zero before and after
    uint32_t num_heads;
    float scale;
    float softcap;           // in the same units as scores without log2(e); 0: none
};

// Numbers of an item's result beside its weighted values: maximum, sum, two of padding.
constexpr int PARTIAL = 4;

// Of one item and query head.
__device__ inline float* partial(const Query& query, uint32_t item, uint32_t head, int v_dim) {
    return query.sums + (static_cast<size_t>(item) * query.num_heads + head) * (v_dim + PARTIAL);
}

// Attention of a step's new tokens to stored ones and to each other. A query of a kv head is a new token's query head; they
// are numbered token by token, and blocks take them by `TILE_QUERIES`.
struct Prompt {
    Fresh q, k, v;           // (rows, heads, tokens, dim), values in the model's basis
    void* out;               // (rows, num_heads, tokens, v_dim), contiguous; zeros where a row has no token
    float* sums;             // of parts: (rows, kv_heads, tiles, splits, TILE_QUERIES, v_dim + PARTIAL), if splits > 1
    uint32_t tokens;         // of the longest row, or more
    uint32_t splits;         // parts of a tile's context
    float scale, softcap;    // as in Query
};

// Queries of a block on tensor cores, and of the clear kernel's.
constexpr int TILE_QUERIES = 128;
constexpr int CLEAR_QUERIES = 8;

// Of one part of a tile, its query `i`.
__device__ inline float* partial(const Layer& l, const Prompt& prompt, uint32_t row, uint32_t head, uint32_t tile,
                                 uint32_t tiles, uint32_t split, uint32_t i) {
    const size_t part = ((static_cast<size_t>(row) * l.kv_heads + head) * tiles + tile) * prompt.splits + split;
    return prompt.sums + (part * TILE_QUERIES + i) * (l.v_dim + PARTIAL);
}

constexpr float LOG2_E = 1.44269504088896340736f;

// Softcap on a score in units of log2.
__device__ inline float capped(float score, float softcap) {
    return softcap == 0.0f ? score : softcap * LOG2_E * tanhf(__fdividef(score, softcap * LOG2_E));
}

}  // namespace ott
