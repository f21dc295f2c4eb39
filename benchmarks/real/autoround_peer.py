"""AutoRound's own tuning of one block, called as llm-compressor calls it; in the environment of quantizers_peer.py."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

STEPS = 200


class Wanted(NamedTuple):
    """Bits of a code; weights that share a scale, 0 for a channel; whether there are no zero points."""

    bits: int
    group: int
    symmetric: bool

    @classmethod
    def told(cls, bits: str, group: str, symmetric: str) -> "Wanted":
        """From a command line."""
        return cls(int(bits), int(group), symmetric == "1")


def tuned(block: nn.Module, inputs: list[Any], before: Any, wanted: Wanted, *, batch: int = 8) -> Any:
    """Quantize the Linear layers of the `block` in place; what it puts out then.

    `inputs` are pairs of args and kwargs, a sample each; `before` what the blocks before it put out now, if known.
    """
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme
    from llmcompressor.modifiers.autoround.base import _wrap_decoding_layer

    wrapped = _wrap_decoding_layer(block)
    wrapped.name_or_path, wrapped.config = "", PretrainedConfig()
    scheme = QuantizationScheme(
        bits=wanted.bits, sym=wanted.symmetric, group_size=wanted.group or -1, data_type="int", act_bits=16
    )
    tuner = AutoRound(
        model=wrapped,
        tokenizer="",
        scheme=scheme,
        iters=STEPS,
        batch_size=batch,
        enable_torch_compile=False,
        scale_dtype="fp32",
        amp=False,
    )
    tuner.configure_layer_config(enable_gguf_official_mixed=False)
    tuner.batch_dim = 0
    block.tuning_device = torch.device("cpu")  # type: ignore[assignment]
    given = [(item,) for item in inputs]
    with torch.enable_grad():
        made, _ = tuner.quantize_block(
            block=block, inputs=given, q_input=before, device="cpu", auto_offload=False
        )
    return made


def tuned_layer(weight: Tensor, inputs: list[Any], wanted: Wanted, *, batch: int = 8) -> Tensor:
    """The same of one Linear layer: its weight [units, columns] afterwards."""
    units, columns = weight.shape
    # AutoRound leaves layers alone whose units are no multiple of 32: units of zeros beside them change nothing.
    layer = nn.Linear(columns, units + -units % 32, bias=False)
    layer.weight.data.zero_()[:units] = weight
    block = nn.Sequential(layer)
    tuned(block, inputs, None, wanted, batch=batch)
    (found,) = block
    assert not torch.equal(found.weight[:units], weight), "AutoRound left the layer as it was"
    return found.weight.detach()[:units]
