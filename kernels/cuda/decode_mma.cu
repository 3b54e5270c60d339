// Decode attention on tensor cores: groups of 128 tokens, heads of 64 or 128 channels, f16 and bf16.
//
// A warp takes one kv head's part of a page after the other, for 4 or 8 query heads at once (one or two tiles), with a
// softmax of its own; the warps of a block join at the end, and the block that comes last joins the row. Codes never
// become numbers (codes.cuh): key scales go into q, value scales into the weights, as fixed-point factors that are made
// once per page.
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

    __device__ void init(int lane) const {
        if constexpr (BULK_COPIES) {
            if (lane < RING) barrier_init(barrier + lane);
            barrier_fence();
        }
        __syncwarp();
    }

    __device__ uint8_t* slot(int i) const { return bytes + i % RING * SLOT; }

    // `len` bytes and `more_len` from elsewhere after them: multiples of 16, as are the addresses.
    __device__ void load(int i, const uint8_t* from, uint32_t len, const uint8_t* more, uint32_t more_len, int lane) const {
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
    __device__ void commit() const {
        if constexpr (!BULK_COPIES) commit_copies();
    }

    __device__ void wait(int i) const {
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

template <class E, int DIM, int KB, int VB, int TILES>
struct Kernel {
    using K = Codes<GROUP, KB, DIM>;
    using V = Codes<DIM, VB, GROUP>;
    // Sections before the trace; those after it depend on the layer.
    static constexpr PageLayout AT{GROUP, DIM, DIM, KB, VB, 16, 0};
    // Query heads of a block.
    static constexpr int HEADS = QUERIES * TILES;
    // Queries of a tile that a lane has 4 channels of.
    static constexpr int PER = QUERIES * DIM / 128;
    // Bytes of the halves of a page: keys and, behind them, their high bits for half of the channels at most; values and
    // trace.
    static constexpr int KEYS = AT.v_codes, HIGH = DIM / 2 * (GROUP / 8 + 2), VALUES = AT.head_bytes - AT.v_codes;
    static constexpr int SLOT = (KEYS + HIGH > VALUES ? KEYS + HIGH : VALUES) + 127 & ~127;
    static constexpr int FACTORS = TILES * (K::TILE > V::TILE ? K::TILE : V::TILE);

    struct Warp {
        alignas(128) uint8_t ring[RING * SLOT];
        alignas(16) uint32_t factors[FACTORS];
        alignas(8) uint64_t barrier[RING];
    };
    struct Shared {
        Warp warp[WARPS];
        // Queries, times the scale of scores.
        alignas(16) float q[HEADS][DIM];
        // What each warp found: maximum, sum and weighted values by query.
        float max[WARPS][HEADS], sum[WARPS][HEADS];
        uint32_t last;
    };
    // Weighted values by warp, in the place of the rings; then the block's.
    static_assert(2 * sizeof(float) * HEADS * DIM <= sizeof(Warp::ring), "two results fit a ring");

    // Softmax of this thread's query of a tile (`lane % 4`): the sum is over this thread's tokens alone, `base` is
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

    // This lane's 4 channels of query `PER * (lane / (DIM / 4)) + j` of a tile.
    __device__ static void query_channels(const float (&q)[HEADS][DIM], int tile, int j, int lane, float (&x)[4]) {
        const float4 four = *reinterpret_cast<const float4*>(
            q[tile * QUERIES + lane / (DIM / 4) * PER + j] + lane % (DIM / 4) * 4);
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    }

    // Scores of a page's tokens, all but those of traced ones.
    __device__ static void scores(const uint8_t* keys, int boosted, const float (&q)[HEADS][DIM], uint32_t* factors,
                                  int lane, float (&score)[TILES][K::OUT]) {
        const int at = lane % (DIM / 4), first = lane / (DIM / 4) * PER;
        float scale[4], min[4], base[TILES], unit[TILES];
        four_halves(keys + AT.k_scale + 8 * at, scale);
        four_halves(keys + AT.k_min + 8 * at, min);
        __syncwarp();
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            float bias[PER], most[PER];
#pragma unroll
            for (int j = 0; j < PER; ++j) {
                float of[4], x[4], largest = 1e-30f;
                query_channels(q, tile, j, lane, of);
                bias[j] = 0.0f;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    x[i] = of[i] * scale[i];
                    largest = fmaxf(largest, fabsf(x[i]));
                    bias[j] = fmaf(of[i], min[i], bias[j]);
                }
                if constexpr (PER == 4) {
                    largest = warp_max_of_positive(largest);
                } else {
                    for (int h = 1; h < DIM / 4; h *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, h));
                }
                most[j] = largest;
                uint32_t high, low;
                fix(x, __fdividef(LARGEST, largest), high, low);
                factors[tile * K::TILE + 2 * (first + j) * K::STRIDE + at] = high;
                factors[tile * K::TILE + (2 * (first + j) + 1) * K::STRIDE + at] = low;
            }
            base[tile] = sum_for_query<DIM, PER>(bias, lane);
            if constexpr (PER == 4) {
                const bool upper = lane & 2, odd = lane & 1;
                unit[tile] = upper ? (odd ? most[3] : most[2]) : (odd ? most[1] : most[0]);
            } else {
                const float mine = __shfl_sync(~0u, most[0], (lane & 2) << 3);
                const float other = __shfl_sync(~0u, most[1], (lane & 2) << 3);
                unit[tile] = lane & 1 ? other : mine;
            }
            unit[tile] *= 1.0f / LARGEST;
        }
        __syncwarp();
        typename K::template Sums<TILES> result = {};
        if (boosted > 0) {
            const uint8_t* bits = keys + KEYS;
            const uint16_t* channels = reinterpret_cast<const uint16_t*>(bits + boosted * (GROUP / 8));
            K::template multiply_high<TILES>(bits, channels, boosted, factors, lane, result);
        }
        K::template multiply<TILES>(keys, factors, lane, result);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int o = 0; o < K::OUT; ++o) {
                const int* parts = result[tile][o / 2] + o % 2 * 2;
                score[tile][o] = fmaf(unfixed(parts[0], parts[1]), unit[tile] * K::weight(o), base[tile]);
            }
    }

    // Add a page's values with weights `p`.
    __device__ static void add(const uint8_t* values, float (&p)[TILES][K::OUT], uint32_t* factors, int lane,
                               Softmax (&s)[TILES]) {
        const int g = lane / 4, t = lane % 4;
        const uint8_t* scales = values + (AT.v_scale - AT.v_codes);
        const uint8_t* mins = values + (AT.v_min - AT.v_codes);
        float largest[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) largest[tile] = 1e-30f;
        // Four tokens in a row are results i, i + PLANES, ...
        constexpr int P = K::PLANES;
#pragma unroll
        for (int four = 0; four < K::OUT / 4; ++four) {
            const int first = four / P * 4 * P + four % P;
            float scale[4], min[4];
            four_halves(scales + 2 * K::element(first, g), scale);
            four_halves(mins + 2 * K::element(first, g), min);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& x = p[tile][first + i * P];
                    s[tile].base = fmaf(x, min[i], s[tile].base);
                    x *= scale[i];
                    largest[tile] = fmaxf(largest[tile], x);
                }
        }
        __syncwarp();
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            largest[tile] = max_over_groups(largest[tile]);
            const float inverse = __fdividef(LARGEST, largest[tile]);
            uint32_t* column = factors + tile * V::TILE + 2 * t * V::STRIDE;
