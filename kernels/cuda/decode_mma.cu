// Decode attention on tensor cores: groups of 128 tokens, heads of 64 or 128 channels, f16 and bf16.
//
// A warp takes one kv head's part of a page after the other, for 4 query heads at once, with a softmax of its own; the
// warps of a block join at the end, and `ott_merge` joins blocks. Codes never become numbers (codes.cuh): key scales go
// into q, value scales into the weights, as fixed-point factors that are made once per page.
//
// Bytes come as half pages (keys; values and trace) into two places in shared memory: one is on its way while the
// other is worked on. Many warps hide the rest.
#include "attend.cuh"
#include "codes.cuh"
#include "ptx.cuh"
#include "rotate.cuh"

namespace ott {

constexpr int WARPS = 4;
constexpr int RING = 2;
constexpr int GROUP = 128;

// A ring of byte ranges on their way into shared memory, of one warp.
template <int SLOT>
struct Ring {
    uint8_t* bytes;
    uint64_t* barrier;

    __device__ void init(int lane) {
        if constexpr (BULK_COPIES) {
            if (lane < RING) barrier_init(barrier + lane);
            barrier_fence();
        }
        __syncwarp();
    }

    __device__ uint8_t* slot(int i) const { return bytes + i % RING * SLOT; }

    // `len` bytes and `more_len` from elsewhere after them: multiples of 16, as are the addresses.
    __device__ void load(int i, const uint8_t* from, uint32_t len, const uint8_t* more, uint32_t more_len, int lane) {
        if constexpr (BULK_COPIES) {
            if (lane != 0) return;
            barrier_expect(barrier + i % RING, len + more_len);
            copy_bulk(slot(i), from, len, barrier + i % RING);
            if (more_len > 0) copy_bulk(slot(i) + len, more, more_len, barrier + i % RING);
        } else {
            for (uint32_t at = lane * 16; at < len; at += 32 * 16) copy_16(slot(i) + at, from + at);
            for (uint32_t at = lane * 16; at < more_len; at += 32 * 16) copy_16(slot(i) + len + at, more + at);
        }
    }

    // Nothing to load: keeps the count of groups.
    __device__ void commit() {
        if constexpr (!BULK_COPIES) commit_copies();
    }

    __device__ void wait(int i) {
        if constexpr (BULK_COPIES) {
            barrier_wait(barrier + i % RING, i / RING & 1);
        } else {
            wait_copies<RING - 1>();
            __syncwarp();
        }
    }
};

// Sums over the lanes that share queries; each thread gets that of its query `lane % 4`. Lane `l` has 4 channels of
// queries `PER * (l / (DIM / 4)) ..`.
template <int DIM, int PER>
__device__ inline float sum_for_query(const float (&x)[PER], int lane) {
    float s;
    if constexpr (PER == 4) {
        const bool upper = lane & 2, odd = lane & 1;
        const float a = (upper ? x[2] : x[0]) + __shfl_xor_sync(~0u, upper ? x[0] : x[2], 2);
        const float b = (upper ? x[3] : x[1]) + __shfl_xor_sync(~0u, upper ? x[1] : x[3], 2);
        s = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 1);
        for (int h = 4; h < 32; h *= 2) s += __shfl_xor_sync(~0u, s, h);
    } else {
        const bool odd = lane & 1;
        s = (odd ? x[1] : x[0]) + __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
        for (int h = 2; h < 16; h *= 2) s += __shfl_xor_sync(~0u, s, h);
        s = __shfl_sync(~0u, s, (lane & 2) << 3 | (lane & 1));
    }
    return s;
}

__device__ inline float max_over_groups(float x) {
    for (int h = 4; h < 32; h *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, h));
    return x;
}

// Two numbers in a register.
template <class E>
__device__ inline uint32_t pair_of(E a, E b) {
    return static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&a)) |
           static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&b)) << 16;
}

__device__ inline void four_halves(const uint8_t* at, float (&x)[4]) {
    const uint2 raw = *reinterpret_cast<const uint2*>(at);
    const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
    const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
    x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
}

