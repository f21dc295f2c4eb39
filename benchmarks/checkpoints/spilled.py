"""Bytes that the tasks of a calibrated checkpoint read and write, and their CPU seconds, by kind.

    python benchmarks/checkpoints/spilled.py [--chunks 16] [--method gptq]

A Llama of 2 blocks (hidden size 128, 2,048 columns of the down projection, 500 tokens) with weights drawn by a seed, as
many sequences of 64 tokens as there are chunks, twice: to calibrate with one sequence a chunk, and held-out. All tasks
run in this process, one after the other, from and to a folder. What they read and wrote is what their records say.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))
from markdown_table import table
from transformers import LlamaConfig, LlamaForCausalLM

from fleetpress.jobs import run_fleet
from fleetpress.jobs.spec.fleet_spec import parse_spec

CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=2048,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=500,
    max_position_embeddings=64,
)
KINDS = ("advance", "solve", "score", "convert")


def main() -> None:
    """Print one line a kind of task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--method", default="gptq")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        torch.manual_seed(0)
        LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(place / "model")
        drawn = np.random.default_rng(0)
        for name in ("train", "eval"):
            np.savez(place / f"{name}.npz", input_ids=drawn.integers(0, 500, (chosen.chunks, 64)))
        spec = parse_spec(
            f"version: 1\nname: spilled\noutput: {place}/output\n"
            f"models: [{{source: {place}/model, recipe: it, data: tokens}}]\n"
            f"data: {{tokens: {{train: {place}/train.npz, eval: {place}/eval.npz}}}}\n"
            f"recipes: {{it: {{calibrate: {{samples: {chosen.chunks}, batch_size: 1}}, "
            f'quantize: {{scheme: W4A16, method: {chosen.method}}}, validate: {{max_drop: "900%"}}}}}}\n'
            "resources: {memory_per_task: 2GiB}\n",
            "spec.yaml",
        )
        seconds: Counter[str] = Counter()
        seen: dict[str, Any] = {}
        begun = [0.0]

        def look(event: Any, _: Any) -> None:
            if event.kind == "started":
                begun[0] = time.process_time()
            elif event.kind == "finished":
                seconds[event.step] += time.process_time() - begun[0]
                for path in (place / "output" / "records").glob("*.json"):
                    seen.setdefault(path.name, json.loads(path.read_bytes()))

        (result,) = run_fleet(spec, executor="inline", listener=look).models
        assert result.state == "published", (result.state, result.reason)
    rows = []
    for kind in KINDS:
        records = [one for one in seen.values() if one["kind"] == kind]
        if records:
            read, written = (sum(one[side] for one in records) for side in ("bytes_read", "bytes_written"))
            rows.append([kind, str(len(records)), f"{read:,}", f"{written:,}", f"{seconds[kind]:.1f}"])
    table(["tasks", "count", "bytes read", "bytes written", "CPU s"], rows)


if __name__ == "__main__":
    main()
