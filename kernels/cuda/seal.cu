// Seal the groups that leave the window: trace, quantize, give the worst key channels one more bit, then let the codes of
// a key make up for each other, where errors are weighed by queries. New values are those that `ott_rotate` has turned,
// where values are rotated. Bit for bit what the CPU's scalar code makes (docs/layout.md, "Equal bits"): compiled without
// contraction, sums in the same lanes, true divisions.
#include "sample.cuh"

namespace ott {

constexpr int LANES = 16;
constexpr int MAX_GROUP = 128;
constexpr int MAX_POOL = 16;
constexpr int CLIP_STEPS = 7;
constexpr uint32_t CLIP_BOTH = 2;
constexpr int MAX_DIM = 1024;

__device__ constexpr int align_up(int n, int to) { return (n + to - 1) / to * to; }

// Lanes 0 .. h take lanes h .. 2h: the same tree as on the CPU. `lane` of 16, all of a half warp take part.
__device__ inline float lane_sum(float x) {
    for (int h = LANES / 2; h > 0; h /= 2) x = x + __shfl_down_sync(~0u, x, h, LANES);
    return __shfl_sync(~0u, x, 0, LANES);
}

// Magnitude of a key, by one thread: 16 lanes as registers.
template <class E>
__device__ float l1_norm(const E* x, int n) {
    float lane[LANES] = {};
    int c = 0;
    for (; c + LANES <= n; c += LANES)
#pragma unroll
        for (int i = 0; i < LANES; ++i) lane[i] += fabsf(to_float(x[c + i]));
#pragma unroll
    for (int i = 0; i < LANES; ++i)
        if (c + i < n) lane[i] += fabsf(to_float(x[c + i]));
#pragma unroll
    for (int h = LANES / 2; h > 0; h /= 2)
#pragma unroll
        for (int i = 0; i < h; ++i) lane[i] += lane[i + h];
    return lane[0];
}

// Magnitudes of the groups that leave the window, a token each thread: what `trace`, whose groups follow each other, would
// wait for. `to`: (groups, kv_heads, MAX_GROUP)
// grid (kv_heads, groups), 128 threads
template <class E>
__device__ void magnitudes(const Layer& l, const Row* rows, const uint2* groups, const Fresh& k, const Fresh& v,
                           float* to) {
    const uint2 where = groups[blockIdx.y];
    const int head = blockIdx.x, t = threadIdx.x, position = where.y * l.group + t;
    if (t >= static_cast<int>(l.group)) return;
    const float magnitude = l1_norm(unsealed<E>(l, rows[where.x], k, v, where.x, head, position).k, l.k_dim);
    to[(blockIdx.y * l.kv_heads + head) * MAX_GROUP + t] = magnitude;
}

// Which tokens of each group are traced (ott-backend/src/cache/trace.rs), one block for a row's head: groups follow
// each other. Writes the trace section of each page and keeps the tokens. Groups of a step are in the order of rows.
// grid (kv_heads, rows), 128 threads; after `magnitudes`
template <class E>
__device__ void trace(Layer l, const Row* rows, const uint32_t* tables, const float* magnitudes, Fresh k, Fresh v) {
    __shared__ float magnitude[MAX_GROUP];
    __shared__ float pool[MAX_POOL], next_pool[MAX_POOL];
    __shared__ uint32_t place[MAX_POOL];
    __shared__ int displaced, extra, tracing;
    __shared__ uint8_t wins[MAX_GROUP];
    const Row& row = rows[blockIdx.y];
    const int head = blockIdx.x, t = threadIdx.x, group = l.group, n = l.outliers;
    if (n == 0 || row.sealed_before >= row.sealed) return;
    const PageLayout layout = page_layout(l);
    const uint32_t* table = tables + row.table;
    uint32_t first = 0;
    for (uint32_t r = 0; r < blockIdx.y; ++r) first += rows[r].sealed - min(rows[r].sealed, rows[r].sealed_before);

    if (row.sealed_before > 0) {
        const uint8_t* before = head_part(l, table[row.sealed_before - 1], head, layout.head_bytes) + layout.trace;
        if (t < n) pool[t] = reinterpret_cast<const float*>(before)[t];
        if (t == 0) extra = before[5 * n];
    } else {
        if (t < n) pool[t] = INFINITY;
        if (t == 0) extra = 0;
    }
    __syncthreads();
    for (uint32_t g = row.sealed_before; g < row.sealed; ++g) {
        uint8_t* page = head_part(l, table[g], head, layout.head_bytes) + layout.trace;
        uint8_t* slots = page + 4 * n;
        const size_t of_group = static_cast<size_t>(first + g - row.sealed_before) * l.kv_heads + head;
        const float mine = t < group ? magnitudes[of_group * MAX_GROUP + t] : 0.0f;
        // Padding is zero: a page is compared byte by byte.
        if (static_cast<size_t>(5 * n + 1 + t) < layout.k_high - layout.trace) page[5 * n + 1 + t] = 0;
        // Most groups have nobody who is smaller than the pool's largest member, and change nothing.
        const bool contends = t < group && (mine < pool[n - 1] || !isfinite(mine));
        if (!__syncthreads_or(extra != STOPPED && contends)) {
            if (t < n) {
                reinterpret_cast<float*>(page)[t] = pool[t];
                slots[t] = NO_SLOT;
            }
            if (t == 0) page[5 * n] = static_cast<uint8_t>(extra);
            continue;
        }
        if (t < group) magnitude[t] = mine;
        if (t == 0) displaced = 0;
        // What has no magnitude has no rank: nothing of such a group is traced, and its request ends with an error.
        const bool ranked = __syncthreads_and(t >= group || isfinite(magnitude[t]));
        // Rank among members and tokens; of equals the older is before, a member before a token.
        int rank = 0;
        for (int i = 0; i < n; ++i) rank += pool[i] <= mine;
        for (int i = 0; i < group; ++i) rank += magnitude[i] < mine || (magnitude[i] == mine && i < t);
        const bool win = t < group && rank < n;
        int member_rank = n;
        if (t < n && isfinite(pool[t])) {
            member_rank = t;
            for (int i = 0; i < group; ++i) member_rank += magnitude[i] < pool[t];
            if (member_rank >= n) atomicAdd(&displaced, 1);
        }
        __syncthreads();
        if (t == 0) {
            if (extra != STOPPED && extra + displaced > static_cast<int>(l.extra)) extra = STOPPED;
            tracing = ranked && extra != STOPPED;
            if (tracing) extra += displaced;
        }
        if (t < n) next_pool[t] = INFINITY;
        __syncthreads();
        if (t < group) wins[t] = tracing && win;
        if (tracing) {
            if (win) next_pool[rank] = mine;
            if (t < n && member_rank < n) next_pool[member_rank] = pool[t];
        }
        __syncthreads();
        if (tracing && t < n) pool[t] = next_pool[t];

        const uint32_t* places = l.places + (static_cast<size_t>(table[g]) * l.kv_heads + head) * n;
        int order = 0, count = 0;
        for (int i = 0; i < group; ++i) {
            order += wins[i] && i < t;
            count += wins[i];
        }
        if (t < n) {
            reinterpret_cast<float*>(page)[t] = pool[t];
            if (t >= count) slots[t] = NO_SLOT;
            place[t] = places[t];
        }
        if (t == 0) page[5 * n] = static_cast<uint8_t>(extra);
        __syncthreads();
        if (t < group && wins[t]) {
            slots[order] = static_cast<uint8_t>(t);
            Token<E> from = unsealed<E>(l, row, k, v, blockIdx.y, head, g * group + t);
            Token<E> to = traced<E>(l, place[order]);
            for (uint32_t c = 0; c < l.k_dim; ++c) const_cast<E*>(to.k)[c] = from.k[c];
            for (uint32_t c = 0; c < l.v_dim; ++c) const_cast<E*>(to.v)[c] = from.v[c];
        }
        __syncthreads();
    }
}

struct Affine {
    __half scale, min;
};

__device__ inline Affine affine_over(float low, float high, float levels) {
    return {__float2half_rn(__fdiv_rn(high - low, levels)), __float2half_rn(low + 0.0f)};
}

__device__ inline float code_of(float x, float scale, float min, float levels) {
    return fminf(fmaxf(rintf(__fdiv_rn(x - min, scale)), 0.0f), levels);
}

// Weighted squared error of one lane's numbers.
template <int N>
__device__ float lane_error(const float (&x)[N], uint32_t traced, int count, Affine a, float levels) {
    const float scale = __half2float(a.scale), min = __half2float(a.min);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (i >= count) break;
        const float back = scale == 0.0f ? min : code_of(x[i], scale, min, levels) * scale + min;
        const float weight = traced >> i & 1 ? 0.0f : 1.0f;
        sum += weight * ((x[i] - back) * (x[i] - back));
    }
    return sum;
}

