"""Every way to quantize MiniLM, at 8, 4, 3 and 2 bits: how well it still finds texts, and what its vectors lost.

    python benchmarks/real/quantizers.py FOLDER [--peer PYTHON] [--only PATTERN]
        [--settings PATTERN] [--texts N]

FOLDER is that of fetch.py. All Linear layers are quantized, embeddings are not. Calibrated on 480 paragraphs of an
encyclopedia (minilm.py's training data, 64 tokens each) and measured on 64 news texts, of which calibration sees
nothing: R@1 is the share whose first sentence (the query) lies nearest to its own rest; SQNR is that of all vectors
against those of the original, in decibels. With --peer, the interpreter of quantizers_peer.py's environment, its
methods quantize the same layers from the same statistics, and are measured by the same code.
"""

import argparse
import math
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import bench
import minilm
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.calibration import CalibrationStatistics
from fleetpress.compression.equalization import EQUALIZERS, equalize
from fleetpress.compression.layers import layers
from fleetpress.compression.modes import eval_module
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors, with_tensors
from fleetpress.compression.quantization import QUANTIZERS, affine, quantize_layer
from fleetpress.compression.quantization.bias_correction import corrected_bias
from fleetpress.compression.quantization.weight import to_rows
from fleetpress.compression.scheme import QuantScheme, resolve
from fleetpress.storage.programs import load_program

SETTINGS = {
    "8 bits": resolve("W8A16"),
    "4 bits, groups": resolve("W4A16_ASYM"),
    "4 bits": resolve("W4A16", strategy="channel"),
    "3 bits, groups": resolve("W3A16_ASYM"),
    "2 bits, groups": resolve("W2A16_ASYM"),
}
SLOW = {"learned_rounding": ("4 bits, groups", "2 bits, groups")}  # the others tell nothing new
TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Way:
    """A row of the table: a method, scales that are moved between layers before, biases that are corrected after."""

    method: str
    equalize: str | None = None
    bias_correction: bool = False

    @property
    def label(self) -> str:
        """As the table names it."""
        parts = [f"`{self.method}`"]
        parts += [f"after `{self.equalize}`"] if self.equalize else []
        return " ".join([*parts, "+ bias"] if self.bias_correction else parts)


WAYS = [
    *(Way(method=name) for name in ("round_to_nearest", "smallest_error", "half_quadratic")),
    Way(method="round_to_nearest", bias_correction=True),
    Way(method="round_to_nearest", equalize="activation_aware"),
    *(Way(method=name) for name in ("learned_rounding", "gptq", "coordinate_descent")),
    Way(method="coordinate_descent", bias_correction=True),
    Way(method="coordinate_descent", equalize="activation_aware"),
]


class Measured:
    """The texts, and the original's vectors of them."""

    def __init__(self, program: ExportedProgram, original: Path, texts: list[str], most: int) -> None:
        encode = minilm.tokenizer(original, TOKENS)
        split = [re.split(r"(?<=[.!?]) +", text) for text in texts]
        long = [sentences for sentences in split if len(sentences) >= 3][:most]
        self._texts = [sentences[0] for sentences in long] + [" ".join(rest[1:]) for rest in long]
        self._encode = encode
        self._vectors = self._embedded(program)

    def _embedded(self, program: ExportedProgram) -> Tensor:
        module = eval_module(program)
        return minilm.embedded(
            lambda ids, mask: module(input_ids=ids, attention_mask=mask), self._encode, self._texts
        )

    def of(self, program: ExportedProgram) -> str:
        """R@1 and SQNR of a program."""
        vectors = self._embedded(program)
        queries, gallery = vectors.chunk(2)
        found = (queries @ gallery.T).argmax(1) == torch.arange(len(queries))
        noise = float((vectors - self._vectors).square().sum())
        sqnr = 10 * math.log10(float(self._vectors.square().sum()) / noise) if noise else math.inf
        return f"{float(found.double().mean()):.3f} / {sqnr:.1f}"


def quantized(
    program: ExportedProgram, way: Way, scheme: QuantScheme, statistics: CalibrationStatistics
) -> ExportedProgram:
    """The program with the weights that are read back from their codes."""
    chosen = [layer for layer in layers(program) if layer.kind == "Linear"]
    if way.equalize:
        schemes = {name: scheme for layer in chosen for name in layer.weights}
        found = equalize(program, EQUALIZERS[way.equalize], schemes, statistics.weights)
        program, statistics = with_tensors(program, found.tensors), found.rescaled(statistics)
    values, known = tensors(program), statistics.weights
    made: dict[str, Tensor] = {}
    for layer in chosen:
        for name, weight in quantize_layer(layer, values, scheme, QUANTIZERS[way.method], known).items():
            made[name] = weight.dequantize()
            if way.bias_correction and layer.biases and name in known:
                bias = layer.biases[0]
                made[bias] = corrected_bias(values[bias], values[name], weight, known[name].inputs)
    return with_tensors(program, made)


