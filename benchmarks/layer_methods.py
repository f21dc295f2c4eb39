"""What single layers cost beside the field's libraries: statistics, search for ranges, and learned rounding.

    python benchmarks/layer_methods.py PEER_PYTHON [--pairs N] [--shapes ROWSxCOLUMNS ...] [--parts PART ...]

PEER_PYTHON is the interpreter of an environment as benchmarks/real/quantizers_peer.py describes it, for `learned` with
auto_round 0.15.1 beside them. All run on one thread, in turn, on the same weights and inputs; seconds are of CPU, and
ratios are of pairs. Parts:

statistics     Gram matrix, sums, range and histogram of 8,192 input rows in batches of 1,024 (4,096 for 8,192 columns):
               ours as `calibrate` keeps them, and with a whole Gram matrix; llm-compressor's `accumulate_hessian`; and
               `limit`, one float32 product of the same size by torch, the fastest that a library does without symmetry.
ranges         the search of `smallest_error` (26 ranges, 4 bits, groups of 128, zero points) beside
               llm-compressor's MSE observer (`memoryless_mse` as it comes: up to 20 ranges). Both errors are of
               the same rounding.
half_quadratic the whole method beside hqq's `Quantizer` with its optimizer, 4 bits, groups of 64; hqq's zero points are
               fractions.
learned        `learned_rounding`, 200 steps on the Gram matrix, beside 200 steps of auto_round's `WrapperLinear` under
               its `SignSGD` on 8 samples of 128 rows a step (it comes with 8 samples of 2,048). Errors are of outputs.
"""

import argparse
import json
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gptq_layers import SCHEME, inputs_of, weight_of
from markdown_table import table
from safetensors.torch import load_file, save_file
from torch import Tensor

from fleetpress.compression.calibration import (
    BLOCK_COLUMNS,
    NARROW_COLUMNS,
    InputStatistics,
    WeightStatistics,
)
from fleetpress.compression.input_sums import InputSums
from fleetpress.compression.quantization import QUANTIZERS, affine
from fleetpress.compression.quantization.output_error import output_squares
from fleetpress.compression.quantization.range_search import best_scales
from fleetpress.compression.scheme import resolve

SHAPES = ("1536x384", "384x1536", "2048x2048", "2048x8192")
PARTS = ("statistics", "ranges", "half_quadratic", "learned")
BATCH_ROWS = 1024
HALF = resolve("W4A16_ASYM", group_size=64)


class Peer:
    """The process of layer_methods_peer.py; `seconds` are those of one piece of work on a file of tensors."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("layer_methods_peer.py")
        self._process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self, work: str, file: Path) -> float:
        """CPU seconds of `work`; what it found lies in `<file>.peer`."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{work} {file}\n")
        stdin.flush()
        answer = next(line for line in stdout if line.startswith("{"))  # loggers may say something first
        return float(json.loads(answer)["seconds"])

    def end(self) -> None:
        self._process.communicate()


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def summed(x: Tensor, size: int) -> InputStatistics:
    """As `calibrate` does it, with the products within blocks of `size` columns."""
    sums = InputSums(size=size)
    for batch in x.split(BATCH_ROWS):
        sums.add_range(batch)
        sums.add(batch[:, None])
    found = sums.statistics("weight")
    assert found is not None
    return found


def product(x: Tensor) -> Tensor:
    """The limit: X^T X into memory that is there."""
    out = torch.zeros(x.shape[1], x.shape[1])
    for batch in x.split(BATCH_ROWS):
        out.addmm_(batch.t(), batch)
    return out


class Layer:
    """One layer, and what is measured of it."""

    def __init__(self, rows: int, columns: int, file: Path) -> None:
        self.name = f"{rows} x {columns}"
        self.weight, self.x = weight_of(rows, columns), inputs_of(columns)
        self.file = file
        save_file({"weight": self.weight, "x": self.x}, file)
        self._inputs: InputStatistics | None = None

    @property
    def inputs(self) -> InputStatistics:
        """With a whole Gram matrix, made once."""
        if self._inputs is None:
            self._inputs = summed(self.x, self.x.shape[1])
        return self._inputs

    def ours(self, part: str) -> dict[str, Callable[[], Tensor]]:
        """Ways by name; each gives what `error` takes."""
        known = WeightStatistics(inputs=self.inputs)
        if part == "statistics":
            found: dict[str, Callable[[], Tensor]] = {
                "whole": lambda: summed(self.x, self.x.shape[1]).gram,
                "limit": lambda: product(self.x),
            }
            if self.x.shape[1] > NARROW_COLUMNS:
                found["in blocks"] = lambda: summed(self.x, BLOCK_COLUMNS).gram
            return found
        if part == "ranges":
            return {"smallest_error": lambda: best_scales(self.weight, SCHEME)[0]}
        if part == "half_quadratic":
            method = QUANTIZERS["half_quadratic"]
            return {"half_quadratic": lambda: method.quantize(self.weight, HALF).dequantize()}
        method = QUANTIZERS["learned_rounding"]
        return {"learned_rounding": lambda: method.quantize(self.weight, SCHEME, known).dequantize()}

    def error(self, part: str, found: Tensor) -> float:
        """As a share: of the Gram matrix (none of one in blocks), of the weights or of the outputs in squares."""
        if part == "statistics":
            exact = self.inputs.gram[0, 0]
            if found.shape[-1] != exact.shape[-1]:
                return float("nan")
            return float((found.reshape(exact.shape) - exact).abs().max() / exact.abs().max())
        if part == "ranges":
            full, zero_point = affine.quantization_parameters(self.weight, SCHEME)
            codes = affine.quantize(self.weight, found.reshape(full.shape), zero_point, SCHEME)
            found = affine.dequantize(codes, found.reshape(full.shape), zero_point, SCHEME)
        if part == "learned":
            signal = output_squares(self.weight, self.inputs).sum()
            return float(output_squares(found - self.weight, self.inputs).sum() / signal)
        return float((found - self.weight).square().sum() / self.weight.square().sum())


def main() -> None:
    """Print one line a layer, part and way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", metavar="PEER_PYTHON")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLUMNS")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    peer = Peer(chosen.peer)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in chosen.shapes:
            layer = Layer(*map(int, shape.split("x")), Path(folder, "layer.safetensors"))
            for part in chosen.parts:
                ours: dict[str, list[float]] = {}
                theirs: list[float] = []
                found: dict[str, Tensor] = {}
                for _ in range(chosen.pairs):
                    for name, work in layer.ours(part).items():
                        seconds, found[name] = timed(work)
                        ours.setdefault(name, []).append(seconds)
                    theirs.append(peer.seconds(part, layer.file))
                his = layer.error(part, load_file(f"{layer.file}.peer")["found"])
                for name, seconds in ours.items():
                    ratios = [mine / other for mine, other in zip(seconds, theirs, strict=True)]
                    row = [f"{layer.name}, {part}, {name}"]
                    row += [f"{statistics.median(seconds):.3f}", f"{statistics.median(theirs):.3f}"]
                    row += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"]
                    error = layer.error(part, found[name])
                    row += ["" if math.isnan(error) else f"{error:.3e}", f"{his:.3e}"]
                    lines.append(row)
                    print(row, flush=True)
    peer.end()
    table(["layer, part, way", "CPU s", "peer's", "ratio", "error", "peer's"], lines)


if __name__ == "__main__":
    main()