// How codes are read back (ott-backend/src/quantize.rs, `Spread`).
enum class Spread { AS_SEARCHED, VARIANCE, GAIN };

// Scale and min that read codes back with the mean and the spread of their numbers.
template <int N>
__device__ Affine stretched(const float (&x)[N], const float (&code)[N], uint32_t traced, int count, Affine a,
                            Spread spread) {
    const auto sum = [&](auto term) {
        float lane = 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (i >= count) break;
            const float weight = traced >> i & 1 ? 0.0f : 1.0f;
            lane += weight * term(i);
        }
        return lane_sum(lane);
    };
    const float n = sum([&](int) { return 1.0f; });
    const float x_mean = __fdiv_rn(sum([&](int i) { return x[i]; }), n);
    const float code_mean = __fdiv_rn(sum([&](int i) { return code[i]; }), n);
    const float xx = sum([&](int i) { return (x[i] - x_mean) * (x[i] - x_mean); });
    const float cc = sum([&](int i) { return (code[i] - code_mean) * (code[i] - code_mean); });
    const float xc = sum([&](int i) { return (x[i] - x_mean) * (code[i] - code_mean); });
    const __half scale =
        __float2half_rn(spread == Spread::VARIANCE ? __fsqrt_rn(__fdiv_rn(xx, cc)) : __fdiv_rn(xx, xc));
    const float step = __half2float(scale);
    const __half min = __float2half_rn(x_mean - step * code_mean + 0.0f);
    const bool held = isfinite(step) && step > 0.0f && isfinite(__half2float(min));
    return held ? Affine{scale, min} : a;
}

