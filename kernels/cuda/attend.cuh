// What both attention kernels share: their arguments, partial softmaxes and how they are merged.
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

constexpr float LOG2_E = 1.44269504088896340736f;

// Softcap on a score in units of log2.
__device__ inline float capped(float score, float softcap) {
    return softcap == 0.0f ? score : softcap * LOG2_E * tanhf(__fdividef(score, softcap * LOG2_E));
}

}  // namespace ott
