// Attention of a prompt's new tokens on tensor cores: groups of 128 tokens, heads of 64 or 128 channels, f16 and bf16.
//
// A block takes 128 queries of one kv head, token by token with all query heads of each, over a part of what they may look
// at; a warp takes 32 of them. Each page's codes become numbers in shared memory once for all 128 (numbers.cuh), while the
// next page's bytes are on their way; tokens in full precision are copied there. Keys of a page lie there by channels and
// are transposed where they are loaded, so that a thread decodes rows with one scale, as with values.
//
// Stored values are in another basis than new ones. A block goes over stored tokens first and turns what it has added up
// back, in registers, before it comes to new ones.
#include "attend.cuh"
#include "numbers.cuh"
#include "ptx.cuh"
#include "rotate.cuh"

namespace ott {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int GROUP = 128;
// Queries of a warp: two tiles of 16.
constexpr int QUERIES = TILE_QUERIES / WARPS;
// Tokens whose scores a warp has at once.
constexpr int STEP = 64;

template <class E, int DIM, int KB, int VB>
struct Kernel {
    using K = Section<E, GROUP, KB>;
    using V = Section<E, DIM, VB>;
    // Tokens in shared memory: a page if two blocks of a multiprocessor have room for it.
    static constexpr int TILE = LARGE_SHARED && KB + VB < 8 ? GROUP : GROUP / 2;
    // Planes of keys in a tile.
    static constexpr int COUNT = K::PLANES * TILE / GROUP;
    // Sections before the trace; those after it depend on the layer.
    static constexpr PageLayout AT{GROUP, DIM, DIM, KB, VB, 16, DIM / 2};

    struct Shared {
        alignas(128) uint8_t q[TILE_QUERIES * DIM * 2];
        // By channels from a page, else by tokens.
        alignas(128) uint8_t keys[TILE * DIM * 2];
        alignas(128) uint8_t values[TILE * DIM * 2];
        // A page as it is.
        alignas(128) uint8_t raw[AT.head_bytes];
        // Of each query, its new token.
        int token[TILE_QUERIES];
    };

    // Softmaxes of a warp's queries: of thread `4 g + t` those of g, g + 8, g + 16 and g + 24, and their channels 8 n + 2 t
    // and the next. `max` is of scores as they come from the products, `sum` of this thread's tokens alone.
    struct Softmax {
        float out[2][DIM / 8][4] = {};
        float max[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, sum[4] = {};
    };
    using Scores = float[2][STEP / 8][4];

    // What makes weights of scores.
    struct Scale {
        float scale, softcap;
        // What is left to do after a softcap.
        __device__ float factor() const { return softcap == 0.0f ? scale : 1.0f; }
    };

    // Scores of a step's tokens, from `start` of the tile on.
    template <bool PAGE>
    __device__ static void multiply(const Shared& shared, int start, int warp, int lane, Scores& score) {
#pragma unroll
        for (int k = 0; k < DIM / 16; ++k) {
            uint32_t a[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
                load_matrices(shared.q + place<DIM>(warp * QUERIES + 16 * m + lane % 16, 2 * k + lane / 16), a[m]);
#pragma unroll
            for (int n = 0; n < STEP / 16; ++n) {
                uint32_t b[4];
                if constexpr (PAGE)
                    load_transposed(shared.keys + place<TILE>(16 * k + lane % 16, start / 8 + 2 * n + lane / 16), b);
                else
                    load_matrices(shared.keys + place<DIM>(start + 16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2), b);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    mma_numbers<E>(score[m][2 * n], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
                    mma_numbers<E>(score[m][2 * n + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
                }
            }
        }
    }

    // Softcap on scores; what the products come to is in other units (`Scale::factor`). tanh x = 1 - 2 / (e^2x + 1), within
    // what f32 has near 1.
    __device__ static void cap(const Scale& scale, Scores& score) {
        const float slope = 2.0f * __fdividef(scale.scale, scale.softcap), most = scale.softcap * LOG2_E;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < STEP / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    score[m][n][i] = fmaf(__fdividef(-2.0f, exp2f(score[m][n][i] * slope) + 1.0f), most, most);
    }

    // Scores become weights, and what was added so far shrinks where a maximum is raised.
    __device__ static void weigh(const Scale& scale, Scores& score, Softmax& s) {
        const float factor = scale.factor();
        float max[4];
        bool raised = false;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            max[r] = s.max[r];
#pragma unroll
            for (int n = 0; n < STEP / 8; ++n)
                max[r] = fmaxf(max[r], fmaxf(score[r / 2][n][r % 2 * 2], score[r / 2][n][r % 2 * 2 + 1]));
            max[r] = fmaxf(max[r], __shfl_xor_sync(~0u, max[r], 1));
            max[r] = fmaxf(max[r], __shfl_xor_sync(~0u, max[r], 2));
            raised |= max[r] > s.max[r];
        }
        if (__any_sync(~0u, raised)) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float shrink = max[r] > s.max[r] ? exp2f((s.max[r] - max[r]) * factor) : 1.0f;
                s.max[r] = max[r];
                s.sum[r] *= shrink;
#pragma unroll
                for (int n = 0; n < DIM / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) s.out[r / 2][n][r % 2 * 2 + i] *= shrink;
            }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            // Nothing is seen yet: no weights, whatever is subtracted.
            const float base = s.max[r] == -INFINITY ? 0.0f : s.max[r] * factor;
#pragma unroll
            for (int n = 0; n < STEP / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& x = score[r / 2][n][r % 2 * 2 + i];
                    x = exp2f(fmaf(x, factor, -base));
                    s.sum[r] += x;
                }
        }
    }

