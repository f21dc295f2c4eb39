"""The peers of quantizers.py, in an environment of its own: GPTQ of llm-compressor, and HQQ, of given layers.

    VENV/bin/python benchmarks/real/quantizers_peer.py IN OUT METHOD BITS GROUP_SIZE SYMMETRIC

IN is a safetensors file with `<layer>|weight` [units, columns], `<layer>|gram`, and for GPTQ `<layer>|scale` and
`<layer>|zero_point` (signed); OUT gets `<layer>` as it is after quantization. METHOD is gptq or hqq; group size 0 is
one scale per channel. The environment is that of benchmarks/checkpoints/peer_requirements.txt, with hqq 0.2.8.post1 and
its termcolor and einops installed beside it.
"""

import sys
import time

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def gptq(values: dict[str, Tensor], layer: str, bits: int, group: int, symmetric: bool) -> Tensor:
    """llm-compressor, with activation order, on the scales that come along."""
    from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    options = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if group else "channel",
        group_size=group or None,
        actorder=ActivationOrdering.WEIGHT,
    )
    weight, gram = values[f"{layer}|weight"].clone()[None], values[f"{layer}|gram"].clone()[None]
    zero = values[f"{layer}|zero_point"].to(torch.int8)[None]
    found: Tensor = quantize_weight(weight, gram, values[f"{layer}|scale"][None], zero, None, options)[0][0]
    return found


def hqq(values: dict[str, Tensor], layer: str, bits: int, group: int, symmetric: bool) -> Tensor:
    """HQQ with its optimizer; its zero points are fractions, so it is never symmetric."""
    from hqq.core.quantize import Quantizer

    codes, facts = Quantizer.quantize(
        values[f"{layer}|weight"],
        nbits=bits,
        channel_wise=True,
        group_size=group or None,
        optimize=True,
        round_zero=False,
        axis=1,
        bitpack=False,
        compute_dtype=torch.float32,
        device="cpu",
    )
    found: Tensor = Quantizer.dequantize(codes, facts)
    return found


def main() -> None:
    """Quantize every layer of the file."""
    torch.set_num_threads(1)
    source, target, method, bits, group, symmetric = sys.argv[1:]
    values = load_file(source)
    work = {"gptq": gptq, "hqq": hqq}[method]
    names = [name.removesuffix("|weight") for name in values if name.endswith("|weight")]
    start = time.process_time()
    made = {name: work(values, name, int(bits), int(group), symmetric == "1").contiguous() for name in names}
    made["seconds"] = torch.tensor([time.process_time() - start])
    save_file(made, target)


if __name__ == "__main__":
    main()
