"""Language models for the benchmarks of calibration: a small Llama over bytes that is trained, and random larger ones.

The text is the King James Bible, which FOLDER/bible keeps.
"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1] / "real"))

import fetch

LENGTH, BATCH, STEPS = 128, 16, 500
CALIBRATION, HELD_OUT = 128, 128  # sequences
SHAPES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def trained(folder: Path) -> Path:
    """The Hugging Face folder FOLDER/language-model, in float32, made once (100 CPU seconds).

    `train.npz` and `eval.npz` beside it hold `input_ids` [sequences, 128].
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    place = folder / "language-model"
    if (place / "model.safetensors").exists():
        return place
    torch.set_num_threads(1)
    codes = torch.from_numpy(np.frombuffer(fetch.bible(folder).encode(), dtype=np.uint8).copy()).long()
    lines = codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH)
    lines = lines[torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))]
    held_out, rest = lines[:HELD_OUT], lines[HELD_OUT:]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    rise = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for step in range(STEPS):
        batch = rest[CALIBRATION + step * BATCH :][:BATCH]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rise.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f}, {time.process_time():.0f} s", file=sys.stderr, flush=True)
    np.savez(folder / "train.npz", input_ids=rest[:CALIBRATION].numpy())
    np.savez(folder / "eval.npz", input_ids=held_out.numpy())
    model.save_pretrained(place)
    return place


def random_model(folder: Path, layers: int) -> Path:
    """A Llama of so many layers in bfloat16, 29 MB each, in shards of 200 MB, made once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    place = folder / f"random-{layers}"
    if not (place / "config.json").exists():
        torch.manual_seed(0)
        shapes = {**SHAPES, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        shapes |= {"num_hidden_layers": layers, "num_key_value_heads": 4, "vocab_size": 8192}
        model = LlamaForCausalLM(LlamaConfig(**shapes)).to(torch.bfloat16)
        model.save_pretrained(place, max_shard_size="200MB")
    return place