    // Add values by weights.
    __device__ static void add(const Shared& shared, int start, int lane, const Scores& weight, Softmax& s) {
#pragma unroll
        for (int k = 0; k < STEP / 16; ++k) {
            uint32_t a[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* x = weight[m][2 * k + i / 2] + i % 2 * 2;
                    a[m][i] = two_of<E>(x[0], x[1]);
                }
#pragma unroll
            for (int n = 0; n < DIM / 16; ++n) {
                uint32_t b[4];
                load_transposed(shared.values + place<DIM>(start + 16 * k + lane % 16, 2 * n + lane / 16), b);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    mma_numbers<E>(s.out[m][2 * n], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
                    mma_numbers<E>(s.out[m][2 * n + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
                }
            }
        }
    }

    // A page's bytes, on their way.
    __device__ static void fetch(const uint8_t* part, int bytes, Shared& shared) {
        for (int at = threadIdx.x * 16; at < bytes; at += THREADS * 16) copy_16(shared.raw + at, part + at);
        commit_copies();
    }

    // A part of a page's tokens as numbers, those of planes `from ..` of keys.
    __device__ static void decode(const Layer& l, const PageLayout& layout, uint32_t block, int head, int half,
                                  Shared& shared) {
        const uint8_t* raw = shared.raw;
        K::template decode<TILE, COUNT, DIM, THREADS>(raw + AT.k_codes, raw + AT.k_scale, raw + AT.k_min, 0, half * COUNT,
                                                      shared.keys);
        V::template decode<DIM, V::PLANES, TILE, THREADS>(raw + AT.v_codes, raw + AT.v_scale, raw + AT.v_min, half * TILE, 0,
                                                          shared.values);
        if (l.boosted > 0) {
            __syncthreads();
            const uint16_t* channels = reinterpret_cast<const uint16_t*>(raw + layout.k_boosted);
            K::template decode_boosted<TILE, COUNT, THREADS>(raw + AT.k_codes, raw + AT.k_scale, raw + AT.k_min,
                                                             raw + layout.k_high, channels, l.boosted, half * COUNT, shared.keys);
        }
        const uint8_t* slots = raw + AT.trace + 4 * l.outliers;
        if (l.outliers == 0 || slots[0] == NO_SLOT) return;
        // Traced tokens in the place of what their slots hold.
        __syncthreads();
        const uint32_t* places = l.places + (static_cast<size_t>(block) * l.kv_heads + head) * l.outliers;
        for (uint32_t i = 0; i < l.outliers && slots[i] != NO_SLOT; ++i) {
            const int t = slots[i] - half * TILE, c = threadIdx.x;
            if (t < 0 || t >= TILE || c >= DIM) continue;
            const Token<E> token = traced<E>(l, places[i]);
            reinterpret_cast<E*>(shared.keys + place<TILE>(c, t / 8))[t % 8] = token.k[c];
            reinterpret_cast<E*>(shared.values + place<DIM>(t, c / 8))[c % 8] = token.v[c];
        }
    }

    // The pages `tables[from .. to]`.
    __device__ static void pages(const Layer& l, const uint32_t* tables, int from, int to, int head, const Scale& scale,
                                 int warp, int lane, Shared& shared, Softmax& s) {
        const PageLayout layout(GROUP, DIM, DIM, KB, VB, l.outliers, l.boosted);
        const int bytes = layout.head_bytes;
#pragma unroll 1
        for (int page = from; page < to; ++page) {
            const uint32_t block = tables[page];
#pragma unroll 1
            for (int half = 0; half < GROUP / TILE; ++half) {
                wait_copies<0>();
                // All bytes are there, and nobody reads the tile before.
                __syncthreads();
                decode(l, layout, block, head, half, shared);
                __syncthreads();
                if (half == GROUP / TILE - 1 && page + 1 < to)
                    fetch(head_part(l, tables[page + 1], head, bytes), bytes, shared);
#pragma unroll 1
                for (int start = 0; start < TILE; start += STEP) {
                    Scores score = {};
                    multiply<true>(shared, start, warp, lane, score);
                    if (scale.softcap != 0.0f) cap(scale, score);
                    weigh(scale, score, s);
                    add(shared, start, lane, score, s);
                }
            }
        }
    }

    // Tokens in full precision, `count` of them from `start` on; `of(i)` is one. New ones are seen by later ones only.
    template <class Of>
    __device__ static void tile(int start, int count, bool is_new, Of of, const Scale& scale, int warp, int lane,
                                Shared& shared, Softmax& s) {
        constexpr int EIGHTS = DIM / 8;
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < TILE * EIGHTS; i += THREADS) {
            const int t = i / EIGHTS, eight = i % EIGHTS;
            uint8_t *key = shared.keys + place<DIM>(t, eight), *value = shared.values + place<DIM>(t, eight);
            if (t < count) {
                const Token<E> token = of(start + t);
                copy_16(key, token.k + 8 * eight);
                copy_16(value, token.v + 8 * eight);
            } else {
                *reinterpret_cast<uint4*>(key) = *reinterpret_cast<uint4*>(value) = make_uint4(0, 0, 0, 0);
            }
        }
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        const int* token = shared.token + warp * QUERIES;
#pragma unroll 1
        for (int at = 0; at < count; at += STEP) {
            // No query of this warp sees any of them.
            if (is_new && token[QUERIES - 1] < start + at) break;
            Scores score = {};
            multiply<false>(shared, at, warp, lane, score);
            if (scale.softcap != 0.0f) cap(scale, score);
            if (at + STEP > count || (is_new && token[0] < start + at + STEP - 1)) {
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int seen = is_new ? token[lane / 4 + 8 * r] + 1 - start : count;
                    const int end = min(seen, count) - at - lane % 4 * 2;
#pragma unroll
                    for (int n = 0; n < STEP / 8; ++n)
#pragma unroll
                        for (int i = 0; i < 2; ++i)
                            if (8 * n + i >= end) score[r / 2][n][r % 2 * 2 + i] = -INFINITY;
                }
            }
            weigh(scale, score, s);
            add(shared, at, lane, score, s);
        }
    }

