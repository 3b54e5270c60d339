// What is kept of queries until their group is sealed (ott-backend/src/cache/sample.rs): of every 16th token's, the mean
// of each channel over the query heads of a kv head, and the root of its mean square. Compiled without contraction, where
// it is used.
#pragma once
#include "cache.cuh"

namespace ott {

// The last of so many tokens is sampled.
constexpr int SAMPLED = 16;

// One channel of a sample.
template <class E>
struct Sample {
    E mean, root;
};

// The sample of the token `at` of a chunk of the window: means (k_dim), then roots (k_dim).
template <class E>
__device__ inline E* sample_in_chunk(const Layer& l, uint32_t chunk, int at, int head) {
    const size_t of_head = static_cast<size_t>(chunk) * l.kv_heads + head;
    return reinterpret_cast<E*>(l.samples) + (of_head * (CHUNK / SAMPLED) + at / SAMPLED) * 2 * l.k_dim;
}

// Channel `c` of the sample of a new token, zero if its queries were not given. Rounded as it is kept.
template <class E>
__device__ inline Sample<E> sample_of(const Layer& l, const Fresh& q, int r, int head, int fresh, int c) {
    float sum = 0.0f, squares = 0.0f;
    const int shared = l.num_heads / l.kv_heads;
    const E* x = static_cast<const E*>(q.data);
    if (x != nullptr) {
        x += r * q.row + static_cast<int64_t>(head) * shared * q.head + fresh * q.token + c;
        for (int i = 0; i < shared; ++i) {
            const float number = to_float(x[i * q.head]);
            sum += number;
            squares += number * number;
        }
    }
    const float count = static_cast<float>(shared);
    return {from_float<E>(__fdiv_rn(sum, count)), from_float<E>(__fsqrt_rn(__fdiv_rn(squares, count)))};
}

// The same of a token that is not sealed before this step: kept, or new.
template <class E>
__device__ inline Sample<E> unsealed_sample(const Layer& l, const Row& row, const Fresh& q, int r, int head, int position,
                                            int c) {
    const int fresh = position - static_cast<int>(row.past);
    if (fresh >= 0) return sample_of<E>(l, q, r, head, fresh, c);
    const int at = position - static_cast<int>(row.sealed_before * l.group);
    const E* kept = sample_in_chunk<E>(l, row.chunk_before[at / CHUNK], at % CHUNK, head);
    return {kept[c], kept[l.k_dim + c]};
}

}  // namespace ott
