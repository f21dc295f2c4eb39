"""The peers of quantizers.py and sparsity.py that take layers, in an environment of their own.

    VENV/bin/python benchmarks/real/quantizers_peer.py < LINES

A line is IN OUT METHOD BITS GROUP_SIZE SYMMETRIC SPARSITY. IN is a safetensors file with `<layer>|weight` [units,
columns]; `<layer>|gram` and for GPTQ `<layer>|scale` and `<layer>|zero_point` (signed); for Wanda `<layer>|squares`
[columns]. OUT gets `<layer>` as it is afterwards. METHOD is gptq, sparsegpt, wanda (llm-compressor), hqq, torchao or
autoround; group size 0 is one scale per channel. The environment is that of
benchmarks/checkpoints/peer_requirements.txt, with hqq 0.2.8.post1, its termcolor and einops, and torchao 0.18.0
installed beside it (`pip install --no-deps`).
"""

import sys
import time

import torch
from autoround_peer import Wanted, tuned_layer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Values = dict[str, Tensor]


def gptq(values: Values, layer: str, wanted: Wanted, sparsity: float) -> Tensor:
    """llm-compressor, with activation order, on the scales that come along."""
    from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    options = QuantizationArgs(
        num_bits=wanted.bits,
        symmetric=wanted.symmetric,
        strategy="group" if wanted.group else "channel",
        group_size=wanted.group or None,
        actorder=ActivationOrdering.WEIGHT,
    )
    weight, gram = values[f"{layer}|weight"].clone()[None], values[f"{layer}|gram"].clone()[None]
    zero = values[f"{layer}|zero_point"].to(torch.int8)[None]
    found: Tensor = quantize_weight(weight, gram, values[f"{layer}|scale"][None], zero, None, options)[0][0]
    return found


def hqq(values: Values, layer: str, wanted: Wanted, sparsity: float) -> Tensor:
    """HQQ with its optimizer; its zero points are fractions, so it is never symmetric."""
    from hqq.core.quantize import Quantizer

    codes, facts = Quantizer.quantize(
        values[f"{layer}|weight"],
        nbits=wanted.bits,
        channel_wise=True,
        group_size=wanted.group or None,
        optimize=True,
        round_zero=False,
        axis=1,
        bitpack=False,
        compute_dtype=torch.float32,
        device="cpu",
    )
    found: Tensor = Quantizer.dequantize(codes, facts)
    return found


def torchao(values: Values, layer: str, wanted: Wanted, sparsity: float) -> Tensor:
    """torchao's weight-only integers of any width."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup, quantize_

    found = _linear(values[f"{layer}|weight"])
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{wanted.bits}"),
        granularity=PerGroup(wanted.group) if wanted.group else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if wanted.symmetric else MappingType.ASYMMETRIC,
    )
    quantize_(found, config)
    values_: Tensor = found[0].weight.dequantize()
    return values_


def autoround(values: Values, layer: str, wanted: Wanted, sparsity: float) -> Tensor:
    """AutoRound, layer by layer: to rows that have the same Gram matrix as the inputs, so the same squared error."""
    gram = values[f"{layer}|gram"].double()
    size = float(gram.diagonal().mean())
    levels, vectors = torch.linalg.eigh(gram / size)
    rows = (levels.clamp(min=0).sqrt()[:, None] * vectors.T).float() * len(gram) ** 0.5
    return tuned_layer(values[f"{layer}|weight"], [((rows[None],), {})], wanted, batch=1)


def sparsegpt(values: Values, layer: str, wanted: Wanted, sparsity: float) -> Tensor:
    """llm-compressor's SparseGPT."""
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    module = _linear(values[f"{layer}|weight"])[0]
    gram = values[f"{layer}|gram"].clone()
    _, found = sparsify_weight(
        module,
        {module: gram},
        sparsity=sparsity,
        prune_n=0,
        prune_m=0,
        block_size=128,
        dampening_frac=0.01,
        preserve_sparsity_mask=False,
    )
    return torch.as_tensor(found).detach()


def wanda(values: Values, layer: str, wanted: Wanted, sparsity: float) -> Tensor:
    """llm-compressor's Wanda."""
    from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import sparsify_weight

    module = _linear(values[f"{layer}|weight"])[0]
    squares = values[f"{layer}|squares"].float()
    found = sparsify_weight(module, {module: squares}, sparsity=sparsity, prune_n=0, prune_m=0)
    return torch.as_tensor(found).detach()


def _linear(weight: Tensor) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return nn.Sequential(layer)


METHODS = {
    "gptq": gptq,
    "hqq": hqq,
    "torchao": torchao,
    "autoround": autoround,
    "sparsegpt": sparsegpt,
    "wanda": wanda,
}


def made(source: str, method: str, wanted: Wanted, sparsity: float) -> dict[str, Tensor]:
    """Every layer of the file afterwards, and the CPU seconds."""
    torch.manual_seed(0)
    values = load_file(source)
    names = [name.removesuffix("|weight") for name in values if name.endswith("|weight")]
    start = time.process_time()
    found = {name: METHODS[method](values, name, wanted, sparsity).detach().contiguous() for name in names}
    return found | {"seconds": torch.tensor([time.process_time() - start])}


def main() -> None:
    """Answer line by line."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        source, target, method, bits, group, symmetric, sparsity = line.split()
        save_file(made(source, method, Wanted.told(bits, group, symmetric), float(sparsity)), target)
        print("done", target, flush=True)


if __name__ == "__main__":
    main()