#pragma unroll
            for (int four = 0; four < K::OUT / 4; ++four) {
                const int first = four / P * 4 * P + four % P;
                const float x[4] = {p[tile][first], p[tile][first + P], p[tile][first + 2 * P], p[tile][first + 3 * P]};
                uint32_t high, low;
                fix(x, inverse, high, low);
                column[K::element(first, g) / 4] = high;
                column[V::STRIDE + K::element(first, g) / 4] = low;
            }
        }
        __syncwarp();
        typename V::template Sums<TILES> result = {};
        V::template multiply<TILES>(values, factors, lane, result);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const float unit = largest[tile] * (1.0f / LARGEST);
#pragma unroll
            for (int o = 0; o < V::OUT; ++o) {
                const int* parts = result[tile][o / 2] + o % 2 * 2;
                s[tile].out[o] = fmaf(unfixed(parts[0], parts[1]), unit * V::weight(o), s[tile].out[o]);
            }
        }
    }

    // Every WARPS-th page of an item. All threads of the block read its queries while the first pages are on their way.
    __device__ static void pages(const Layer& l, const uint32_t* tables, const Item& item, int head, const Query& query,
                                 const E* from, int queries, Shared& shared, int warp, int lane, Softmax (&s)[TILES]) {
        const PageLayout layout(GROUP, DIM, DIM, KB, VB, l.outliers, l.boosted);
        const uint32_t high = layout.k_high, high_len = layout.head_bytes - high, values_len = high - AT.v_codes;
        const int count = (static_cast<int>(item.to - item.from) - warp + WARPS - 1) / WARPS;
        const uint32_t* blocks = tables + item.from + warp;
        Warp& mine = shared.warp[warp];
        const Ring<SLOT> ring{mine.ring, mine.barrier};
        ring.init(lane);
        static_assert(WARPS <= ITEM_FIRST, "an item knows the first page of each warp");
        auto block = [&](int page) { return page == 0 ? item.first[warp] : blocks[page * WARPS]; };
        auto part = [&](int page) { return head_part(l, block(page), head, layout.head_bytes); };
        const uint8_t* next = nullptr;
        if (count > 0) {
            next = part(0);
            ring.load(0, next, KEYS, next + high, high_len, lane);
            ring.commit();
            ring.load(1, next + AT.v_codes, values_len, nullptr, 0, lane);
            ring.commit();
        }
        if (count > 1) next = part(1);
#pragma unroll
        for (int i = 0; i < HEADS * DIM / (WARPS * 32); ++i) {
            const int j = (threadIdx.x + i * WARPS * 32) / DIM, c = (threadIdx.x + i * WARPS * 32) % DIM;
            shared.q[j][c] = j < queries ? to_float(from[j * query.head + c]) * query.scale : 0.0f;
        }
        __syncthreads();
        for (int page = 0; page < count; ++page) {
            float score[TILES][K::OUT];
            ring.wait(2 * page);
            scores(ring.slot(2 * page), l.boosted, shared.q, mine.factors, lane, score);
            __syncwarp();
            if (page + 1 < count) ring.load(2 * page + 2, next, KEYS, next + high, high_len, lane);
            ring.commit();
            ring.wait(2 * page + 1);
            const uint8_t* values = ring.slot(2 * page + 1);
            const uint8_t* slots = values + (AT.trace - AT.v_codes) + 4 * l.outliers;
            const bool has_traced = l.outliers > 0 && slots[0] != NO_SLOT;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                if (query.softcap != 0.0f)
#pragma unroll
                    for (int o = 0; o < K::OUT; ++o) score[tile][o] = capped(score[tile][o], query.softcap);
                if (has_traced) hide(slots, l.outliers, lane, score[tile]);
                float max = score[tile][0];
#pragma unroll
                for (int o = 1; o < K::OUT; ++o) max = fmaxf(max, score[tile][o]);
                max = max_over_groups(max);
                if (max > s[tile].max) s[tile].raise(max);
#pragma unroll
                for (int o = 0; o < K::OUT; ++o) {
                    score[tile][o] = exp2f(score[tile][o] - s[tile].max);
                    s[tile].sum += score[tile][o];
                }
            }
            add(values, score, mine.factors, lane, s);
            if (has_traced) {
                const uint32_t* places = l.places + (static_cast<size_t>(block(page)) * l.kv_heads + head) * l.outliers;
                for (uint32_t i = 0; i < l.outliers && slots[i] != NO_SLOT; ++i)
                    add_traced(traced<E>(l, places[i]), shared.q, query.softcap, lane, s);
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

    __device__ static void add_traced(Token<E> token, const float (&q)[HEADS][DIM], float softcap, int lane,
                                      Softmax (&s)[TILES]) {
        const int at = lane % (DIM / 4);
#pragma unroll 1
        for (int tile = 0; tile < TILES; ++tile) {
            float dot[PER] = {};
#pragma unroll
            for (int j = 0; j < PER; ++j) {
                float of[4];
                query_channels(q, tile, j, lane, of);
#pragma unroll
                for (int i = 0; i < 4; ++i) dot[j] = fmaf(of[i], to_float(token.k[4 * at + i]), dot[j]);
            }
            const float score = capped(sum_for_query<DIM, PER>(dot, lane), softcap);
            // Tiles by constant numbers, so that they stay in registers.
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                if (i != tile) continue;
                if (score > s[i].max) s[i].raise(score);
                const float p = exp2f(score - s[i].max);
                if (lane / 4 == 0) s[i].sum += p;
#pragma unroll
                for (int o = 0; o < V::OUT; ++o)
                    s[i].out[o] = fmaf(p, to_float(token.v[V::element(o, lane / 4)]), s[i].out[o]);
            }
        }
    }

    // Tokens of the window, 16 to a warp at a time, on tensor cores as numbers. Thread `t` of a quad takes 8 channels
    // of keys side by side and the tokens 2t, 2t + 1, 2t + 8, 2t + 9 of values, so that all loads are 16 bytes wide.
    // Weights are a high and a low part, as with codes. Results are those of channels 64u + 8g + i.
    static constexpr int ROWS = 16;

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
        for (int start = item.from + warp * ROWS; start < static_cast<int>(item.to); start += WARPS * ROWS) {
            const int last = min(ROWS, static_cast<int>(item.to) - start) - 1;
            const int known = start / CHUNK - static_cast<int>(item.from) / CHUNK;
            const uint32_t chunk = known < ITEM_FIRST ? item.first[known] : row.chunk[start / CHUNK];
            const Token<E> first = in_chunk<E>(l, chunk, start % CHUNK, head);
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

    // grid (items, kv_heads, ceil(queries of a kv head / HEADS)). The block that comes last joins the items of its row.
    __device__ static void run(const Layer& l, const Row* rows, const uint32_t* tables, const Item* items,
                               const uint2* of_row, const Query& query, Shared& shared) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y;
        const Item& item = items[blockIdx.x];
        const uint32_t row = item.row;
        const bool in_window = item.window;
        const uint2 range = of_row[row];
        const int ratio = query.num_heads / l.kv_heads, first = blockIdx.z * HEADS;
        const int queries = min(HEADS, ratio - first);
        const E* from = static_cast<const E*>(query.q) + row * query.row + (head * ratio + first) * query.head;
        Softmax s[TILES];
        if (in_window) {
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int i = 0; i < TILES; ++i)
                    if (i == tile)
                        window(l, rows[row], item, head, query, from + tile * QUERIES * query.head,
                               queries - tile * QUERIES, warp, lane, s[i]);
        } else {
            pages(l, tables, item, head, query, from, queries, shared, warp, lane, s);
        }
        // A page's last bytes have arrived, and all lanes have read them.
        __syncwarp();
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            for (int h = 4; h < 32; h *= 2) {
                s[tile].sum += __shfl_xor_sync(~0u, s[tile].sum, h);
                s[tile].base += __shfl_xor_sync(~0u, s[tile].base, h);
            }
            const int j = tile * QUERIES + lane % 4;
            float* mine = reinterpret_cast<float*>(shared.warp[warp].ring) + j * DIM;
#pragma unroll
            for (int o = 0; o < V::OUT; ++o)
                mine[in_window ? o / 8 * 64 + lane / 4 * 8 + o % 8 : V::element(o, lane / 4)] = s[tile].out[o] + s[tile].base;
            if (lane < QUERIES) shared.max[warp][j] = s[tile].max;
            if (lane < QUERIES) shared.sum[warp][j] = s[tile].sum;
        }
        __syncthreads();

        // This thread's numbers: consecutive channels of one query.
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
        if (range.y - range.x > 1) {
            const size_t stride = static_cast<size_t>(query.num_heads) * (DIM + PARTIAL);
            float* sums = partial(query, range.x, head * ratio + first + min(j, queries - 1), DIM);
            float* to = sums + (blockIdx.x - range.x) * stride;
            if (j < queries) {
                write(to + c, value);
                if (c == 0) *reinterpret_cast<float2*>(to + DIM) = make_float2(max, sum);
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                uint32_t* arrived = query.arrived + (row * gridDim.y + head) * gridDim.z + blockIdx.z;
                shared.last = count_in_order(arrived) == range.y - range.x - 1;
                if (shared.last) *arrived = 0;
            }
            __syncthreads();
            if (!shared.last) return;
            sum = join(sums, range.y - range.x, stride, c, value);
        }
        finish(value, sum, l.rotate != 0, queries,
               static_cast<E*>(query.out) +
                   (static_cast<size_t>(row) * query.num_heads + head * ratio + first) * DIM,
               shared);
    }

    // Results of a thread of the block.
    static constexpr int EACH = HEADS * DIM / (WARPS * 32);

    __device__ static void write(float* to, const float (&x)[EACH]) {
        if constexpr (EACH % 4 == 0) {
#pragma unroll
            for (int k = 0; k < EACH; k += 4)
                *reinterpret_cast<float4*>(to + k) = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
        } else {
            *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
        }
    }

    // As they are now, for all of the device.
    __device__ static void read(const float* from, float (&x)[EACH]) {
        if constexpr (EACH % 4 == 0) {
#pragma unroll
            for (int k = 0; k < EACH; k += 4) {
                const float4 four = __ldcg(reinterpret_cast<const float4*>(from + k));
                x[k] = four.x, x[k + 1] = four.y, x[k + 2] = four.z, x[k + 3] = four.w;
            }
        } else {
            const float2 two = __ldcg(reinterpret_cast<const float2*>(from));
            x[0] = two.x, x[1] = two.y;
        }
    }

    // Join the `count` items of a row, as many at a time as keep the memory busy: `EACH` channels of one query from `c`
    // on. Returns the sum of weights.
    static constexpr int AT_ONCE = EACH == 2 ? 16 : 48 / EACH;

    __device__ static float join(const float* sums, int count, size_t stride, int c, float (&value)[EACH]) {
        float max = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int k = 0; k < EACH; ++k) value[k] = 0.0f;
