"""Decode attention over a contiguous f16 cache with PyTorch's kernels: the limit that an f16 cache sets.

Beside gpu-check, on the same machine: `python3 torch_baseline.py [OUT.json]`. Layers are rotated so that no cell is read
from the L2 cache; the fastest backend of each cell counts.
"""
import json
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attention

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def cell(dim, ratio, batch, depth, heads=8):
    size = batch * heads * depth * dim * 4
    copies = max(1, min(48, (400 << 20) // size))
    layers = [torch.randn(2, batch, heads, depth, dim, device="cuda", dtype=torch.float16) for _ in range(copies)]
    q = torch.randn(batch, heads * ratio, 1, dim, device="cuda", dtype=torch.float16)
    best = None
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                run = lambda: [attention(q, k, v, enable_gqa=True) for k, v in layers]
                run()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for _ in range(max(1, 8 // copies)):
                        run()
                calls = copies * max(1, 8 // copies)
                times = []
                for _ in range(12):
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    start.record()
                    graph.replay()
                    end.record()
                    torch.cuda.synchronize()
                    times.append(start.elapsed_time(end) / 1e3 / calls)
                seconds = statistics.median(times[2:])
                if best is None or seconds < best[0]:
                    best = (seconds, name)
        except RuntimeError as error:
            print(f"{name} refuses head {dim} gqa {ratio}: {str(error).splitlines()[0][:80]}")
    return size, best


def main():
    cells = []
    for dim, ratio in [(128, 4), (128, 1), (128, 8), (64, 4), (64, 7)]:
        for batch in (1, 8, 32, 64):
            for depth in (1 << 10, 8 << 10, 32 << 10, 128 << 10):
                if batch * depth > 2 << 20:
                    continue
                size, best = cell(dim, ratio, batch, depth)
                if best is None:
                    continue
                print(f"{dim:4} {ratio:3} {batch:6} {depth:6} {best[0] * 1e6:9.1f} us {size / best[0] / 1e12:6.2f} TB/s {best[1]}")
                cells.append(dict(head_dim=dim, gqa=ratio, batch=batch, depth=depth, seconds=best[0], backend=best[1]))
                torch.cuda.empty_cache()
    if len(sys.argv) > 1:
        json.dump(cells, open(sys.argv[1], "w"))


main()