def by_peer(
    program: ExportedProgram, python: str, method: str, scheme: QuantScheme, statistics: CalibrationStatistics
) -> tuple[ExportedProgram, float]:
    """The program with the weights that the peer quantized, and its CPU seconds."""
    values, axes = tensors(program), {}
    given: dict[str, Tensor] = {}
    for layer in layers(program):
        for name in layer.weights:
            if layer.kind == "Linear" and name in statistics.weights:
                axes[name] = layer.axis
                rows = to_rows(values[name].detach(), layer.axis).contiguous()
                scale, zero = affine.quantization_parameters(rows, scheme)
                signed = torch.zeros_like(scale) if zero is None else zero.float() - scheme.middle
                given |= {f"{name}|weight": rows, f"{name}|scale": scale, f"{name}|zero_point": signed}
                given[f"{name}|gram"] = statistics.weights[name].inputs.gram[0, 0].clone()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.safetensors"), Path(folder, "out.safetensors")
        save_file(given, source)
        script = Path(__file__).with_name("quantizers_peer.py")
        command = [python, str(script), str(source), str(target), method, str(scheme.num_bits)]
        options = [str(scheme.group_size or 0), str(int(scheme.symmetric))]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        made = load_file(target)
    seconds = float(made.pop("seconds"))
    plain = {name: value.t().contiguous() if axes[name] else value for name, value in made.items()}
    return with_tensors(program, plain), seconds


def rows_of(
    program: ExportedProgram,
    measured: Measured,
    statistics: CalibrationStatistics,
    *,
    settings: Mapping[str, QuantScheme],
    peer: str | None,
    only: str,
) -> Iterator[list[str]]:
    """The table, row by row."""
    for way in WAYS:
        if not re.search(only, way.label):
            continue
        cells, seconds = [], 0.0
        for name, scheme in settings.items():
            if name not in SLOW.get(way.method, settings):
                cells.append("")
                continue
            start = time.process_time()
            made = quantized(program, way, scheme, statistics)
            seconds = time.process_time() - start
            cells.append(measured.of(made))
        yield [way.label, *cells, f"{seconds:.1f}"]
    for method, label in {"gptq": "llm-compressor 0.14.0.1, GPTQ", "hqq": "hqq 0.2.8"}.items():
        if peer and re.search(only, label):
            found = [by_peer(program, peer, method, scheme, statistics) for scheme in settings.values()]
            yield [label, *(measured.of(made) for made, _ in found), f"{found[-1][1]:.1f}"]


def main() -> None:
    """Calibrate once, then print a row a method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose name matches it")
    parser.add_argument("--settings", default="", metavar="PATTERN", help="columns whose name matches it")
    parser.add_argument("--texts", type=int, default=64, metavar="N")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    folder = chosen.folder.resolve()
    os.chdir(folder)
    original = minilm.prepare(folder)
    program = load_program(Path(minilm.HOME, "models", "minilm.pt2").read_bytes())
    texts = minilm.news(folder / "packages" / "gensim" / "gensim" / "test" / "test_data")
    kept = Path(minilm.HOME, "calibration.safetensors")
    if not kept.exists():
        with np.load(Path(minilm.HOME, "data", "train.npz")) as data:
            arrays = {name: torch.from_numpy(data[name]) for name in data.files}
        save_file(calibrate(program, arrays, 32).to_tensors(), kept)
    statistics = CalibrationStatistics.from_tensors(load_file(kept))
    settings = {name: scheme for name, scheme in SETTINGS.items() if re.search(chosen.settings, name)}
    measured = Measured(program, original, texts, chosen.texts)
    print(f"the original: {measured.of(program)}", flush=True)
    head = ["R@1 / SQNR (dB)", *settings, "s"]
    rows = []
    for row in rows_of(program, measured, statistics, settings=settings, peer=chosen.peer, only=chosen.only):
        print(row, flush=True)
        rows.append(row)
    bench.table("MiniLM", head, rows)


if __name__ == "__main__":
    main()
