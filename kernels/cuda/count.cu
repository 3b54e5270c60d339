// What the pages of a layer hold, in numbers, for those who watch a server.
#include "cache.cuh"

// A thread takes one head's part of one of `n` pages. `out`: traced tokens, parts after which tracing has stopped, most
// places of the extra store that a part says are taken. grid (ceil(n * kv_heads / 128)), 128 threads
extern "C" __global__ void __launch_bounds__(128)
    ott_count(ott::Layer l, const uint32_t* blocks, uint32_t n, uint32_t* out) {
    const uint32_t part = blockIdx.x * blockDim.x + threadIdx.x;
    if (part >= n * l.kv_heads || l.outliers == 0) return;
    const ott::PageLayout layout = ott::page_layout(l);
    const uint8_t* trace =
        ott::head_part(l, blocks[part / l.kv_heads], part % l.kv_heads, layout.head_bytes) + layout.trace;
    uint32_t traced = 0;
    for (uint32_t i = 0; i < l.outliers; ++i) traced += trace[4 * l.outliers + i] != ott::NO_SLOT;
    const uint32_t taken = trace[5 * l.outliers];
    atomicAdd(out, traced);
    atomicAdd(out + 1, taken == ott::STOPPED);
    atomicMax(out + 2, min(taken, l.extra));
}