    // Back into the model's basis (rotate.cuh): channels of a thread, of its quad, and of its registers are mixed.
    __device__ static void turn_back(int lane, Softmax& s) {
        const float factor = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(DIM))) * headroom(DIM);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int n = 0; n < DIM / 8; ++n) {
                float(&x)[4] = s.out[m][n];
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    const float a = x[i], b = x[i + 1];
                    x[i] = a + b;
                    x[i + 1] = a - b;
                }
#pragma unroll
                for (int h = 1; h < 4; h *= 2)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float other = __shfl_xor_sync(~0u, x[i], h);
                        x[i] = lane & h ? other - x[i] : x[i] + other;
                    }
            }
#pragma unroll
            for (int h = 1; h < DIM / 8; h *= 2)
#pragma unroll
                for (int n = 0; n < DIM / 8; ++n)
                    if ((n & h) == 0)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const float a = s.out[m][n][i], b = s.out[m][n + h][i];
                            s.out[m][n][i] = a + b;
                            s.out[m][n + h][i] = a - b;
                        }
#pragma unroll
            for (int n = 0; n < DIM / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) s.out[m][n][i] *= factor;
        }
    }

    // Which queries a block has, and of what: those from `first` on of a row's kv head, `count` of them.
    struct Work {
        int row, head, split, tile, first, count, ratio;
    };

    __device__ static void load_queries(const Prompt& prompt, const Work& work, Shared& shared) {
        constexpr int EIGHTS = DIM / 8;
        shared.token[threadIdx.x] = (work.first + static_cast<int>(threadIdx.x)) / work.ratio;
        __syncthreads();
        const E* q = static_cast<const E*>(prompt.q.data) + work.row * prompt.q.row + work.head * work.ratio * prompt.q.head;
#pragma unroll 4
        for (int i = threadIdx.x; i < TILE_QUERIES * EIGHTS; i += THREADS) {
            const int j = i / EIGHTS, eight = i % EIGHTS, token = shared.token[j];
            const E* from = q + (work.first + j - token * work.ratio) * prompt.q.head + token * prompt.q.token + 8 * eight;
            *reinterpret_cast<uint4*>(shared.q + place<DIM>(j, eight)) =
                j < work.count ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
        }
    }

    // This block's part of what its queries may look at.
    __device__ static void attend(const Layer& l, const Row& row, const uint32_t* tables, const Prompt& prompt,
                                  const Work& work, int warp, int lane, Shared& shared, Softmax& s) {
        const int head = work.head, num_pages = row.sealed_before;
        // Tokens of the window, and new ones.
        const int tokens[2] = {static_cast<int>(row.past) - num_pages * GROUP, (work.first + work.count - 1) / work.ratio + 1};
        const int stored = num_pages + (tokens[0] + TILE - 1) / TILE, all = stored + (tokens[1] + TILE - 1) / TILE;
        const int splits = prompt.splits, from = all * work.split / splits, to = all * (work.split + 1) / splits;
        const Scale scale{prompt.scale, prompt.softcap};
        const uint32_t* table = tables + row.table;
        if (from < min(to, num_pages)) {
            const int bytes = PageLayout(GROUP, DIM, DIM, KB, VB, l.outliers, l.boosted).head_bytes;
            fetch(head_part(l, table[from], head, bytes), bytes, shared);
        }
        load_queries(prompt, work, shared);
        pages(l, table, from, min(to, num_pages), head, scale, warp, lane, shared, s);
        const E* k = static_cast<const E*>(prompt.k.data) + work.row * prompt.k.row + head * prompt.k.head;
        const E* v = static_cast<const E*>(prompt.v.data) + work.row * prompt.v.row + head * prompt.v.head;
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            const bool is_new = i == 1;
            const int begin = is_new ? stored : num_pages, end = is_new ? all : stored;
#pragma unroll 1
            for (int u = max(from, begin); u < min(to, end); ++u) {
                const int start = (u - begin) * TILE;
                auto of = [&](int t) {
                    return is_new ? Token<E>{k + t * prompt.k.token, v + t * prompt.v.token}
                                  : staged<E>(l, row.chunk_before, t, head);
                };
                tile(start, min(TILE, tokens[i] - start), is_new, of, scale, warp, lane, shared, s);
            }
            if (!is_new && l.rotate != 0 && from < stored) turn_back(lane, s);
        }
    }

    // Where a query's answer goes.
    __device__ static E* answer(const Layer& l, const Prompt& prompt, const Work& work, int query) {
        const int token = query / work.ratio, head = work.head * work.ratio + query % work.ratio;
        return static_cast<E*>(prompt.out) +
               ((static_cast<size_t>(work.row) * l.num_heads + head) * prompt.tokens + token) * DIM;
    }

    // The answers of a warp's queries; what is left of their sums is in `s`. Through the place of the queries.
    __device__ static void finish(const Layer& l, const Prompt& prompt, const Work& work, int warp, int lane, Shared& shared,
                                  const Softmax& s) {
        constexpr int EIGHTS = DIM / 8;
        const int mine = warp * QUERIES;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int query = mine + lane / 4 + 8 * r;
            const float inverse = query < work.count ? __fdividef(1.0f, s.sum[r]) : 0.0f;
#pragma unroll
            for (int n = 0; n < EIGHTS; ++n)
                reinterpret_cast<uint32_t*>(shared.q + place<DIM>(query, n))[lane % 4] =
                    two_of<E>(s.out[r / 2][n][r % 2 * 2] * inverse, s.out[r / 2][n][r % 2 * 2 + 1] * inverse);
        }
        __syncwarp();
        const int end = min(QUERIES, static_cast<int>(prompt.tokens) * work.ratio - work.first - mine);
