"""Wanda and SparseGPT beside those of llm-compressor: the same weight, the same inputs.

    pip install --no-deps --target FOLDER llmcompressor==0.14.0.1 loguru==0.7.3
    python benchmarks/sparsity_peer.py FOLDER

One layer of 256 units and 512 inputs that depend on each other. For each method and amount: the share of weights that
both zero or both keep, the zeros of each, and the relative squared error of the layer's outputs under each. Only
llm-compressor's two files are loaded, which need transformers and loguru: the package itself brings far more.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fleetpress.compression.layers import layers
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors
from fleetpress.compression.sparsity.zero_layers import zero_layers

sys.path.insert(0, str(Path(__file__).parent))
from markdown_table import table

UNITS, INPUTS, SAMPLES = 256, 512, 2048


def loaded(folder: Path, name: str) -> ModuleType:
    """One of llm-compressor's files as a module."""
    path = folder / "llmcompressor/modifiers/pruning" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(folder: Path, layer: nn.Linear, x: Tensor, options: dict[str, Any]) -> Tensor:
    """The weight that llm-compressor makes."""
    kept, group = (int(part) for part in options.get("pattern", "0:0").split(":"))
    amount = {"sparsity": options.get("sparsity", 0.5), "prune_n": group - kept, "prune_m": group}
    if options["method"] == "wanda":
        file = loaded(folder, "wanda/wanda_sparsify.py")
        sums, _ = file.accumulate_row_scalars(x, layer, file.make_empty_row_scalars(layer), 0)
        return torch.as_tensor(file.sparsify_weight(layer, {layer: sums}, **amount)).detach()
    file = loaded(folder, "sparsegpt/sgpt_sparsify.py")
    hessian, _ = file.accumulate_hessian(x, layer, file.make_empty_hessian(layer), 0)
    solver = {"block_size": 128, "dampening_frac": 0.01, "preserve_sparsity_mask": False}
    _, weight = file.sparsify_weight(layer, {layer: hessian}, **amount, **solver)
    return torch.as_tensor(weight).detach()


def main() -> None:
    """Print one line a method and amount."""
    folder = Path(sys.argv[1])
    sys.path.append(str(folder))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = nn.Linear(INPUTS, UNITS)
    mix = torch.randn(INPUTS, INPUTS) / INPUTS**0.5 + torch.eye(INPUTS)
    x = torch.randn(SAMPLES, INPUTS) @ mix * (torch.rand(INPUTS) * 3 + 0.1)
    program = torch.export.export(layer, (x,))
    observed = calibrate(program, {"inputs": x}, SAMPLES).weights
    weight = layer.weight.detach()
    rows = []
    with torch.no_grad():
        for method in ("wanda", "sparsegpt"):
            for key, amount in (("sparsity", 0.5), ("sparsity", 0.8), ("pattern", "2:4")):
                options = {"method": method, key: amount}
                made = zero_layers(layers(program), tensors(program), options, observed)
                mine, peer = made.weights["weight"].values, theirs(folder, layer, x, options)
                same = ((mine == 0) == (peer == 0)).double().mean()
                total = (x @ weight.T).square().sum()
                errors = [float((x @ (other - weight).T).square().sum() / total) for other in (mine, peer)]
                zeros = [f"{int((other == 0).sum()):,}" for other in (mine, peer)]
                apart = float((mine - peer).abs().max())
                rows.append(
                    [
                        f"{method} {amount}",
                        f"{same:.4%}",
                        *zeros,
                        *(f"{e:.5f}" for e in errors),
                        f"{apart:.1e}",
                    ]
                )
    head = ["method", "same places", "zeros", "theirs", "output error", "theirs", "largest difference"]
    table(head, rows)


if __name__ == "__main__":
    main()