template <class E, int DIM, int KB, int VB>
struct Kernel {
    using K = Codes<GROUP, KB, DIM>;
    using V = Codes<DIM, VB, GROUP>;
    // Sections before the trace; those after it depend on the layer.
    static constexpr PageLayout AT{GROUP, DIM, DIM, KB, VB, 16, 0};
    // Most key channels with a third bit.
    static constexpr int BOOSTED = KB == 2 ? DIM / 2 : 0;
    // Queries that a lane has 4 channels of.
    static constexpr int PER = QUERIES * DIM / 128;
    // Bytes of the halves of a page: keys and, behind them, third bits; values and trace.
    static constexpr int KEYS = AT.v_codes, HIGH = BOOSTED * (GROUP / 8 + 2), VALUES = AT.head_bytes - AT.v_codes;
    static constexpr int SLOT = (KEYS + HIGH > VALUES ? KEYS + HIGH : VALUES) + 127 & ~127;
    static constexpr int FACTORS = 8 * (K::STRIDE > V::STRIDE ? K::STRIDE : V::STRIDE);

    struct Warp {
        alignas(128) uint8_t ring[RING * SLOT];
        alignas(16) uint32_t factors[FACTORS];
        alignas(8) uint64_t barrier[RING];
    };
    struct Shared {
        Warp warp[WARPS];
        // What each warp found: maximum, sum and weighted values by query.
        float max[WARPS][QUERIES], sum[WARPS][QUERIES];
        uint32_t last;
    };
    // Weighted values by warp, in the place of the rings.
    static_assert(sizeof(float) * QUERIES * DIM <= sizeof(Warp::ring), "a warp's result fits its ring");

    // Softmax of this thread's query (`lane % 4`): the sum is over this thread's tokens alone, `base` is
    // the weighted sum of value mins, `out` are this thread's channels.
    struct Softmax {
        float max = -INFINITY, sum = 0.0f, base = 0.0f;
        float out[V::OUT] = {};

        __device__ void raise(float to) {
            const float shrink = exp2f(max - to);
            max = to;
            sum *= shrink;
            base *= shrink;
#pragma unroll
            for (int o = 0; o < V::OUT; ++o) out[o] *= shrink;
        }
    };

    // Scores of a page's tokens, all but those of traced ones.
    __device__ static void scores(const uint8_t* keys, int boosted, const float (&q)[PER][4], uint32_t* factors,
                                  int lane, float (&score)[K::OUT]) {
        const int at = lane % (DIM / 4), first = lane / (DIM / 4) * PER;
        float scale[4], min[4], bias[PER], inverse[PER];
        four_halves(keys + AT.k_scale + 8 * at, scale);
        four_halves(keys + AT.k_min + 8 * at, min);
        __syncwarp();
#pragma unroll
        for (int j = 0; j < PER; ++j) {
            float x[4], largest = 1e-30f;
            bias[j] = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                x[i] = q[j][i] * scale[i];
                largest = fmaxf(largest, fabsf(x[i]));
                bias[j] = fmaf(q[j][i], min[i], bias[j]);
            }
            if constexpr (PER == 4) {
                largest = warp_max_of_positive(largest);
            } else {
                for (int h = 1; h < DIM / 4; h *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, h));
            }
            inverse[j] = largest;
            uint32_t high, low;
            fix(x, __fdividef(LARGEST, largest), high, low);
            factors[2 * (first + j) * K::STRIDE + at] = high;
            factors[(2 * (first + j) + 1) * K::STRIDE + at] = low;
        }
        __syncwarp();
        const float base = sum_for_query<DIM, PER>(bias, lane);
        float unit;
        if constexpr (PER == 4) {
            const bool upper = lane & 2, odd = lane & 1;
            unit = upper ? (odd ? inverse[3] : inverse[2]) : (odd ? inverse[1] : inverse[0]);
        } else {
            const float mine = __shfl_sync(~0u, inverse[0], (lane & 2) << 3), other = __shfl_sync(~0u, inverse[1], (lane & 2) << 3);
            unit = lane & 1 ? other : mine;
        }
        unit *= 1.0f / LARGEST;
        int result[K::OUT / 2][4] = {};
        if (BOOSTED > 0 && boosted > 0) {
            const uint8_t* bits = keys + KEYS;
            const uint16_t* channels = reinterpret_cast<const uint16_t*>(bits + boosted * (GROUP / 8));
            K::multiply_high(bits, channels, boosted, factors, lane, result);
        }
        K::multiply(keys, factors, lane, result);