// One group by a half warp: lane `i` holds numbers i, i + 16, ... Writes codes, returns scale and min.
__device__ Affine quantize_group(const float (&x)[MAX_GROUP / LANES], uint32_t traced, int n, int lane, int bits,
                                 bool clip, Spread spread, uint8_t* codes) {
    const float levels = static_cast<float>((1 << bits) - 1);
    const int count = (n - lane + LANES - 1) / LANES;
    float low = INFINITY, high = -INFINITY;
#pragma unroll
    for (int i = 0; i < MAX_GROUP / LANES; ++i) {
        if (i >= count) break;
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
    }
    for (int h = LANES / 2; h > 0; h /= 2) {
        low = fminf(low, __shfl_xor_sync(~0u, low, h, LANES));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, h, LANES));
    }
    Affine best = affine_over(low, high, levels);
    if (clip) {
        float least = lane_sum(lane_error(x, traced, count, best, levels));
        const float sixteenth = __fdiv_rn(high - low, 16.0f);
        for (int i = 0; i < CLIP_STEPS; ++i)
            for (int j = 0; j < CLIP_STEPS; ++j) {
                const Affine a = affine_over(low + sixteenth * static_cast<float>(i),
                                             high - sixteenth * static_cast<float>(j), levels);
                const float error = lane_sum(lane_error(x, traced, count, a, levels));
                if (error < least) {
                    least = error;
                    best = a;
                }
            }
    }
    const float scale = __half2float(best.scale), min = __half2float(best.min);
    float code[MAX_GROUP / LANES] = {};
#pragma unroll
    for (int i = 0; i < MAX_GROUP / LANES; ++i) {
        if (i >= count) break;
        code[i] = scale == 0.0f ? 0.0f : code_of(x[i], scale, min, levels);
        codes[lane + i * LANES] = static_cast<uint8_t>(code[i]);
    }
    return spread == Spread::AS_SEARCHED ? best : stretched(x, code, traced, count, best, spread);
}

