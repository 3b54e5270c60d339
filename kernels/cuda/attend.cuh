// What both attention kernels share: their arguments, partial softmaxes and how they are merged.
#pragma once
#include "cache.cuh"

namespace ott {

// A part of one row's context: pages whose blocks are `tables[from .. to]`, or tokens `from .. to` of the window.
struct Item {
    uint32_t row, window, from, to;
};

// One attention call. Scores are in units of log2: `scale` has log2(e) in it.
struct Query {
    const void* q;           // (rows, num_heads, k_dim), strides in elements
    int64_t row, head;
    void* out;               // (rows, num_heads, v_dim), contiguous
    float* sums;             // (items, num_heads, 2 + v_dim): maximum, sum, weighted values
    uint32_t* arrived;       // (rows, kv_heads, tiles): items that are done; zero before and after
    uint32_t num_heads;
    float scale;
    float softcap;           // in the same units as scores without log2(e); 0: none
};

constexpr float LOG2_E = 1.44269504088896340736f;

// Softcap on a score in units of log2.
__device__ inline float capped(float score, float softcap) {
    return softcap == 0.0f ? score : softcap * LOG2_E * tanhf(score / (softcap * LOG2_E));
}

}  // namespace ott
