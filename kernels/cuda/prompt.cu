// Attention of a prompt's new tokens, the clear version: any bits, any head size. A block takes a few queries of one kv
// head over all that they may look at: pages, the window, the new tokens up to their own. Also how parts are joined.
#include "attend.cuh"
#include "rotate.cuh"
#include "stored.cuh"

namespace ott {

constexpr int THREADS = 128;
constexpr int QUERIES = CLEAR_QUERIES;

// What a block keeps in dynamic shared memory, in numbers: QUERIES * (k_dim + v_dim + THREADS + 2) + ROTATORS.
struct Clear {
    float *q, *out;
    float (*p)[THREADS];
    float *max, *sum, *shared;
    const Layer& l;
    const Prompt& prompt;

    __device__ Clear(float* memory, const Layer& l, const Prompt& prompt)
        : q(memory),
          out(q + QUERIES * l.k_dim),
          p(reinterpret_cast<float (*)[THREADS]>(out + QUERIES * l.v_dim)),
          max(p[QUERIES]),
          sum(max + QUERIES),
          shared(sum + QUERIES),
          l(l),
          prompt(prompt) {}

    // A tile of at most 128 tokens: thread t's scores become weights in `p`, and what was added so far shrinks.
    __device__ void weigh(float (&score)[QUERIES]) const {
        const int t = threadIdx.x;
        for (int i = 0; i < QUERIES; ++i) p[i][t] = score[i];
        __syncthreads();
        for (int i = t / 32; i < QUERIES; i += THREADS / 32) {
            float most = max[i], total = 0.0f;
            for (int j = t % 32; j < THREADS; j += 32) most = fmaxf(most, p[i][j]);
            for (int h = 16; h > 0; h /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, h));
            // Nothing is seen yet: no weights, whatever is subtracted.
            const float base = most == -INFINITY ? 0.0f : most, shrink = exp2f(max[i] - base);
            for (int j = t % 32; j < THREADS; j += 32) total += p[i][j] = exp2f(p[i][j] - base);
            for (int h = 16; h > 0; h /= 2) total += __shfl_xor_sync(~0u, total, h);
            for (int c = t % 32; c < static_cast<int>(l.v_dim); c += 32) out[i * l.v_dim + c] *= shrink;
            __syncwarp();
            if (t % 32 == 0) max[i] = most, sum[i] = sum[i] * shrink + total;
        }
        __syncthreads();
    }

    // `key(c)` of thread t's token, which is seen by queries from `first` on; of `tokens` tokens, `value(i, c)`.
    template <class Key, class Value>
    __device__ void attend(int tokens, int first, Key key, Value value) const {
        const int k_dim = l.k_dim, v_dim = l.v_dim, t = threadIdx.x;
        float score[QUERIES] = {};
        for (int c = 0; t < tokens && c < k_dim; ++c) {
            const float x = key(c);
            for (int i = 0; i < QUERIES; ++i) score[i] += q[i * k_dim + c] * x;
        }
        for (int i = 0; i < QUERIES; ++i)
            score[i] = t < tokens && i >= first ? capped(score[i], prompt.softcap) : -INFINITY;
        weigh(score);
        for (int c = t; c < v_dim; c += THREADS) {
            float add[QUERIES] = {};
            for (int j = 0; j < tokens; ++j) {
                const float x = value(j, c);
                for (int i = 0; i < QUERIES; ++i) add[i] += p[i][j] * x;
            }
            for (int i = 0; i < QUERIES; ++i) out[i * v_dim + c] += add[i];
        }
        __syncthreads();
    }

    template <class E>
    __device__ void page(uint32_t block, int head) const {
        const PageLayout layout = page_layout(l);
        const uint8_t* page = head_part(l, block, head, layout.head_bytes);
        const uint32_t place = traced_place(l, layout, page, block, head, threadIdx.x);
        uint32_t boosted = 0;
        // Channels come one after the other, as do boosted ones.
        auto key = [&](int c) {
            while (boosted < l.boosted && boosted_channel(page + layout.k_boosted, boosted) < c) ++boosted;
            const bool is_boosted = boosted < l.boosted && boosted_channel(page + layout.k_boosted, boosted) == c;
            if (place != NONE) return to_float(traced<E>(l, place).k[c]);
            return to_float(stored_key<E>(l, layout, page, threadIdx.x, c, is_boosted ? boosted : l.boosted));
        };
        auto value = [&](int t, int c) {
            const uint32_t place = traced_place(l, layout, page, block, head, t);
            return to_float(place != NONE ? traced<E>(l, place).v[c] : stored_value<E>(l, layout, page, t, c));
        };
        attend(l.group, 0, key, value);
    }

    // Back into the model's basis, in which new values are.
    __device__ void turn_back() const {
        for (int i = 0; i < QUERIES; ++i) {
            float* of = out + i * l.v_dim;
            rotate_token(
                l.v_dim, shared, Turn::BACK, [&](int c) { return of[c]; }, [&](int c, float x) { of[c] = x; });
        }
    }
};