#pragma unroll
        for (int o = 0; o < K::OUT; ++o)
            score[o] = fmaf(unfixed(result[o / 2][o % 2 * 2], result[o / 2][o % 2 * 2 + 1]), unit * K::weight(o), base);
    }

    // Add a page's values with weights `p`.
    __device__ static void add(const uint8_t* values, float (&p)[K::OUT], uint32_t* factors, int lane, Softmax& s) {
        const int g = lane / 4, t = lane % 4;
        const uint8_t* scales = values + (AT.v_scale - AT.v_codes);
        const uint8_t* mins = values + (AT.v_min - AT.v_codes);
        float largest = 1e-30f;
        // Four tokens in a row are results i, i + PLANES, ...
        constexpr int P = K::PLANES;
#pragma unroll
        for (int four = 0; four < K::OUT / 4; ++four) {
            const int first = four / P * 4 * P + four % P;
            float scale[4], min[4];
            four_halves(scales + 2 * K::element(first, g), scale);
            four_halves(mins + 2 * K::element(first, g), min);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& x = p[first + i * P];
                s.base = fmaf(x, min[i], s.base);
                x *= scale[i];
                largest = fmaxf(largest, x);
            }
        }
        largest = max_over_groups(largest);
        const float inverse = __fdividef(LARGEST, largest);
        __syncwarp();
#pragma unroll
        for (int four = 0; four < K::OUT / 4; ++four) {
            const int first = four / P * 4 * P + four % P;
            const float x[4] = {p[first], p[first + P], p[first + 2 * P], p[first + 3 * P]};
            uint32_t high, low;
            fix(x, inverse, high, low);
            factors[2 * t * V::STRIDE + K::element(first, g) / 4] = high;
            factors[(2 * t + 1) * V::STRIDE + K::element(first, g) / 4] = low;
        }
        __syncwarp();
        int result[V::OUT / 2][4] = {};
        V::multiply(values, factors, lane, result);
        const float unit = largest * (1.0f / LARGEST);