// What replaces channel `c` of the traced tokens: the mean of the others, in order, within their range.
template <class Number>
__device__ float mean_of_others(const uint8_t* slots, int traced, int group, Number number) {
    float sum = 0.0f, low = INFINITY, high = -INFINITY;
    for (int t = 0, next = 0; t < group; ++t) {
        if (next < traced && slots[next] == t) {
            ++next;
            continue;
        }
        const float x = number(t);
        sum += x;
        low = fminf(low, x);
        high = fmaxf(high, x);
    }
    return fminf(fmaxf(__fdiv_rn(sum, static_cast<float>(group - traced)), low), high);
}

// What the half warps of a block know of the group that they seal.
template <class E>
struct Group {
    const Layer& l;
    const Row& row;
    const Fresh &k, &v;
    int r, head, start;
    PageLayout layout;
    uint8_t* page;
    const uint8_t* slots;
    int traced;

    __device__ Group(const Layer& l, const Row* rows, const uint32_t* tables, uint2 where, const Fresh& k,
                     const Fresh& v, int head)
        : l(l), row(rows[where.x]), k(k), v(v), r(where.x), head(head), start(where.y * l.group), layout(page_layout(l)) {
        page = head_part(l, tables[row.table + where.y], head, layout.head_bytes);
        slots = page + layout.trace + 4 * l.outliers;
        traced = 0;
        while (traced < static_cast<int>(l.outliers) && slots[traced] != NO_SLOT) ++traced;
    }

    __device__ Token<E> token(int t) const { return unsealed<E>(l, row, k, v, r, head, start + t); }

    __device__ bool is_traced(int t) const {
        for (int i = 0; i < traced; ++i)
            if (slots[i] == t) return true;
        return false;
    }

    // This lane's keys of channel `c`, and which of them are traced.
    __device__ uint32_t channel(int c, int lane, float (&x)[MAX_GROUP / LANES]) const {
        uint32_t mask = 0;
#pragma unroll
        for (int i = 0; i < MAX_GROUP / LANES; ++i) {
            const int t = lane + i * LANES;
            if (t >= static_cast<int>(l.group)) break;
            mask |= static_cast<uint32_t>(is_traced(t)) << i;
            x[i] = to_float(token(t).k[c]);
            if (!is_storable(x[i])) fault(l, r);
        }
        return mask;
    }

    // Quantize channel `c` at `bits` by a half warp, `codes` are its own: low bits, scale and min go into the page.
    __device__ void quantize_channel(int c, int lane, int bits, uint8_t* codes) const {
        float x[MAX_GROUP / LANES] = {};
        const uint32_t mask = channel(c, lane, x);
        if (traced > 0) {
            const float mean = mean_of_others(slots, traced, l.group, [&](int t) { return to_float(token(t).k[c]); });
#pragma unroll
            for (int i = 0; i < MAX_GROUP / LANES; ++i) x[i] = mask >> i & 1 ? mean : x[i];
        }
        const Spread spread = l.clip == CLIP_BOTH ? Spread::VARIANCE : Spread::AS_SEARCHED;
        const Affine a = quantize_group(x, mask, l.group, lane, bits, l.clip != 0, spread, codes);
        __syncwarp();
        const int bytes = packed_len(l.group, l.k_bits);
        for (int j = lane; j < bytes; j += LANES)
            page[layout.k_codes + c * bytes + j] = packed_byte(codes, l.group, l.k_bits, j);
        if (lane == 0) {
            reinterpret_cast<__half*>(page + layout.k_scale)[c] = a.scale;
            reinterpret_cast<__half*>(page + layout.k_min)[c] = a.min;
        }
    }
};