#pragma unroll 1
        for (int i = lane; i < end * EIGHTS; i += 32) {
            const int query = mine + i / EIGHTS, eight = i % EIGHTS;
            *reinterpret_cast<uint4*>(answer(l, prompt, work, work.first + query) + 8 * eight) =
                *reinterpret_cast<const uint4*>(shared.q + place<DIM>(query, eight));
        }
    }

    // One part of several, for `ott_prompt_join`.
    __device__ static void keep(const Layer& l, const Prompt& prompt, const Work& work, int warp, int lane,
                                const Softmax& s) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            float* to = partial(l, prompt, work.row, work.head, work.tile, gridDim.x, work.split,
                                warp * QUERIES + lane / 4 + 8 * r);
#pragma unroll
            for (int n = 0; n < DIM / 8; ++n)
                *reinterpret_cast<float2*>(to + 8 * n + lane % 4 * 2) =
                    make_float2(s.out[r / 2][n][r % 2 * 2], s.out[r / 2][n][r % 2 * 2 + 1]);
            const float factor = Scale{prompt.scale, prompt.softcap}.factor();
            if (lane % 4 == 0) *reinterpret_cast<float2*>(to + DIM) = make_float2(s.max[r] * factor, s.sum[r]);
        }
    }

    // grid (tiles, kv_heads * splits, rows), 128 threads
    __device__ static void run(const Layer& l, const Row* rows, const uint32_t* tables, const Prompt& prompt,
                               Shared& shared) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, splits = prompt.splits;
        const Row& row = rows[blockIdx.z];
        // Later queries look at more: they begin first.
        const int tile = gridDim.x - 1 - blockIdx.x, first = tile * TILE_QUERIES, ratio = l.num_heads / l.kv_heads;
        const int count = min(TILE_QUERIES, static_cast<int>(row.fresh) * ratio - first);
        const Work work{static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y) / splits,
                        static_cast<int>(blockIdx.y) % splits, tile, first, count, ratio};
        Softmax s;
        if (count > 0) attend(l, row, tables, prompt, work, warp, lane, shared, s);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            s.sum[r] += __shfl_xor_sync(~0u, s.sum[r], 1);
            s.sum[r] += __shfl_xor_sync(~0u, s.sum[r], 2);
        }
        if (splits == 1)
            finish(l, prompt, work, warp, lane, shared, s);
        else if (count > 0)
            keep(l, prompt, work, warp, lane, s);
    }
};

}  // namespace ott

