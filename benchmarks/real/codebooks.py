"""Trained codebooks: k_means of a trained net's layers at 1 to 3 bits, alone and with a short training of the entries.

    python benchmarks/real/codebooks.py FOLDER --nets lenet300 [--seeds N] [--only PATTERN] [--columns PATTERN] [--show]

`fixed codes` trains entries alone, as Deep Compression does (Han et al. 2016, section 3); `trained` is what
`quantization_aware` of a recipe does: weights are trained, too, and may change their codes. `integers` has one trained
scale a layer instead of a codebook. All see the same data. Numbers are kept in FOLDER/codebooks-NET.json.
"""

import time
from dataclasses import replace
from functools import partial

import peers
import side_by_side
from side_by_side import Case, Way
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.program import tensors, with_tensors
from fleetpress.compression.quantization import QUANTIZERS, aware, quantize_weight
from fleetpress.compression.quantization.aware import AwareWeight
from fleetpress.compression.quantization.aware_codebooks import CodebookForward
from fleetpress.compression.scheme import QuantScheme, resolve
from fleetpress.compression.training import train

BITS = {"1 bit": 1, "2 bits": 2, "3 bits": 3}
Made = tuple[ExportedProgram, float] | str


class FixedCodes(CodebookForward):
    """Entries are trained; every weight keeps the one that it has in the beginning."""

    _first: Tensor | None = None

    def codes(self) -> Tensor:
        """Those of the beginning."""
        if self._first is None:
            self._first = super().codes()
        return self._first


def _learned(column: str) -> QuantScheme:
    return resolve(num_bits=BITS[column], learned=True)


def untrained(case: Case, column: str) -> Made:
    """The codebook with the least squared error."""
    start, state = time.process_time(), tensors(case.net.program)
    made = {
        name: quantize_weight(name, state[name], layer.axis, _learned(column), QUANTIZERS["k_means"])
        for layer, name in peers.chosen(case)
    }
    program = with_tensors(case.net.program, {name: weight.dequantize() for name, weight in made.items()})
    return program, time.process_time() - start


def trained(case: Case, column: str, *, fixed: bool = False, faster: float = 1.0) -> Made:
    """Entries after a training that begins at those; its learning rate is `faster` times that of the net."""
    aware.CodebookForward = FixedCodes if fixed else CodebookForward
    return _tuned(case, _learned(column), "k_means", faster)


def integers(case: Case, column: str) -> Made:
    """Symmetric integers with a trained scale a layer."""
    if BITS[column] == 1:
        return "integers have 2 bits at least"
    return _tuned(case, QuantScheme(num_bits=BITS[column], strategy="tensor"), "smallest_error", 1.0)


def _tuned(case: Case, scheme: QuantScheme, method: str, faster: float) -> Made:
    start, net = time.process_time(), case.net
    coded = {
        name: AwareWeight(axis=layer.axis, scheme=scheme, method=QUANTIZERS[method])
        for layer, name in peers.chosen(case)
    }
    options = replace(net.options, lr=net.options.lr * faster)
    teacher = net.program if net.loss == "distillation" else None
    made = train(
        net.program, net.tuning, options, loss=net.loss, seed=case.seed, teacher=teacher, quantized=coded
    )
    return with_tensors(net.program, made.values), time.process_time() - start


WAYS: dict[str, Way] = {
    "`k_means`": untrained,
    "`k_means`, fixed codes": partial(trained, fixed=True),
    "`k_means`, fixed codes, 3 times the rate": partial(trained, fixed=True, faster=3.0),
    "`k_means`, trained": trained,
    "`k_means`, trained, 3 times the rate": partial(trained, faster=3.0),
    "`smallest_error`, integers, trained": integers,
}


if __name__ == "__main__":
    side_by_side.run(__doc__, "codebooks", WAYS, list(BITS))