// Keys of a channel by one half warp, then values of a token by one half warp.
// grid (ceil((k_dim + group) / 8), kv_heads, groups), 128 threads: 8 half warps
// `groups`: (row, group of the row) of each group to seal
template <class E>
__device__ void quantize(const Layer& l, const Row* rows, const uint32_t* tables, const uint2* groups, const Fresh& k,
                         const Fresh& v) {
    __shared__ uint8_t codes[8][MAX_GROUP];
    const int half = threadIdx.x / LANES, lane = threadIdx.x % LANES, item = blockIdx.x * 8 + half;
    const Group<E> group(l, rows, tables, groups[blockIdx.z], k, v, blockIdx.y);
    uint8_t* mine = codes[half];

    // Half warps of one warp do the same: k_dim and group are multiples of 8. Each goes through all shuffles.
    if (item < static_cast<int>(l.k_dim)) {
        group.quantize_channel(item, lane, l.k_bits, mine);
    } else if (item < static_cast<int>(l.k_dim + l.group)) {
        const int t = item - l.k_dim;
        const bool out = group.is_traced(t);
        const int token_bytes = packed_len(l.v_dim, l.v_bits);
        const PageLayout& layout = group.layout;
        for (int from = 0, g = 0; from < static_cast<int>(l.v_dim); from += V_GROUP, ++g) {
            const int width = min(V_GROUP, static_cast<int>(l.v_dim) - from);
            float x[MAX_GROUP / LANES] = {};
#pragma unroll
            for (int i = 0; i < MAX_GROUP / LANES; ++i) {
                const int c = from + lane + i * LANES;
                if (lane + i * LANES >= width) break;
                const float own = to_float(group.token(t).v[c]);
                if (!is_storable(own)) fault(l, group.r);
                x[i] = out ? mean_of_others(group.slots, group.traced, l.group,
                                            [&](int u) { return to_float(group.token(u).v[c]); })
                           : own;
            }
            const Spread spread = l.clip == CLIP_BOTH ? Spread::GAIN : Spread::AS_SEARCHED;
            const Affine a = quantize_group(x, 0, width, lane, l.v_bits, l.clip == CLIP_BOTH, spread, mine);
            __syncwarp();
            uint8_t* packed = group.page + layout.v_codes + t * token_bytes + packed_len(from, l.v_bits);
            for (int j = lane; j < packed_len(width, l.v_bits); j += LANES)
                packed[j] = packed_byte(mine, width, l.v_bits, j);
            if (lane == 0) {
                reinterpret_cast<__half*>(group.page + layout.v_scale)[g * l.group + t] = a.scale;
                reinterpret_cast<__half*>(group.page + layout.v_min)[g * l.group + t] = a.min;
            }
            __syncwarp();
        }
    }
}

// What errors of the group's keys count (ott-backend/src/weigh.rs): each channel's mean query, where `mean` is given, and
// its mean square. The floor of a channel's weight, to each thread of the block; 0 if there is nothing to weigh by.
template <class E>
__device__ float weights(const Group<E>& group, const Fresh& q, float* mean, float* square) {
    const Layer& l = group.l;
    const int k_dim = l.k_dim, samples = l.group / SAMPLED;
    for (int c = threadIdx.x; c < k_dim; c += blockDim.x) {
        float means = 0.0f, squares = 0.0f;
        for (int i = 0; i < samples; ++i) {
            const int position = group.start + (i + 1) * SAMPLED - 1;
            const Sample<E> sample = unsealed_sample<E>(l, group.row, q, group.r, group.head, position, c);
            const float root = to_float(sample.root);
            means += to_float(sample.mean);
            squares += root * root;
        }
        if (mean != nullptr) mean[c] = __fdiv_rn(means, static_cast<float>(samples));
        square[c] = __fdiv_rn(squares, static_cast<float>(samples));
    }
    __syncthreads();
    float sum = 0.0f;
    for (int c = threadIdx.x % LANES; c < k_dim; c += LANES) sum += square[c];
    const float floor = __fdiv_rn(lane_sum(sum), static_cast<float>(64 * k_dim));
    return isfinite(floor) && floor > 0.0f ? floor : 0.0f;
}

// One more bit for the channels whose error at `k_bits` counts most, of equals the lower.
// grid (kv_heads, groups), BOOSTERS threads; after `quantize`
constexpr int BOOSTERS = 512;
constexpr int MAX_BOOSTED = MAX_DIM / 2;