// grid (ceil(tokens * queries of a token / QUERIES), kv_heads, rows), 128 threads
template <class E>
__device__ void attend_clearly(const Layer& l, const Row* rows, const uint32_t* tables, const Prompt& prompt,
                               float* memory) {
    const Row& row = rows[blockIdx.z];
    const int ratio = l.num_heads / l.kv_heads, first = blockIdx.x * QUERIES, head = blockIdx.y, t = threadIdx.x;
    const int count = min(QUERIES, static_cast<int>(row.fresh) * ratio - first), k_dim = l.k_dim, v_dim = l.v_dim;
    const Clear clear(memory, l, prompt);
    for (int i = 0; i < QUERIES; ++i) {
        const E* from = static_cast<const E*>(prompt.q.data) + blockIdx.z * prompt.q.row +
                        (head * ratio + (first + i) % ratio) * prompt.q.head + (first + i) / ratio * prompt.q.token;
        for (int c = t; c < k_dim; c += THREADS) clear.q[i * k_dim + c] = i < count ? to_float(from[c]) * prompt.scale : 0.0f;
        for (int c = t; c < v_dim; c += THREADS) clear.out[i * v_dim + c] = 0.0f;
    }
    if (t < QUERIES) clear.max[t] = -INFINITY, clear.sum[t] = 0.0f;
    __syncthreads();
    if (count > 0) {
        for (uint32_t g = 0; g < row.sealed_before; ++g) clear.page<E>(tables[row.table + g], head);
        const int window = static_cast<int>(row.past) - static_cast<int>(row.sealed_before * l.group);
        for (int start = 0; start < window; start += THREADS) {
            auto of = [&](int i) { return staged<E>(l, row.chunk_before, start + i, head); };
            clear.attend(
                min(THREADS, window - start), 0, [&](int c) { return to_float(of(t).k[c]); },
                [&](int i, int c) { return to_float(of(i).v[c]); });
        }
        if (l.rotate) clear.turn_back();
        const int seen = (first + count - 1) / ratio + 1;
        const E* k = static_cast<const E*>(prompt.k.data) + blockIdx.z * prompt.k.row + head * prompt.k.head;
        const E* v = static_cast<const E*>(prompt.v.data) + blockIdx.z * prompt.v.row + head * prompt.v.head;
        for (int start = 0; start < seen; start += THREADS)
            clear.attend(
                min(THREADS, seen - start), (start + t) * ratio - first,
                [&](int c) { return to_float(k[(start + t) * prompt.k.token + c]); },
                [&](int i, int c) { return to_float(v[(start + i) * prompt.v.token + c]); });
    }
    for (int i = 0; i < QUERIES && first + i < static_cast<int>(prompt.tokens) * ratio; ++i) {
        const size_t query = static_cast<size_t>(blockIdx.z) * l.num_heads + head * ratio + (first + i) % ratio;
        E* to = static_cast<E*>(prompt.out) + (query * prompt.tokens + (first + i) / ratio) * v_dim;
        const float inverse = i < count ? 1.0f / clear.sum[i] : 0.0f;
        for (int c = t; c < v_dim; c += THREADS) to[c] = from_float<E>(clear.out[i * v_dim + c] * inverse);
    }
}

// Join the parts of each query. grid (ceil(tokens * queries of a token * v_dim / 4 / 128), kv_heads, rows), a thread 4
// channels
template <class E>
__device__ void join(const Layer& l, const Row* rows, const Prompt& prompt) {
    const int ratio = l.num_heads / l.kv_heads, fours = l.v_dim / 4;
    const int i = (blockIdx.x * THREADS + threadIdx.x) / fours, c = (blockIdx.x * THREADS + threadIdx.x) % fours * 4;
    const int queries = prompt.tokens * ratio, tiles = (queries + TILE_QUERIES - 1) / TILE_QUERIES;
    if (i >= queries) return;
    float max = -INFINITY, sum = 0.0f, x[4] = {};
    const bool is_query = i / ratio < static_cast<int>(rows[blockIdx.z].fresh);
    for (uint32_t s = 0; is_query && s < prompt.splits; ++s) {
        const float* of = partial(l, prompt, blockIdx.z, blockIdx.y, i / TILE_QUERIES, tiles, s, i % TILE_QUERIES);
        const float2 found = *reinterpret_cast<const float2*>(of + l.v_dim);
        // A part may see nothing.
        if (found.y == 0.0f) continue;
        const float4 four = *reinterpret_cast<const float4*>(of + c);
        const float to = fmaxf(max, found.x), shrink = exp2f(max - to), weight = exp2f(found.x - to);
        max = to;
        sum = sum * shrink + found.y * weight;
        const float add[4] = {four.x, four.y, four.z, four.w};
        for (int k = 0; k < 4; ++k) x[k] = x[k] * shrink + add[k] * weight;
    }
    const size_t query = static_cast<size_t>(blockIdx.z) * l.num_heads + blockIdx.y * ratio + i % ratio;
    E* to = static_cast<E*>(prompt.out) + (query * prompt.tokens + i / ratio) * l.v_dim + c;
    const float inverse = is_query ? 1.0f / sum : 0.0f;
    for (int k = 0; k < 4; ++k) to[k] = from_float<E>(x[k] * inverse);
}

}  // namespace ott

#define OTT_PROMPT(suffix, E)                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) ott_prompt_##suffix(                                     \
        ott::Layer l, const ott::Row* rows, const uint32_t* tables, ott::Prompt prompt) {                      \
        extern __shared__ __align__(128) uint8_t shared[];                                                     \
        ott::attend_clearly<E>(l, rows, tables, prompt, reinterpret_cast<float*>(shared));                     \
    }                                                                                                          \
    extern "C" __global__ void __launch_bounds__(128)                                                          \
        ott_prompt_join_##suffix(ott::Layer l, const ott::Row* rows, ott::Prompt prompt) {                     \
        ott::join<E>(l, rows, prompt);                                                                         \
    }
OTT_PROMPT(f16, __half)
OTT_PROMPT(bf16, __nv_bfloat16)
OTT_PROMPT(f32, float)
