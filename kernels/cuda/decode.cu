// Decode attention, the clear version: any bits, any head size. A block takes one query head over one item, a thread
// one token, then one channel. Also the merge of items, and dequantization for prefix hits.
#include "attend.cuh"
#include "rotate.cuh"
#include "stored.cuh"

namespace ott {

constexpr int THREADS = 128;
constexpr int MAX_DIM = 1024;

__device__ inline float block_max(float x, float* shared) {
    for (int h = 16; h > 0; h /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, h));
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    return fmaxf(fmaxf(shared[0], shared[1]), fmaxf(shared[2], shared[3]));
}

// grid (items, num_heads), 128 threads
template <class E>
__device__ void decode(Layer l, const Row* rows, const uint32_t* tables, const Item* items, Query query) {
    __shared__ float q[MAX_DIM], out[MAX_DIM], p[THREADS], shared[4];
    const Item item = items[blockIdx.x];
    const Row& row = rows[item.row];
    const int t = threadIdx.x, k_dim = l.k_dim, v_dim = l.v_dim, group = l.group;
    const int head = blockIdx.y * l.kv_heads / query.num_heads;
    const PageLayout layout = page_layout(l);
    const E* from = static_cast<const E*>(query.q) + item.row * query.row + blockIdx.y * query.head;
    for (int c = t; c < k_dim; c += THREADS) q[c] = to_float(from[c]) * query.scale;
    for (int c = t; c < v_dim; c += THREADS) out[c] = 0.0f;
    __syncthreads();
    float max = -INFINITY, sum = 0.0f;

    // One tile of at most 128 tokens: thread t's score; then weights in `p`.
    auto weigh = [&](float score) {
        const float next = fmaxf(max, block_max(score, shared));
        const float shrink = exp2f(max - next);
        max = next;
        p[t] = exp2f(score - max);
        __syncthreads();
        float tile = 0.0f;
        for (int i = 0; i < THREADS; ++i) tile += p[i];
        sum = sum * shrink + tile;
        return shrink;
    };
    auto dot = [&](const E* key) {
        float s = 0.0f;
        for (int c = 0; c < k_dim; ++c) s += q[c] * to_float(key[c]);
        return capped(s, query.softcap);
    };

    if (item.window) {
        const int len = item.to;
        for (int start = item.from; start < len; start += THREADS) {
            const int at = start + t;
            const float shrink = weigh(at < len ? dot(staged<E>(l, row.chunk, at, head).k) : -INFINITY);
            for (int c = t; c < v_dim; c += THREADS) {
                float o = out[c] * shrink;
                for (int i = 0; i < min(THREADS, len - start); ++i)
                    o += p[i] * to_float(staged<E>(l, row.chunk, start + i, head).v[c]);
                out[c] = o;
            }
            __syncthreads();
        }
    }
    for (uint32_t g = item.from; !item.window && g < item.to; ++g) {
        const uint32_t block = tables[g];
        const uint8_t* page = head_part(l, block, head, layout.head_bytes);
        const uint8_t* slots = page + layout.trace + 4 * l.outliers;
        const uint32_t* places = l.places + (static_cast<size_t>(block) * l.kv_heads + head) * l.outliers;
        float score = -INFINITY;
        uint32_t place = NONE;
        for (uint32_t i = 0; i < l.outliers; ++i)
            if (slots[i] == t) place = places[i];
        if (place != NONE) {
            score = dot(traced<E>(l, place).k);
        } else if (t < group) {
            score = 0.0f;
            const int bytes = packed_len(group, l.k_bits);
            for (int c = 0; c < k_dim; ++c) {
                const float code = static_cast<float>(code_at(page + layout.k_codes + c * bytes, group, l.k_bits, t));
                score += q[c] * half_at(page + layout.k_scale, c) * code + q[c] * half_at(page + layout.k_min, c);
            }
            const float worth = static_cast<float>(1 << l.k_bits);
            for (uint32_t i = 0; i < l.boosted; ++i) {
                const int c = boosted_channel(page + layout.k_boosted, i);
                const uint32_t bit = bit_at(page + layout.k_high + i * packed_len(group, 1), group, t);
                score += q[c] * (worth * half_at(page + layout.k_scale, c)) * static_cast<float>(bit);
            }
            score = capped(score, query.softcap);
        }
        const float shrink = weigh(score);
        const int bytes = packed_len(v_dim, l.v_bits);
        for (int c = t; c < v_dim; c += THREADS) {
            const int vg = c / V_GROUP, width = min(V_GROUP, v_dim - vg * V_GROUP);
            float o = out[c] * shrink;
            for (int i = 0; i < group; ++i) {
                uint32_t at = NONE;
                for (uint32_t n = 0; n < l.outliers; ++n)
                    if (slots[n] == i) at = places[n];
                const uint8_t* codes = page + layout.v_codes + i * bytes + packed_len(vg * V_GROUP, l.v_bits);
                const float code = static_cast<float>(code_at(codes, width, l.v_bits, c - vg * V_GROUP));
                const float value = at != NONE ? to_float(traced<E>(l, at).v[c])
                                               : code * half_at(page + layout.v_scale, vg * group + i) +
                                                     half_at(page + layout.v_min, vg * group + i);
                o += p[i] * value;
            }
            out[c] = o;
        }
        __syncthreads();
    }
    float* to = partial(query, blockIdx.x, blockIdx.y, v_dim);
    if (t == 0) to[v_dim] = max;
    if (t == 0) to[v_dim + 1] = sum;
    for (int c = t; c < v_dim; c += THREADS) to[c] = out[c];
}

