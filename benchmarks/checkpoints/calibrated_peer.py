"""The peer of calibrated.py, run in an environment of its own: llm-compressor's `oneshot` with GPTQ.

    VENV/bin/python benchmarks/checkpoints/calibrated_peer.py SRC DST TOKENS BITS GROUP_SIZE SAMPLES

SRC and DST are Hugging Face folders, TOKENS a .npz with `input_ids`, of which SAMPLES are taken evenly. Symmetric
weights in groups, the head left alone, everything else as llm-compressor has it by default. Prints the CPU seconds of
loading, of `oneshot` and of saving as JSON. The environment is that of peer_requirements.txt.
"""

import json
import os
import sys
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch


def main() -> None:
    """Quantize what the command line names."""
    source, destination, tokens, *numbers = sys.argv[1:]
    bits, group, samples = map(int, numbers)
    torch.set_num_threads(1)
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    clocks = [time.process_time()]
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    clocks.append(time.process_time())
    ids = np.load(tokens)["input_ids"]
    chosen = ids[np.arange(samples) * len(ids) // samples] if samples < len(ids) else ids
    data = Dataset.from_dict({"input_ids": chosen.tolist(), "attention_mask": np.ones_like(chosen).tolist()})
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group)
    recipe = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=chosen.shape[1],
        num_calibration_samples=len(chosen),
        processor=_tokenizer(),
    )
    clocks.append(time.process_time())
    model.save_pretrained(destination, save_compressed=True)
    clocks.append(time.process_time())
    names = ("load", "oneshot", "save")
    print(json.dumps({name: round(clocks[i + 1] - clocks[i], 2) for i, name in enumerate(names)}))


def _tokenizer() -> Any:
    """One that is asked for and never used: the data are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


if __name__ == "__main__":
    main()
