"""The peer of gptq_layers.py, in an environment of its own: llm-compressor's GPTQ of single layers.

    VENV/bin/python benchmarks/gptq_peer.py < LINES > LINES

Each line names a safetensors file with `weight`, `gram`, `scale` and `zero_point` (signed), and a group size (0: per
channel). For each it prints the CPU seconds as JSON, and stores the quantized weight beside it as `<file>.peer`. The
environment is that of benchmarks/checkpoints/peer_requirements.txt; nothing of fleetpress is in it.
"""

import json
import sys
import time

import torch
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import load_file, save_file


def main() -> None:
    """Answer line by line."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        path, group, bits, symmetric = line.split()
        values = load_file(path)
        size = int(group)
        options = QuantizationArgs(
            num_bits=int(bits),
            symmetric=symmetric == "1",
            strategy="group" if size else "channel",
            group_size=size or None,
            actorder=ActivationOrdering.WEIGHT,
        )
        # It works in place on what it is given.
        weight, gram = values["weight"].clone()[None], values["gram"].clone()[None]
        start = time.process_time()
        found, _, _ = quantize_weight(
            weight,
            gram,
            values["scale"][None],
            values["zero_point"].to(torch.int8)[None],
            None,
            options,
        )
        seconds = time.process_time() - start
        save_file({"weight": found[0].contiguous()}, f"{path}.peer")
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