// Join the items of each row, in their order, in the model's basis. grid (num_heads, rows), 128 threads; `of_row`: (first
// item, end)
template <class E>
__device__ void merge(const Layer& l, const uint2* of_row, const Query& query) {
    __shared__ float shared[ROTATORS];
    const uint2 items = of_row[blockIdx.y];
    const int v_dim = l.v_dim;
    auto of = [&](uint32_t item) { return partial(query, item, blockIdx.x, v_dim); };
    float max = -INFINITY, sum = 0.0f;
    for (uint32_t i = items.x; i < items.y; ++i) max = fmaxf(max, of(i)[v_dim]);
    for (uint32_t i = items.x; i < items.y; ++i) sum += of(i)[v_dim + 1] * exp2f(of(i)[v_dim] - max);
    const float inverse = 1.0f / sum;
    E* out = static_cast<E*>(query.out) + (static_cast<size_t>(blockIdx.y) * query.num_heads + blockIdx.x) * v_dim;
    auto joined = [&](int c) {
        float o = 0.0f;
        for (uint32_t i = items.x; i < items.y; ++i) {
            const float weight = exp2f(of(i)[v_dim] - max);
            o += weight == 0.0f ? 0.0f : of(i)[c] * weight;
        }
        return o * inverse;
    };
    auto write = [&](int c, float x) { out[c] = from_float<E>(x); };
    if (l.rotate) {
        rotate_token(v_dim, shared, Turn::BACK, joined, write);
    } else {
        for (int c = threadIdx.x; c < v_dim; c += THREADS) write(c, joined(c));
    }
}

// Stored tokens of one row from token `from` on as numbers: k (kv_heads, tokens, k_dim), v (kv_heads, tokens, v_dim), values
// in the basis in which they are kept. Traced tokens are as they were. grid (tokens, kv_heads)
template <class E>
__device__ void gather(Layer l, const Row* rows, const uint32_t* tables, uint32_t r, uint32_t from, E* k, E* v) {
    const Row& row = rows[r];
    const int position = from + blockIdx.x, head = blockIdx.y, group = l.group;
    const size_t to = static_cast<size_t>(head) * gridDim.x + blockIdx.x;
    E *key = k + to * l.k_dim, *value = v + to * l.v_dim;
    const int g = position / group, t = position % group;
    Token<E> whole = {nullptr, nullptr};
    const PageLayout layout = page_layout(l);
    const uint8_t* page = nullptr;
    if (g >= static_cast<int>(row.sealed_before)) {
        whole = staged<E>(l, row.chunk_before, position - row.sealed_before * group, head);
    } else {
        const uint32_t block = tables[row.table + g];
        page = head_part(l, block, head, layout.head_bytes);
        const uint32_t place = traced_place(l, layout, page, block, head, t);
        if (place != NONE) whole = traced<E>(l, place);
    }
    for (int c = threadIdx.x; c < static_cast<int>(l.k_dim); c += blockDim.x) {
        uint32_t boosted = 0;
        while (whole.k == nullptr && boosted < l.boosted && boosted_channel(page + layout.k_boosted, boosted) != c) ++boosted;
        key[c] = whole.k != nullptr ? whole.k[c] : stored_key<E>(l, layout, page, t, c, boosted);
    }
    for (int c = threadIdx.x; c < static_cast<int>(l.v_dim); c += blockDim.x)
        value[c] = whole.v != nullptr ? whole.v[c] : stored_value<E>(l, layout, page, t, c);
}

}  // namespace ott

#define OTT_DECODE(suffix, E)                                                                                    \
    extern "C" __global__ void __launch_bounds__(128) ott_decode_##suffix(                                       \
        ott::Layer l, const ott::Row* rows, const uint32_t* tables, const ott::Item* items, ott::Query query) {  \
        ott::decode<E>(l, rows, tables, items, query);                                                           \
    }                                                                                                            \
    extern "C" __global__ void __launch_bounds__(128) ott_merge_##suffix(ott::Layer l, const uint2* of_row,      \
                                                                         ott::Query query) {                     \
        ott::merge<E>(l, of_row, query);                                                                         \
    }                                                                                                            \
    extern "C" __global__ void __launch_bounds__(128) ott_gather_##suffix(                                       \
        ott::Layer l, const ott::Row* rows, const uint32_t* tables, uint32_t row, uint32_t from, E* k, E* v) {   \
        ott::gather<E>(l, rows, tables, row, from, k, v);                                                        \
    }
OTT_DECODE(f16, __half)
OTT_DECODE(bf16, __nv_bfloat16)
OTT_DECODE(f32, float)