#pragma unroll
        for (int o = 0; o < V::OUT; ++o)
            s.out[o] =
                fmaf(unfixed(result[o / 2][o % 2 * 2], result[o / 2][o % 2 * 2 + 1]), unit * V::weight(o), s.out[o]);
    }

    // Every WARPS-th page of an item.
    __device__ static void pages(const Layer& l, const uint32_t* tables, const Item& item, int head, float softcap,
                                 const float (&q)[PER][4], Warp& shared, int warp, int lane, Softmax& s) {
        const PageLayout layout(GROUP, DIM, DIM, KB, VB, l.outliers, l.boosted);
        const uint32_t high = layout.k_high, high_len = layout.head_bytes - high, values_len = high - AT.v_codes;
        const int count = (static_cast<int>(item.to - item.from) - warp + WARPS - 1) / WARPS;
        Ring<SLOT> ring{shared.ring, shared.barrier};
        ring.init(lane);
        auto part = [&](int page) { return head_part(l, tables[item.from + warp + page * WARPS], head, layout.head_bytes); };
        const uint8_t* next = count > 0 ? part(0) : nullptr;
        if (count > 0) {
            ring.load(0, next, KEYS, next + high, high_len, lane);
            ring.commit();
            ring.load(1, next + AT.v_codes, values_len, nullptr, 0, lane);
            ring.commit();
        }
        if (count > 1) next = part(1);
        for (int page = 0; page < count; ++page) {
            float score[K::OUT];
            ring.wait(2 * page);
            scores(ring.slot(2 * page), l.boosted, q, shared.factors, lane, score);
            __syncwarp();
            if (page + 1 < count) ring.load(2 * page + 2, next, KEYS, next + high, high_len, lane);
            ring.commit();
            ring.wait(2 * page + 1);
            const uint8_t* values = ring.slot(2 * page + 1);
            const uint8_t* slots = values + (AT.trace - AT.v_codes) + 4 * l.outliers;
            if (softcap != 0.0f)
#pragma unroll
                for (int o = 0; o < K::OUT; ++o) score[o] = capped(score[o], softcap);
            const bool has_traced = l.outliers > 0 && slots[0] != NO_SLOT;
            if (has_traced) hide(slots, l.outliers, lane, score);
            float max = score[0];
#pragma unroll
            for (int o = 1; o < K::OUT; ++o) max = fmaxf(max, score[o]);
            max = max_over_groups(max);
            if (max > s.max) s.raise(max);
#pragma unroll
            for (int o = 0; o < K::OUT; ++o) {
                score[o] = exp2f(score[o] - s.max);
                s.sum += score[o];
            }
            add(values, score, shared.factors, lane, s);
            if (has_traced) {
                const uint32_t block = tables[item.from + warp + page * WARPS];
                const uint32_t* places = l.places + (static_cast<size_t>(block) * l.kv_heads + head) * l.outliers;
                for (uint32_t i = 0; i < l.outliers && slots[i] != NO_SLOT; ++i)
                    add_traced(traced<E>(l, places[i]), q, softcap, lane, s);
            }
            __syncwarp();
            if (page + 1 < count) ring.load(2 * page + 3, next + AT.v_codes, values_len, nullptr, 0, lane);
            ring.commit();
            if (page + 2 < count) next = part(page + 2);
        }
    }

    // What a traced token's slot holds has no weight.
    __device__ static void hide(const uint8_t* slots, uint32_t outliers, int lane, float (&score)[K::OUT]) {
        for (uint32_t i = 0; i < outliers; ++i)
#pragma unroll
            for (int o = 0; o < K::OUT; ++o)
                if (slots[i] == K::element(o, lane / 4)) score[o] = -INFINITY;
    }

    __device__ static void add_traced(Token<E> token, const float (&q)[PER][4], float softcap, int lane, Softmax& s) {
        const int at = lane % (DIM / 4);
        float dot[PER] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < PER; ++j) dot[j] = fmaf(q[j][i], to_float(token.k[4 * at + i]), dot[j]);
        const float score = capped(sum_for_query<DIM, PER>(dot, lane), softcap);
        if (score > s.max) s.raise(score);
        const float p = exp2f(score - s.max);
        if (lane / 4 == 0) s.sum += p;
