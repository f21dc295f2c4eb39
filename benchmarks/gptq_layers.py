"""GPTQ of single layers: CPU seconds after the Gram matrix, and the error of the outputs, beside llm-compressor.

    python benchmarks/gptq_layers.py PEER_PYTHON [--pairs N] [--shapes ROWSxCOLUMNS ...]

PEER_PYTHON is the interpreter of an environment as benchmarks/checkpoints/peer_requirements.txt describes it. Both run
on one thread, in turn, on the same weights, Gram matrices and (first) scales: 4 bits, groups of 128, zero points,
activation order. Inputs are 8,192 rows (4,096 of more than 4,096 columns) that are correlated and of uneven size. The
seconds of the peer leave out its search for scales; ours are given without it and with it (the method `gptq`). The
error is that of the outputs as a share of the outputs, in squares. The first two shapes are those of MiniLM. Of more
than 4,096 columns the method is also measured on products in blocks, as of rows that are too long for all of them.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from markdown_table import table
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from fleetpress.compression.calibration import NARROW_COLUMNS, InputStatistics, WeightStatistics
from fleetpress.compression.quantization import QUANTIZERS, QuantizedWeight, affine
from fleetpress.compression.quantization.error_feedback import compensated
from fleetpress.compression.quantization.output_error import output_squares
from fleetpress.compression.scheme import resolve

SHAPES = ("384x384", "384x1536", "2048x2048", "8192x2048", "2048x8192", "1024x8192", "1024x11008")
BLOCKS = (512, 2048)
SCHEME = resolve("W4A16_ASYM")


def inputs_of(columns: int) -> Tensor:
    """Input rows that are correlated and of uneven size [rows, columns]."""
    generator = torch.Generator().manual_seed(columns)
    count = 4096 if columns > NARROW_COLUMNS else 8192
    rank = columns // 4
    mix = torch.randn(rank, columns, generator=generator) / rank**0.5
    sizes = torch.randn(columns, generator=generator).mul_(0.7).exp_()
    x = torch.randn(count, rank, generator=generator) @ mix
    return x.add_(torch.randn(count, columns, generator=generator), alpha=0.3).mul_(sizes)


def weight_of(rows: int, columns: int) -> Tensor:
    """A weight of that shape. Of a square one the seed is another, or it would be made of the numbers of the inputs."""
    generator = torch.Generator().manual_seed(rows + (rows == columns))
    return torch.randn(rows, columns, generator=generator) * 0.02


def layer(rows: int, columns: int) -> tuple[Tensor, InputStatistics]:
    """A weight, and the whole Gram matrix of its inputs."""
    x = inputs_of(columns)
    inputs = InputStatistics(
        rows=len(x),
        total=x.double().sum(0)[None],
        squares=x.double().square().sum(0)[None],
        gram=(x.T @ x)[None, None],
        range=torch.stack([x.min(), x.max()]),
    )
    return weight_of(rows, columns), inputs


def in_blocks(inputs: InputStatistics, size: int) -> InputStatistics:
    """As `calibrate` keeps them for very long rows."""
    gram = functional.pad(inputs.gram[0, 0], (0, -inputs.columns % size) * 2)
    blocks = [gram[at : at + size, at : at + size] for at in range(0, inputs.columns, size)]
    return replace(inputs, gram=torch.stack(blocks)[None])


def timed(work: Callable[[], QuantizedWeight]) -> tuple[float, Tensor]:
    """CPU seconds, and the weight."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found.dequantize()


def ways(weight: Tensor, inputs: InputStatistics) -> Iterator[tuple[str, Callable[[], QuantizedWeight]]]:
    """What is measured of ours."""
    scale, zero_point = affine.quantization_parameters(weight, SCHEME)
    yield "same scales", lambda: compensated(weight, scale, zero_point, SCHEME, inputs)
    known = {"gptq": inputs}
    if inputs.columns > NARROW_COLUMNS:
        known |= {f"gptq in blocks of {size}": in_blocks(inputs, size) for size in BLOCKS}
    for name, seen in known.items():
        yield (
            name,
            lambda seen=seen: QUANTIZERS["gptq"].quantize(weight, SCHEME, WeightStatistics(inputs=seen)),
        )


def main() -> None:
    """Print one line a layer and way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", metavar="PEER_PYTHON")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLUMNS")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    script = Path(__file__).with_name("gptq_peer.py")
    peer = subprocess.Popen(
        [chosen.peer, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert peer.stdin is not None
    assert peer.stdout is not None
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in (tuple(map(int, told.split("x"))) for told in chosen.shapes):
            weight, inputs = layer(*shape)
            scale, zero_point = affine.quantization_parameters(weight, SCHEME)
            assert zero_point is not None
            file = Path(folder, "layer.safetensors")
            save_file(
                {
                    "weight": weight,
                    "gram": inputs.gram[0, 0].contiguous(),
                    "scale": scale,
                    "zero_point": zero_point.to(torch.int16) - SCHEME.middle,
                },
                file,
            )
            theirs: list[float] = []
            ours: dict[str, list[float]] = {}
            errors: dict[str, float] = {}
            found: dict[str, Tensor] = {}
            for _ in range(chosen.pairs):
                for name, work in ways(weight, inputs):
                    seconds, found[name] = timed(work)
                    ours.setdefault(name, []).append(seconds)
                peer.stdin.write(f"{file} {SCHEME.group_size} {SCHEME.num_bits} {int(SCHEME.symmetric)}\n")
                peer.stdin.flush()
                # Its logger may say something first.
                answer = next(line for line in peer.stdout if line.startswith("{"))
                theirs.append(json.loads(answer)["seconds"])
            found["peer"] = load_file(f"{file}.peer")["weight"]
            signal = float(output_squares(weight, inputs).sum())
            errors = {
                name: float(output_squares(value - weight, inputs).sum()) / signal
                for name, value in found.items()
            }
            plain = QUANTIZERS["round_to_nearest"].quantize(weight, SCHEME).dequantize()
            nearest = float(output_squares(plain - weight, inputs).sum()) / signal
            same = float((found["same scales"] == found["peer"]).double().mean())
            middle = statistics.median(theirs)
            for name, seconds in ours.items():
                ratios = [mine / his for mine, his in zip(seconds, theirs, strict=True)]
                rows.append(
                    [
                        f"{shape[0]} x {shape[1]}, {name}",
                        f"{statistics.median(seconds):.2f}",
                        f"{middle:.2f}",
                        f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                        f"{errors[name]:.3e}",
                        f"{errors['peer']:.3e}",
                        f"{nearest:.3e}",
                        f"{same:.4f}" if name == "same scales" else "",
                    ]
                )
                print(rows[-1], flush=True)
    peer.stdin.close()
    peer.wait()
    head = ["layer", "CPU s", "peer's", "ratio", "error", "peer's", "rounded", "same weights"]
    table(head, rows)


if __name__ == "__main__":
    main()
