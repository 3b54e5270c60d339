// Store the new tokens that stay in the window. Those that leave it at once are sealed from where they are (seal.cu),
// which must run before this: a chunk that seal reads may be given to this step's window. Values are rotated on the way,
// and samples of queries are kept. Compiled without contraction: samples are the CPU's, bit for bit.
#include "rotate.cuh"
#include "sample.cuh"

namespace ott {

// grid (tokens of the longest row, kv_heads, rows), a block copies one token of one head
template <class E>
__device__ void store(Layer l, const Row* rows, Fresh q, Fresh k, Fresh v) {
    __shared__ float shared[ROTATORS];
    const Row& row = rows[blockIdx.z];
    const int head = blockIdx.y, fresh = blockIdx.x;
    const int at = static_cast<int>(row.past) + fresh - static_cast<int>(row.sealed * l.group);
    if (fresh >= static_cast<int>(row.fresh) || at < 0) return;
    const Token<E> to = staged<E>(l, row.chunk, at, head);
    const E* key = static_cast<const E*>(k.data) + blockIdx.z * k.row + head * k.head + fresh * k.token;
    const E* value = static_cast<const E*>(v.data) + blockIdx.z * v.row + head * v.head + fresh * v.token;
    bool fits = true;
    for (int c = threadIdx.x; c < static_cast<int>(l.k_dim); c += blockDim.x) {
        const_cast<E*>(to.k)[c] = key[c];
        fits &= is_storable(key[c]);
    }
    auto keep = [&](int c, E x) {
        const_cast<E*>(to.v)[c] = x;
        fits &= is_storable(x);
    };
    if (l.rotate) {
        rotate_token(
            l.v_dim, shared, Turn::IN, [&](int c) { return to_float(value[c]); },
            [&](int c, float x) { keep(c, from_float<E>(x)); });
    } else {
        for (int c = threadIdx.x; c < static_cast<int>(l.v_dim); c += blockDim.x) keep(c, value[c]);
    }
    if (l.weigh && at % SAMPLED == SAMPLED - 1) {
        E* kept = sample_in_chunk<E>(l, row.chunk[at / CHUNK], at % CHUNK, head);
        for (int c = threadIdx.x; c < static_cast<int>(l.k_dim); c += blockDim.x) {
            const Sample<E> sample = sample_of<E>(l, q, blockIdx.z, head, fresh, c);
            kept[c] = sample.mean;
            kept[l.k_dim + c] = sample.root;
        }
    }
    // Its group would fail when it is sealed: say so now.
    if (!fits) fault(l, blockIdx.z);
}

// All values of a step rotated, for those that are sealed from where they are, and back again for those that are read.
// `to`: (rows, kv_heads, tokens, v_dim). grid (tokens of the longest row, kv_heads, rows), 128 threads
template <class E>
__device__ void rotate_all(Fresh from, E* to, uint32_t v_dim, uint32_t back) {
    __shared__ float shared[ROTATORS];
    const E* x = static_cast<const E*>(from.data) + blockIdx.z * from.row + blockIdx.y * from.head +
                 blockIdx.x * from.token;
    E* y = to + ((static_cast<size_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * v_dim;
    rotate_token(
        v_dim, shared, back ? Turn::BACK : Turn::IN, [&](int c) { return to_float(x[c]); },
        [&](int c, float r) { y[c] = from_float<E>(r); });
}

}  // namespace ott

#define OTT_STORE(suffix, E)                                                                                    \
    extern "C" __global__ void __launch_bounds__(128)                                                           \
        ott_store_##suffix(ott::Layer l, const ott::Row* rows, ott::Fresh q, ott::Fresh k, ott::Fresh v) {      \
        ott::store<E>(l, rows, q, k, v);                                                                        \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(128)                                                           \
        ott_rotate_##suffix(ott::Fresh from, E* to, uint32_t v_dim, uint32_t back) {                            \
        ott::rotate_all<E>(from, to, v_dim, back);                                                              \
    }
OTT_STORE(f16, __half)
OTT_STORE(bf16, __nv_bfloat16)
OTT_STORE(f32, float)
