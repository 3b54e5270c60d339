// Decode attention over a paged f16 cache with mistral.rs 0.8.1's own kernels (crate mistralrs-paged-attn), as its Rust
// code calls them: what the host does without this project. The kernels are compiled from the registry's copy of the
// crate, none of it is kept here:
//
//   nvcc -std=c++17 -O3 -arch=sm_90 -I ~/.cargo/registry/src/*/mistralrs-paged-attn-0.8.1/src/cuda \
//        -o upstream_baseline kernels/upstream_baseline.cu
//
// Beside gpu-check, on the same machine: `./upstream_baseline [OUT.json]`. Blocks of 32 tokens, layers rotated so that no
// cell is read from the L2 cache, graphs of calls, median of 11.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "pagedattention.cuh"

constexpr int HEADS = 8, BLOCK = 32, PARTITION = 512, RUNS = 11;

// Some numbers between -1 and 1.
__global__ void fill(__half* x, size_t n) {
    for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
        uint32_t h = static_cast<uint32_t>(i) * 2654435761u;
        h ^= h >> 15, h *= 2246822519u, h ^= h >> 13;
        x[i] = __float2half(static_cast<float>(h >> 8) / (1 << 23) - 1.0f);
    }
}

template <class T>
static T* device(size_t n) {
    T* p = nullptr;
    return cudaMalloc(&p, n * sizeof(T)) == cudaSuccess ? p : nullptr;
}

// Seconds of a call, or less than 0 if it fails.
static double cell(int dim, int ratio, int batch, int depth) {
    const int heads = HEADS * ratio, blocks_per_row = (depth + BLOCK - 1) / BLOCK, blocks = batch * blocks_per_row;
    const size_t half = size_t(blocks) * HEADS * BLOCK * dim;
    const int copies = std::max<size_t>(1, std::min<size_t>(48, (size_t{400} << 20) / (4 * half)));
    const int partitions = (depth + PARTITION - 1) / PARTITION;
    std::vector<__half*> layers(2 * copies);
    std::vector<void*> all;
    auto keep = [&](auto* p) { return all.push_back(p), p; };
    for (auto& layer : layers) {
        layer = keep(device<__half>(half));
        fill<<<1024, 256>>>(layer, half);
    }
    auto* q = keep(device<__half>(size_t(batch) * heads * dim));
    auto* out = keep(device<__half>(size_t(batch) * heads * dim));
    fill<<<64, 256>>>(q, size_t(batch) * heads * dim);
    auto* sums = keep(device<float>(size_t(batch) * heads * partitions));
    auto* logits = keep(device<float>(size_t(batch) * heads * partitions));
    auto* parts = keep(device<__half>(size_t(batch) * heads * partitions * dim));
    auto* tables = keep(device<uint32_t>(blocks));
    auto* lens = keep(device<uint32_t>(batch));
    std::vector<uint32_t> ids(blocks), depths(batch, depth);
    for (int i = 0; i < blocks; ++i) ids[i] = i;
    cudaMemcpy(tables, ids.data(), blocks * sizeof(uint32_t), cudaMemcpyHostToDevice);
    cudaMemcpy(lens, depths.data(), batch * sizeof(uint32_t), cudaMemcpyHostToDevice);
    cudaStream_t stream;
    cudaStreamCreate(&stream);
    const float scale = 1.0f / sqrtf(dim);
    auto call = [&](int i) {
        __half *k = layers[2 * i], *v = layers[2 * i + 1];
        // backend/paged_attention.rs
        if (partitions == 1 || batch * heads > 512)
            paged_attention_v1_launcher<uint16_t, uint16_t, vllm::Fp8KVCacheDataType::kAuto, BLOCK>(
                out, q, k, v, nullptr, HEADS, scale, 1.0f, tables, lens, depth, batch, heads, dim, blocks_per_row,
                heads * dim, HEADS * BLOCK * dim, BLOCK * dim, stream, nullptr, nullptr, nullptr);
        else
            paged_attention_v2_launcher<uint16_t, uint16_t, vllm::Fp8KVCacheDataType::kAuto, BLOCK>(
                out, sums, logits, parts, q, k, v, nullptr, HEADS, scale, 1.0f, tables, lens, depth, batch, heads, dim,
                blocks_per_row, heads * dim, HEADS * BLOCK * dim, BLOCK * dim, stream, nullptr, nullptr, nullptr);
    };
    cudaEvent_t start, end;
    cudaEventCreate(&start), cudaEventCreate(&end);
    cudaDeviceSynchronize();
    cudaGetLastError();
    call(0);
    cudaStreamSynchronize(stream);
    double seconds = -1;
    if (cudaGetLastError() == cudaSuccess) {
        const int repeats = std::max(1, 8 / copies);
        cudaGraph_t graph;
        cudaGraphExec_t runnable;
        cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
        for (int r = 0; r < repeats; ++r)
            for (int i = 0; i < copies; ++i) call(i);
        cudaStreamEndCapture(stream, &graph);
        cudaGraphInstantiate(&runnable, graph, 0);
        std::vector<float> times;
        double spent = 0;
        for (int run = 0; run < RUNS + 2 && (spent < 1500 || times.size() < 3); ++run) {
            float ms;
            cudaEventRecord(start, stream);
            cudaGraphLaunch(runnable, stream);
            cudaEventRecord(end, stream);
            cudaEventSynchronize(end);
            cudaEventElapsedTime(&ms, start, end);
            spent += ms;
            if (run >= 2 || spent > 500) times.push_back(ms);
        }
        std::sort(times.begin(), times.end());
        if (cudaGetLastError() == cudaSuccess) seconds = times[times.size() / 2] / 1e3 / (repeats * copies);
        cudaGraphExecDestroy(runnable);
        cudaGraphDestroy(graph);
    }
    for (void* p : all) cudaFree(p);
    cudaStreamDestroy(stream);
    return seconds;
}

int main(int count, char** arguments) {
    FILE* file = count > 1 ? fopen(arguments[1], "w") : nullptr;
    const char* between = "[";
    const int kinds[][2] = {{128, 4}, {128, 1}, {128, 8}, {64, 4}, {64, 7}};
    for (auto [dim, ratio] : kinds)
        for (int batch : {1, 8, 32, 64})
            for (int depth : {1 << 10, 8 << 10, 32 << 10, 128 << 10}) {
                if (int64_t{batch} * depth > 2 << 20) continue;
                const double seconds = cell(dim, ratio, batch, depth);
                if (seconds < 0)
                    printf("%4d %3d %6d %6d    fails\n", dim, ratio, batch, depth);
                else
                    printf("%4d %3d %6d %6d %9.1f us\n", dim, ratio, batch, depth, seconds * 1e6);
                fflush(stdout);
                if (file != nullptr && seconds >= 0)
                    fprintf(file, "%s{\"head_dim\":%d,\"gqa\":%d,\"batch\":%d,\"depth\":%d,\"seconds\":%.9f}", between, dim,
                            ratio, batch, depth, seconds);
                if (seconds >= 0) between = ",\n";
            }
    if (file != nullptr) fputs("]\n", file), fclose(file);
    return 0;
}