#pragma unroll 1
        for (int from = 0; from < count; from += AT_ONCE) {
            float2 found[AT_ONCE];
            float x[AT_ONCE][EACH];
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
                const float* of = sums + min(from + n, count - 1) * stride;
                found[n] = __ldcg(reinterpret_cast<const float2*>(of + DIM));
                read(of + c, x[n]);
            }
            float to = max;
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) to = fmaxf(to, found[n].x);
            const float shrink = exp2f(max - to);
            max = to;
            sum *= shrink;
#pragma unroll
            for (int k = 0; k < EACH; ++k) value[k] *= shrink;
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
                const float weight = from + n < count ? exp2f(found[n].x - max) : 0.0f;
                sum = fmaf(found[n].y, weight, sum);
#pragma unroll
                for (int k = 0; k < EACH; ++k) value[k] = fmaf(x[n][k], weight, value[k]);
            }
        }
        return sum;
    }

    // Divide by the sum of weights, turn back into the model's basis and write: thread `t` then has channel `t % DIM`.
    __device__ static void finish(const float (&value)[EACH], float sum, bool rotated, int queries, E* out,
                                  Shared& shared) {
        // What the warps found lies in the first half.
        float* all = reinterpret_cast<float*>(shared.warp[0].ring) + HEADS * DIM;
        const float inverse = __fdividef(1.0f, sum);
        float x[EACH];
#pragma unroll
        for (int k = 0; k < EACH; ++k) x[k] = value[k] * inverse;
        write(all + threadIdx.x * EACH, x);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < EACH; ++k) x[k] = all[threadIdx.x + k * ROTATORS];
        if (rotated) rotate(x, DIM, all, Turn::BACK);
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
            const int i = threadIdx.x + k * ROTATORS;
            if (i < queries * DIM) out[i] = from_float<E>(x[k]);
        }
    }
};

}  // namespace ott