#pragma unroll
        for (int o = 0; o < V::OUT; ++o) s.out[o] = fmaf(p, to_float(token.v[V::element(o, lane / 4)]), s.out[o]);
    }

    // Tokens of the window, 16 to a warp at a time, on tensor cores as numbers. Thread `t` of a quad takes 8 channels
    // of keys side by side and the tokens 2t, 2t + 1, 2t + 8, 2t + 9 of values, so that all loads are 16 bytes wide.
    // Weights are a high and a low part, as with codes. Results are those of channels 64u + 8g + i.
    static constexpr int TILE = 16;

    __device__ static void window(const Layer& l, const Row& row, const Item& item, int head, const Query& query,
                                  const E* from, int queries, int warp, int lane, Softmax& s) {
        const int g = lane / 4, t = lane % 4;
        uint32_t q[DIM / 32][4] = {};
        if (g % 2 == 0 && g / 2 < queries) {
#pragma unroll
            for (int i = 0; i < DIM / 32; ++i)
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const E* two = from + g / 2 * query.head + 32 * i + 8 * t + 2 * k;
                    q[i][k] = pair_of(two[0], two[1]);
                }
        }
        for (int start = item.from + warp * TILE; start < static_cast<int>(item.to); start += WARPS * TILE) {
            const int last = min(TILE, static_cast<int>(item.to) - start) - 1;
            const Token<E> first = staged<E>(l, row.chunk, start, head);
            uint4 key[DIM / 32][2], value[DIM / 64][4];
#pragma unroll
            for (int i = 0; i < DIM / 32; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    key[i][h] = *reinterpret_cast<const uint4*>(first.k + min(g + 8 * h, last) * DIM + 32 * i + 8 * t);
#pragma unroll
            for (int u = 0; u < DIM / 64; ++u)
#pragma unroll
                for (int h = 0; h < 4; ++h) {
                    const int token = min(2 * t + h % 2 + h / 2 * 8, last);
                    value[u][h] = *reinterpret_cast<const uint4*>(first.v + token * DIM + 64 * u + 8 * g);
                }
            float c[4] = {};
#pragma unroll
            for (int i = 0; i < DIM / 32; ++i) {
                mma_numbers<E>(c, key[i][0].x, key[i][1].x, key[i][0].y, key[i][1].y, q[i][0], q[i][1]);
                mma_numbers<E>(c, key[i][0].z, key[i][1].z, key[i][0].w, key[i][1].w, q[i][2], q[i][3]);
            }
            // This thread's query, tokens g and g + 8.
            const float low = g <= last ? capped(c[0] * query.scale, query.softcap) : -INFINITY;
            const float high = g + 8 <= last ? capped(c[2] * query.scale, query.softcap) : -INFINITY;
            const float max = max_over_groups(fmaxf(low, high));
            if (max > s.max) s.raise(max);
            const float p[2] = {exp2f(low - s.max), exp2f(high - s.max)};
            s.sum += p[0] + p[1];
            uint32_t b[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float x = __shfl_sync(~0u, p[h], 8 * t + g / 2), y = __shfl_sync(~0u, p[h], 8 * t + 4 + g / 2);
                const float x_high = to_float(from_float<E>(x)), y_high = to_float(from_float<E>(y));
                b[h] = g % 2 ? pair_of(from_float<E>(x - x_high), from_float<E>(y - y_high))
                             : pair_of(from_float<E>(x), from_float<E>(y));
            }
#pragma unroll
            for (int u = 0; u < DIM / 64; ++u)
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    const uint32_t x[4] = {(&value[u][0].x)[w], (&value[u][1].x)[w], (&value[u][2].x)[w],
                                           (&value[u][3].x)[w]};
                    float out[4] = {};
                    mma_numbers<E>(out, __byte_perm(x[0], x[1], 0x5410), __byte_perm(x[0], x[1], 0x7632),
                                  __byte_perm(x[2], x[3], 0x5410), __byte_perm(x[2], x[3], 0x7632), b[0], b[1]);
                    s.out[8 * u + 2 * w] += out[0] + out[1];
                    s.out[8 * u + 2 * w + 1] += out[2] + out[3];
                }
        }
    }

    // grid (items, kv_heads, ceil(queries of a kv head / 4)). The block that comes last joins the items of its row.
    __device__ static void run(const Layer& l, const Row* rows, const uint32_t* tables, const Item* items,
                               const uint2* of_row, const Query& query, Shared& shared) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y;
        const Item item = items[blockIdx.x];
        const int ratio = query.num_heads / l.kv_heads, first = blockIdx.z * QUERIES;
        const int queries = min(QUERIES, ratio - first);
        const E* from = static_cast<const E*>(query.q) + item.row * query.row + (head * ratio + first) * query.head;
        Softmax s;
        if (item.window) {
            window(l, rows[item.row], item, head, query, from, queries, warp, lane, s);
        } else {
            float q[PER][4];
#pragma unroll
            for (int j = 0; j < PER; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int of = lane / (DIM / 4) * PER + j, c = lane % (DIM / 4) * 4 + i;
                    q[j][i] = of < queries ? to_float(from[of * query.head + c]) * query.scale : 0.0f;
                }
            pages(l, tables, item, head, query.softcap, q, shared.warp[warp], warp, lane, s);
        }
        for (int h = 4; h < 32; h *= 2) {
            s.sum += __shfl_xor_sync(~0u, s.sum, h);
            s.base += __shfl_xor_sync(~0u, s.base, h);
        }
        // A page's last bytes have arrived, and all lanes have read them.
        __syncwarp();
        float* mine = reinterpret_cast<float*>(shared.warp[warp].ring) + lane % 4 * DIM;