template <class E>
__device__ void boost(const Layer& l, const Row* rows, const uint32_t* tables, const uint2* groups, const Fresh& q,
                      const Fresh& k, const Fresh& v) {
    __shared__ uint8_t codes[BOOSTERS / LANES][MAX_GROUP];
    __shared__ float error[MAX_DIM], square[MAX_DIM];
    __shared__ uint8_t wins[MAX_DIM];
    __shared__ uint16_t chosen[MAX_BOOSTED];
    const int half = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int k_dim = l.k_dim, boosted = l.boosted, high = packed_len(l.group, 1);
    const Group<E> group(l, rows, tables, groups[blockIdx.y], k, v, blockIdx.x);
    const PageLayout& layout = group.layout;
    const int count = (l.group - lane + LANES - 1) / LANES;
    const bool weighed = l.weigh && weights(group, q, nullptr, square) > 0.0f;
    // Both half warps of a warp go through all shuffles, the last of them for nothing where channels are odd.
    for (int c = half; c < align_up(k_dim, BOOSTERS / LANES); c += BOOSTERS / LANES) {
        const int channel = min(c, k_dim - 1);
        float x[MAX_GROUP / LANES] = {};
        const uint32_t mask = group.channel(channel, lane, x);
        const Affine a = {reinterpret_cast<const __half*>(group.page + layout.k_scale)[channel],
                          reinterpret_cast<const __half*>(group.page + layout.k_min)[channel]};
        float sum = lane_sum(lane_error(x, mask, count, a, static_cast<float>((1 << l.k_bits) - 1)));
        if (weighed) sum *= square[channel];
        // Of a group that cannot be sealed: its channels have ranks all the same, so that no more are chosen than there
        // are places.
        if (isnan(sum)) sum = INFINITY;
        if (lane == 0 && c < k_dim) error[c] = sum;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < k_dim; c += BOOSTERS) {
        int rank = 0;
        for (int i = 0; i < k_dim; ++i) rank += error[i] > error[c] || (error[i] == error[c] && i < c);
        wins[c] = rank < boosted;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < k_dim; c += BOOSTERS) {
        if (!wins[c]) continue;
        int place = 0;
        for (int i = 0; i < c; ++i) place += wins[i];
        chosen[place] = static_cast<uint16_t>(c);
        reinterpret_cast<uint16_t*>(group.page + layout.k_boosted)[place] = static_cast<uint16_t>(c);
    }
    __syncthreads();
    // Padding is zero: a page is compared byte by byte.
    for (size_t i = layout.k_high + boosted * high + threadIdx.x; i < layout.k_boosted; i += BOOSTERS) group.page[i] = 0;
    for (size_t i = layout.k_boosted + 2 * boosted + threadIdx.x; i < layout.head_bytes; i += BOOSTERS) group.page[i] = 0;
    for (int n = half; n < align_up(boosted, 2); n += BOOSTERS / LANES) {
        // An odd one out is made twice, alike.
        const int place = min(n, boosted - 1);
        group.quantize_channel(chosen[place], lane, l.k_bits + 1, codes[half]);
        for (int j = lane; j < high; j += LANES)
            group.page[layout.k_high + place * high + j] = packed_bits(codes[half], l.group, l.k_bits, 1, j);
        __syncwarp();
    }
}

// Channels whose codes are chosen before they are packed.
constexpr int MADE_UP = 32;