// Blocks on a multiprocessor are as many as need no local memory.
#define OTT_DECODE_MMA(name, E, DIM, KB, VB, TILES)                                                              \
    extern "C" __global__ void __launch_bounds__(128, 5 - TILES - (KB == 3)) name(                         \
        ott::Layer l, const ott::Row* rows, const uint32_t* tables, const ott::Item* items, const uint2* of_row,  \
        ott::Query query) {                                                                                      \
        extern __shared__ __align__(128) uint8_t shared[];                                                       \
        using Kernel = ott::Kernel<E, DIM, KB, VB, TILES>;                                                       \
        Kernel::run(l, rows, tables, items, of_row, query, *reinterpret_cast<Kernel::Shared*>(shared));          \
    }                                                                                                            \
    /* Bytes of shared memory that a launch asks for. */                                                         \
    extern "C" __device__ uint32_t name##_shared = sizeof(ott::Kernel<E, DIM, KB, VB, TILES>::Shared);

// ott_decode_mma_<type>_<head_dim>_<key bits>_<value bits>_<query heads of a block>
#define OTT_DECODE_MMA_TILES(suffix, E, DIM, KB, VB)                                    \
    OTT_DECODE_MMA(ott_decode_mma_##suffix##_##DIM##_##KB##_##VB##_4, E, DIM, KB, VB, 1) \
    OTT_DECODE_MMA(ott_decode_mma_##suffix##_##DIM##_##KB##_##VB##_8, E, DIM, KB, VB, 2)

#define OTT_DECODE_MMA_BITS(suffix, E, DIM)    \
    OTT_DECODE_MMA_TILES(suffix, E, DIM, 2, 2) \
    OTT_DECODE_MMA_TILES(suffix, E, DIM, 3, 2) \
    OTT_DECODE_MMA_TILES(suffix, E, DIM, 3, 3) \
    OTT_DECODE_MMA_TILES(suffix, E, DIM, 4, 2) \
    OTT_DECODE_MMA_TILES(suffix, E, DIM, 4, 4)

OTT_DECODE_MMA_BITS(f16, __half, 64)
OTT_DECODE_MMA_BITS(f16, __half, 128)
OTT_DECODE_MMA_BITS(bf16, __nv_bfloat16, 64)
OTT_DECODE_MMA_BITS(bf16, __nv_bfloat16, 128)