#pragma unroll
        for (int o = 0; o < V::OUT; ++o)
            mine[item.window ? o / 8 * 64 + lane / 4 * 8 + o % 8 : V::element(o, lane / 4)] = s.out[o] + s.base;
        if (lane < QUERIES) shared.max[warp][lane] = s.max;
        if (lane < QUERIES) shared.sum[warp][lane] = s.sum;
        __syncthreads();

        // This thread's numbers: consecutive channels of one query.
        const uint2 range = of_row[item.row];
        const bool alone = range.y - range.x == 1;
        const int j = threadIdx.x * EACH / DIM, c = threadIdx.x * EACH % DIM;
        float max = shared.max[0][j], sum = 0.0f, value[EACH] = {};
        for (int w = 1; w < WARPS; ++w) max = fmaxf(max, shared.max[w][j]);
        for (int w = 0; w < WARPS; ++w) {
            const float weight = exp2f(shared.max[w][j] - max);
            const float* of = reinterpret_cast<const float*>(shared.warp[w].ring) + threadIdx.x * EACH;
            sum += shared.sum[w][j] * weight;
#pragma unroll
            for (int k = 0; k < EACH; ++k) value[k] = fmaf(of[k], weight, value[k]);
        }
        const size_t stride = static_cast<size_t>(query.num_heads) * (DIM + PARTIAL);
        float* sums = partial(query, range.x, head * ratio + first, DIM);
        if (!alone) {
            float* to = sums + (blockIdx.x - range.x) * stride + j * (DIM + PARTIAL);
            if (j < queries) {
                write(to + c, value);
                if (c == 0) to[DIM] = max;
                if (c == 0) to[DIM + 1] = sum;
            }
            __threadfence();
            __syncthreads();
            uint32_t* arrived = query.arrived + (item.row * gridDim.y + head) * gridDim.z + blockIdx.z;
            if (threadIdx.x == 0) {
                shared.last = atomicAdd(arrived, 1) == range.y - range.x - 1;
                if (shared.last) *arrived = 0;
            }
            __syncthreads();
            if (!shared.last) return;
            __threadfence();
            sum = join(sums, range.y - range.x, stride, queries, j, c, shared, warp, lane, value);
        }
        finish(value, sum, l.rotate != 0, queries,
               static_cast<E*>(query.out) +
                   (static_cast<size_t>(item.row) * query.num_heads + head * ratio + first) * DIM,
               shared);
    }

    // Results of a thread of the block.
    static constexpr int EACH = QUERIES * DIM / (WARPS * 32);

    __device__ static void write(float* to, const float (&x)[EACH]) {
        if constexpr (EACH == 4)
            *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
        else
            *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
    }

    // As they are now, for all of the device.
    __device__ static void read(const float* from, float (&x)[EACH]) {
        if constexpr (EACH == 4) {
            const float4 four = __ldcg(reinterpret_cast<const float4*>(from));
            x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
        } else {
            const float2 two = __ldcg(reinterpret_cast<const float2*>(from));
            x[0] = two.x, x[1] = two.y;
        }
    }

    // Join `count` items of a row: a warp weighs one query's items, then each thread adds up `EACH` channels of query `j`,
    // from `c` on. Returns the sum of weights.
    __device__ static float join(const float* sums, int count, size_t stride, int queries, int j, int c, Shared& shared,
                                 int warp, int lane, float (&value)[EACH]) {
        float* weights = reinterpret_cast<float*>(shared.warp[0].ring);
        if (warp < queries) {
            const float* of = sums + warp * (DIM + PARTIAL) + DIM;
            float max = -INFINITY, sum = 0.0f;
            for (int i = lane; i < count; i += 32) max = fmaxf(max, __ldcg(of + i * stride));
            for (int h = 1; h < 32; h *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, h));
            for (int i = lane; i < count; i += 32) {
                const float weight = exp2f(__ldcg(of + i * stride) - max);
                sum += __ldcg(of + i * stride + 1) * weight;
                weights[i * QUERIES + warp] = weight;
            }
            for (int h = 1; h < 32; h *= 2) sum += __shfl_xor_sync(~0u, sum, h);
            if (lane == 0) shared.sum[0][warp] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < EACH; ++k) value[k] = 0.0f;
        if (j >= queries) return 1.0f;
        // Many loads on their way at once.
        const float* of = sums + j * (DIM + PARTIAL) + c;
