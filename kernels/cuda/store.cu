// Store the new tokens that stay in the window. Those that leave it at once are sealed from where they are (seal.cu),
// which must run before this: a chunk that seal reads may be given to this step's window.
#include "cache.cuh"

namespace ott {

// grid (tokens of the longest row, kv_heads, rows), a block copies one token of one head
template <class E>
__device__ void store(Layer l, const Row* rows, Fresh k, Fresh v) {
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
        fits &= fabsf(to_float(key[c])) < 65520.0f;
    }
    for (int c = threadIdx.x; c < static_cast<int>(l.v_dim); c += blockDim.x) {
        const_cast<E*>(to.v)[c] = value[c];
        fits &= fabsf(to_float(value[c])) < 65520.0f;
    }
    // Its group would fail when it is sealed: say so now.
    if (!fits) *l.status = 1;
}

}  // namespace ott

#define OTT_STORE(name, E)                                                                                     \
    extern "C" __global__ void __launch_bounds__(128)                                                          \
        name(ott::Layer l, const ott::Row* rows, ott::Fresh k, ott::Fresh v) {                                 \
        ott::store<E>(l, rows, k, v);                                                                          \
    }
OTT_STORE(ott_store_f16, __half)
OTT_STORE(ott_store_bf16, __nv_bfloat16)
OTT_STORE(ott_store_f32, float)