// Codes of keys once more, so that channels make up for each other's errors: boosted ones first, then the others, each in
// ascending order. Codes of traced tokens, which nobody reads, stay.
// grid (kv_heads, groups), 128 threads, each has a token; after `boost`
template <class E>
__device__ void make_up(const Layer& l, const Row* rows, const uint32_t* tables, const uint2* groups, const Fresh& q,
                        const Fresh& k, const Fresh& v) {
    __shared__ float mean[MAX_DIM], square[MAX_DIM], gain[MAX_DIM];
    __shared__ uint16_t order[MAX_DIM];
    __shared__ uint8_t codes[MADE_UP][MAX_GROUP];
    const Group<E> group(l, rows, tables, groups[blockIdx.y], k, v, blockIdx.x);
    const PageLayout& layout = group.layout;
    const int k_dim = l.k_dim, boosted = l.boosted, bits = l.k_bits, tokens = l.group, t = threadIdx.x;
    const int low = packed_len(tokens, bits), high = packed_len(tokens, 1);
    uint8_t *lows = group.page + layout.k_codes, *highs = group.page + layout.k_high;
    const float floor = weights(group, q, mean, square);
    if (floor == 0.0f) return;
    for (int c = t; c < k_dim; c += blockDim.x) {
        int before = 0;
        bool own = false;
        for (int i = 0; i < boosted; ++i) {
            const int other = boosted_channel(group.page + layout.k_boosted, i);
            before += other < c;
            own |= other == c;
        }
        order[own ? before : boosted + c - before] = static_cast<uint16_t>(c);
    }
    __syncthreads();
    if (t == 0) {
        // What later channels, the first in this loop, leave of the direction's weight.
        float left = 1.0f;
        for (int i = k_dim - 1; i >= 0; --i) {
            const float m = mean[order[i]];
            const float own = fmaxf(square[order[i]] - m * m, 0.0f) + floor;
            const float all = own + left * (m * m);
            gain[i] = __fdiv_rn(left * m, all);
            left = __fdiv_rn(left * own, all);
        }
    }
    const bool stays = t < tokens && group.is_traced(t);
    const E* key = t < tokens ? group.token(t).k : nullptr;
    // What the errors of the channels before come to.
    float sum = 0.0f;
    for (int from = 0; from < k_dim; from += MADE_UP) {
        const int width = min(MADE_UP, k_dim - from);
        __syncthreads();
        for (int n = 0; n < width && t < tokens; ++n) {
            const int place = from + n, c = order[place];
            const bool more = place < boosted;
            if (stays) {
                const uint32_t bit = more ? bit_at(highs + place * high, tokens, t) : 0;
                codes[n][t] = static_cast<uint8_t>(code_at(lows + c * low, tokens, bits, t) | bit << bits);
                continue;
            }
            const float scale = half_at(group.page + layout.k_scale, c), min = half_at(group.page + layout.k_min, c);
            const float levels = static_cast<float>((1 << (bits + more)) - 1), x = to_float(key[c]);
            const float code = scale == 0.0f ? 0.0f : code_of(x + gain[place] * sum, scale, min, levels);
            codes[n][t] = static_cast<uint8_t>(code);
            sum += mean[c] * (x - (code * scale + min));
        }
        __syncthreads();
        for (int j = t; j < width * low; j += blockDim.x)
            lows[order[from + j / low] * low + j % low] = packed_byte(codes[j / low], tokens, bits, j % low);
        for (int j = t; j < min(width, boosted - from) * high; j += blockDim.x)
            highs[from * high + j] = packed_bits(codes[j / high], tokens, bits, 1, j % high);
    }
}

}  // namespace ott

#define OTT_SEAL(suffix, E)                                                                                   \
    extern "C" __global__ void __launch_bounds__(128) ott_magnitudes_##suffix(                                \
        ott::Layer l, const ott::Row* rows, const uint2* groups, ott::Fresh k, ott::Fresh v, float* to) {     \
        ott::magnitudes<E>(l, rows, groups, k, v, to);                                                        \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) ott_trace_##suffix(                                     \
        ott::Layer l, const ott::Row* rows, const uint32_t* tables, const float* magnitudes, ott::Fresh k,    \
        ott::Fresh v) {                                                                                       \
        ott::trace<E>(l, rows, tables, magnitudes, k, v);                                                     \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) ott_quantize_##suffix(                                  \
        ott::Layer l, const ott::Row* rows, const uint32_t* tables, const uint2* groups, ott::Fresh k,        \
        ott::Fresh v) {                                                                                       \
        ott::quantize<E>(l, rows, tables, groups, k, v);                                                      \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(ott::BOOSTERS) ott_boost_##suffix(                           \
        ott::Layer l, const ott::Row* rows, const uint32_t* tables, const uint2* groups, ott::Fresh q,        \
        ott::Fresh k, ott::Fresh v) {                                                                         \
        ott::boost<E>(l, rows, tables, groups, q, k, v);                                                      \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) ott_make_up_##suffix(                                   \
        ott::Layer l, const ott::Row* rows, const uint32_t* tables, const uint2* groups, ott::Fresh q,        \
        ott::Fresh k, ott::Fresh v) {                                                                         \
        ott::make_up<E>(l, rows, tables, groups, q, k, v);                                                    \
    }
OTT_SEAL(f16, __half)
OTT_SEAL(bf16, __nv_bfloat16)
OTT_SEAL(f32, float)