#define OTT_PROMPT_MMA(name, E, DIM, KB, VB)                                                           \
    extern "C" __global__ void __launch_bounds__(128, 2)                                               \
        name(ott::Layer l, const ott::Row* rows, const uint32_t* tables, ott::Prompt prompt) {         \
        extern __shared__ __align__(128) uint8_t shared[];                                             \
        using Kernel = ott::Kernel<E, DIM, KB, VB>;                                                    \
        Kernel::run(l, rows, tables, prompt, *reinterpret_cast<Kernel::Shared*>(shared));              \
    }                                                                                                  \
    /* Bytes of shared memory that a launch asks for. */                                               \
    extern "C" __device__ uint32_t name##_shared = sizeof(ott::Kernel<E, DIM, KB, VB>::Shared);

// ott_prompt_mma_<type>_<head_dim>_<key bits>_<value bits>
#define OTT_PROMPT_MMA_BITS(suffix, E, DIM)                          \
    OTT_PROMPT_MMA(ott_prompt_mma_##suffix##_##DIM##_2_2, E, DIM, 2, 2) \
    OTT_PROMPT_MMA(ott_prompt_mma_##suffix##_##DIM##_3_2, E, DIM, 3, 2) \
    OTT_PROMPT_MMA(ott_prompt_mma_##suffix##_##DIM##_3_3, E, DIM, 3, 3) \
    OTT_PROMPT_MMA(ott_prompt_mma_##suffix##_##DIM##_4_2, E, DIM, 4, 2) \
    OTT_PROMPT_MMA(ott_prompt_mma_##suffix##_##DIM##_4_4, E, DIM, 4, 4)

OTT_PROMPT_MMA_BITS(f16, __half, 64)
OTT_PROMPT_MMA_BITS(f16, __half, 128)
OTT_PROMPT_MMA_BITS(bf16, __nv_bfloat16, 64)
OTT_PROMPT_MMA_BITS(bf16, __nv_bfloat16, 128)
