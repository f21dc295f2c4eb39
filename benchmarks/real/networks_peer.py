"""The peers of quantizers.py that need a whole network, in the environment of quantizers_peer.py: AWQ and AutoRound.

    VENV/bin/python benchmarks/real/networks_peer.py < LINES

A line is IN OUT METHOD BITS GROUP_SIZE SYMMETRIC NETWORK. IN is a safetensors file with the network's tensors by name
and `calibration|<input>`; OUT gets all tensors that are others after quantization. NETWORK is `char-gpt`, or the
folder of MiniLM's checkpoint. awq is llm-compressor's modifier, which smooths where a norm (for BERT: the values of an
attention) feeds Linear layers alone. autoround is AutoRound's own tuning of one block after the other, as llm-
compressor calls it, 200 steps of 8 samples; layers outside of blocks are tuned as blocks of their own.
"""

import inspect
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from autoround_peer import Wanted, tuned, tuned_layer
from char_gpt_net import CharGpt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PretrainedConfig, PreTrainedModel


class Network(PreTrainedModel):
    """What both peers expect to be given, around any module."""

    config_class = PretrainedConfig

    def __init__(self, module: nn.Module, blocks: str, smoothed: list[tuple[str, list[str]]]) -> None:
        super().__init__(PretrainedConfig())
        self.net = module
        self.blocks, self.smoothed = blocks, smoothed

    def forward(self, **inputs: Tensor) -> Any:
        """The module's own."""
        return self.net(*inputs.values())


class Encoder(nn.Module):
    """MiniLM under the names of the program."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.bert = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states."""
        hidden: Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def network(name: str, state: dict[str, Tensor]) -> Network:
    """The module with its tensors, the name of its blocks, and what can be smoothed in it."""
    if name == "char-gpt":
        symbols, width = state["tokens.weight"].shape
        blocks = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        module: nn.Module = CharGpt(symbols, len(state["places"]), width=width, blocks=blocks)
        # From the values to `out` would be a third, but its code divides a bias of 3 x width by `width` scales.
        smoothed = [
            ("re:.*norm1$", ["re:.*qkv$"]),
            ("re:.*norm2$", ["re:.*up$"]),
            ("re:.*norm$", ["re:.*head$"]),
        ]
        inside = "blocks"
    else:
        module, inside = Encoder(Path(name)), "bert.encoder.layer"
        smoothed = [("re:.*self.value$", ["re:.*attention.output.dense$"])]
    missing, _ = module.load_state_dict(state, strict=False)
    assert all("position_ids" in key for key in missing), missing
    return Network(module.eval(), inside, smoothed)


def awq(net: Network, batches: list[dict[str, Tensor]], wanted: Wanted) -> None:
    """llm-compressor's AWQModifier, then its rounding."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, forward_quantize
    from llmcompressor.core import active_session
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
    from llmcompressor.pipelines.basic import BasicPipeline
    from llmcompressor.pipelines.cache import IntermediatesCache

    weights = QuantizationArgs(
        num_bits=wanted.bits,
        symmetric=wanted.symmetric,
        strategy="group" if wanted.group else "channel",
        group_size=wanted.group or None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    mappings = [AWQMapping(source, targets) for source, targets in net.smoothed]
    recipe = [AWQModifier(mappings=mappings), QuantizationModifier(config_groups={"all": scheme})]
    # What `oneshot` does, without its check of a checkpoint's files, which this network never was.
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    IntermediatesCache.pin_memory = lambda *_: None  # without an accelerator torch refuses to
    session = active_session()
    session.reset()
    session.initialize(model=net, start=-1, recipe=recipe, calib_data=loader)
    BasicPipeline()(net, loader, None)
    session.finalize()
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = forward_quantize(layer, layer.weight, "weight", weights)


def parts(net: Network) -> Iterator[nn.Module]:
    """Blocks in order, then the Linear layers outside of them."""
    blocks = net.net.get_submodule(net.blocks)
    yield from blocks
    inside = set(blocks.modules())
    yield from (layer for layer in net.net.modules() if isinstance(layer, nn.Linear) and layer not in inside)


def autoround(net: Network, batches: list[dict[str, Tensor]], wanted: Wanted) -> None:
    """AutoRound's tuning of each block to the outputs it had, given what the blocks before it put out now."""
    given: dict[nn.Module, list[Any]] = {part: [] for part in parts(net)}

    def keep(part: nn.Module, args: Any, kwargs: Any) -> None:
        # Of what comes by position AutoRound keeps the first sample's alone, and it wants one of everything.
        names = list(inspect.signature(part.forward).parameters)[1:]
        named = {**dict(zip(names, args[1:], strict=False)), **kwargs}
        given[part].append((args[:1], {name: one for name, one in named.items() if one is not None}))

    hooks = [part.register_forward_pre_hook(keep, with_kwargs=True) for part in given]
    with torch.no_grad():
        for batch in batches:
            for at in range(len(next(iter(batch.values())))):
                net(**{name: value[at : at + 1] for name, value in batch.items()})
    for hook in hooks:
        hook.remove()
    for inputs in given.values():
        masks = {name: one for _, named in inputs for name, one in named.items() if "mask" in name}
        for _, named in inputs:  # a text without padding comes without
            for name, one in masks.items():
                named.setdefault(
                    name, torch.ones_like(one) if one.dtype == torch.bool else torch.zeros_like(one)
                )
    before = None
    for part, inputs in given.items():
        if isinstance(part, nn.Linear):
            part.weight.data = tuned_layer(part.weight.data, inputs, wanted)
        else:
            before = tuned(part, inputs, before, wanted)


def made(source: str, method: str, wanted: Wanted, name: str) -> dict[str, Tensor]:
    """Tensors of the file's network that are others afterwards, and the CPU seconds."""
    torch.manual_seed(0)
    values = load_file(source)
    inputs = {
        key.partition("|")[2]: values.pop(key) for key in list(values) if key.startswith("calibration|")
    }
    split = zip(*(value.split(16) for value in inputs.values()), strict=True)
    batches = [dict(zip(inputs, rows, strict=True)) for rows in split]
    net = network(name, values)
    start = time.process_time()
    {"awq": awq, "autoround": autoround}[method](net, batches, wanted)
    seconds = time.process_time() - start
    found = net.net.state_dict()
    changed = [key for key in values if key in found and not torch.equal(found[key], values[key])]
    return {key: found[key].contiguous().clone() for key in changed} | {"seconds": torch.tensor([seconds])}


def main() -> None:
    """Answer line by line."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        source, target, method, bits, group, symmetric, name = line.split()
        save_file(made(source, method, Wanted.told(bits, group, symmetric), name), target)
        print("done", target, flush=True)


if __name__ == "__main__":
    main()