#pragma unroll 8
        for (int n = 0; n < count; ++n) {
            float x[EACH];
            read(of + n * stride, x);
#pragma unroll
            for (int k = 0; k < EACH; ++k) value[k] = fmaf(weights[n * QUERIES + j], x[k], value[k]);
        }
        return shared.sum[0][j];
    }

    // Divide by the sum of weights, turn back into the model's basis and write: thread `t` then has channel `t % DIM`.
    __device__ static void finish(const float (&value)[EACH], float sum, bool rotated, int queries, E* out,
                                  Shared& shared) {
        // Neither weights nor what the warps found lie here.
        float* all = reinterpret_cast<float*>(shared.warp[1].ring) + QUERIES * DIM;
        static_assert(2 * sizeof(float) * QUERIES * DIM <= sizeof(Warp::ring), "results fit beside those of a warp");
        const float inverse = __fdividef(1.0f, sum);
        float x[EACH];
#pragma unroll
        for (int k = 0; k < EACH; ++k) x[k] = value[k] * inverse;
        write(all + threadIdx.x * EACH, x);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < EACH; ++k) x[k] = all[threadIdx.x + k * ROTATORS];
        if (rotated) rotate(x, DIM, all);
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
            const int i = threadIdx.x + k * ROTATORS;
            if (i < queries * DIM) out[i] = from_float<E>(x[k]);
        }
    }
};

}  // namespace ott

#define OTT_DECODE_MMA(name, E, DIM, KB, VB)                                                                     \
    extern "C" __global__ void __launch_bounds__(128, KB == 3 ? 3 : 4) name(                                                  \
        ott::Layer l, const ott::Row* rows, const uint32_t* tables, const ott::Item* items, const uint2* of_row,  \
        ott::Query query) {                                                                                      \
        extern __shared__ __align__(128) uint8_t shared[];                                                       \
        using Kernel = ott::Kernel<E, DIM, KB, VB>;                                                              \
        Kernel::run(l, rows, tables, items, of_row, query, *reinterpret_cast<Kernel::Shared*>(shared));                  \
    }                                                                                                            \
    /* Bytes of shared memory that a launch asks for. */                                                         \
    extern "C" __device__ uint32_t name##_shared = sizeof(ott::Kernel<E, DIM, KB, VB>::Shared);

#define OTT_DECODE_MMA_BITS(suffix, E, DIM)                          \
    OTT_DECODE_MMA(ott_decode_mma_##suffix##_##DIM##_2_2, E, DIM, 2, 2) \
    OTT_DECODE_MMA(ott_decode_mma_##suffix##_##DIM##_3_2, E, DIM, 3, 2) \
    OTT_DECODE_MMA(ott_decode_mma_##suffix##_##DIM##_3_3, E, DIM, 3, 3) \
    OTT_DECODE_MMA(ott_decode_mma_##suffix##_##DIM##_4_2, E, DIM, 4, 2) \
    OTT_DECODE_MMA(ott_decode_mma_##suffix##_##DIM##_4_4, E, DIM, 4, 4)

OTT_DECODE_MMA_BITS(f16, __half, 64)
OTT_DECODE_MMA_BITS(f16, __half, 128)
OTT_DECODE_MMA_BITS(bf16, __nv_bfloat16, 64)
OTT_DECODE_MMA_BITS(bf16, __nv_bfloat16, 128)
