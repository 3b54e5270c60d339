// The basis in which values are kept: a Hadamard matrix over blocks of channels, its own inverse, and a scale that keeps
// every channel inside f16. The order of additions is that of ott-backend/src/rotate.rs: pairs of distance 1, 2, 4, ..,
// then one product.
#pragma once
#include "cache.cuh"

namespace ott {

// Threads of a block that rotates: thread `t` has channel `t` of V_GROUP, or one that is as far in another block.
constexpr int ROTATORS = V_GROUP;

// Channels that are mixed with each other: the largest power of two that divides `dim`, at most V_GROUP.
__device__ inline int rotation_width(int dim) { return min(dim & -dim, V_GROUP); }

// Into the basis in which values are kept, or back.
enum class Turn { IN, BACK };

// The least power of two that is no smaller than the root of `width`, a power of two.
__device__ inline float headroom(int width) { return static_cast<float>(1 << (32 - __clz(width)) / 2); }

// Rotate N numbers of each thread, each with those at its place in the other threads. All threads of the block take
// part. `shared`: N * ROTATORS numbers, which no other thread uses before or after without a barrier.
template <int N>
__device__ inline void rotate(float (&x)[N], int width, float* shared, Turn turn) {
    const int t = threadIdx.x;
    for (int half = 1; half < width; half *= 2) {
        float other[N];
        if (half < 32) {
#pragma unroll
            for (int i = 0; i < N; ++i) other[i] = __shfl_xor_sync(~0u, x[i], half);
        } else {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < N; ++i) shared[i * ROTATORS + t] = x[i];
            __syncthreads();
#pragma unroll
            for (int i = 0; i < N; ++i) other[i] = shared[i * ROTATORS + (t ^ half)];
        }
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = t & half ? other[i] - x[i] : x[i] + other[i];
    }
    const float scale = turn == Turn::IN ? __fdiv_rn(1.0f, headroom(width)) : headroom(width);
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(width))) * scale;
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= factor;
}

// Numbers of one token by a block of ROTATORS threads: `read(c)` is channel c, `write(c, x)` takes the rotated one.
template <class Read, class Write>
__device__ inline void rotate_token(int dim, float* shared, Turn turn, Read read, Write write) {
    const int width = rotation_width(dim);
    for (int from = 0; from < dim; from += ROTATORS) {
        const int c = from + threadIdx.x;
        float x[1] = {c < dim ? read(c) : 0.0f};
        rotate(x, width, shared, turn);
        if (c < dim) write(c, x[0]);
        __syncthreads();
    }
}

}  // namespace ott
