"""How fast round-to-nearest quantization is: the compiled kernel, tiled torch, whole-tensor torch and a plain copy.

    python benchmarks/quantize_kernel.py [rows columns]

One thread, a bfloat16 matrix (8192 x 2048 unless given), median of interleaved rounds after a warm-up. MB/s are of the
weight as stored, by seconds of CPU. The kernel does most: packed codes, scales, zero points and the sums of squares of
the errors; `tiled` and `naive` end at the codes, and `pack` is what torch needs to pack them. The ratios are
kernel / copy, kernel / (tiled and pack), tiled / naive: only they mean something on a shared machine.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fleetpress.compression import kernels
from fleetpress.compression.quantization import QUANTIZERS, quantize_weight
from fleetpress.compression.quantization.packing import pack
from fleetpress.compression.scheme import SCHEMES, QuantScheme

ROUNDS = 7


def naive(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """The formulas on whole tensors; gives the codes."""
    values = weight.float()
    groups = values.unflatten(1, (-1, scheme.group_size or weight.shape[1]))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    steps, lowest = (1 << scheme.num_bits) - 1, -scheme.middle
    if scheme.symmetric:
        scale = (torch.maximum(high, -low) / (steps / 2)).to(weight.dtype).float()
        codes = (groups / scale).clamp(lowest, scheme.middle - 1).round()
    else:
        scale = ((high - low) / steps).to(weight.dtype).float()
        zero = (lowest - low / scale).clamp(lowest, scheme.middle - 1).round()
        codes = (groups / scale + zero).clamp(lowest, scheme.middle - 1).round()
    return (codes + scheme.middle).to(torch.uint8).flatten(1)


def main() -> None:
    """Print one line a scheme."""
    torch.set_num_threads(1)
    rows, columns = (int(size) for size in sys.argv[1:3] or (8192, 2048))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    method = QUANTIZERS["round_to_nearest"]
    target = torch.empty_like(weight)
    data = weight.view(torch.uint8).numpy().reshape(-1)
    schemes = {name: SCHEMES[name] for name in ("W8A16", "W4A16", "W4A16_ASYM", "W3A16", "W2A16")}
    schemes["W4A16 g32"] = replace(SCHEMES["W4A16"], group_size=32)
    heads = ("kernel MB/s", "tiled MB/s", "naive MB/s", "copy MB/s", "pack MB/s")
    ratios = ("kernel/copy", "/tiled+pack", "tiled/naive")
    print(f"{'scheme':<12}" + "".join(f"{head:>13}" for head in (*heads, *ratios)))
    for name, scheme in schemes.items():
        codes = quantize_weight("weight", weight, 0, scheme, method).codes
        assert torch.equal(codes, naive(weight, scheme))
        made = kernels.quantize_rows(data, "BF16", (rows, columns), scheme)
        assert np.array_equal(made.packed, pack(codes, scheme.num_bits).numpy())
        ways: dict[str, Callable[[], object]] = {
            "kernel": lambda scheme=scheme: kernels.quantize_rows(data, "BF16", (rows, columns), scheme),
            "tiled": lambda scheme=scheme: quantize_weight("weight", weight, 0, scheme, method),
            "naive": lambda scheme=scheme: naive(weight, scheme),
            "copy": lambda: target.copy_(weight),
            "pack": lambda codes=codes, bits=scheme.num_bits: pack(codes, bits),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, run in ways.items():
                start = time.thread_time()
                run()
                seconds[way].append(time.thread_time() - start)
        median = {way: statistics.median(found[1:]) for way, found in seconds.items()}
        rates = "".join(f"{weight.nbytes / 1e6 / median[way]:>13.0f}" for way in ways)
        compared = (
            median["copy"] / median["kernel"],
            (median["tiled"] + median["pack"]) / median["kernel"],
            median["naive"] / median["tiled"],
        )
        print(f"{name:<12}{rates}" + "".join(f"{ratio:>12.2f}x" for ratio in compared))


if __name__ == "__main__":
    main()
