"""The fleet that goes through the faults, and what it publishes, compared file by file.

A program with data, a sharded checkpoint whose first shard several tasks make and send in parts, and a file of weights
without an index.
"""

import functools
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from fleetpress.storage.artifact import verify_files, without_times
from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import open_store

SPEC = """\
version: 1
name: faults
output: {output}
models:
  - {{source: "{source}/tiny.pt2", data: points, recipe: small}}
  - {{source: "{source}/language/", recipe: packed}}
  - {{source: "{source}/lone.safetensors", recipe: packed}}
data:
  points: {{train: "{source}/train-*.npz", eval: "{source}/eval.npz", loss: cross_entropy}}
recipes:
  small:
    collect: {{batch_size: 16}}
    prune: {{method: gradient_stability, sparsity: 0.25}}
    quantize: {{scheme: W8A16}}
    validate: {{max_drop: 1.0}}
  packed: {{quantize: {{scheme: W8A16_ASYM}}}}
"""
MODELS = ("tiny", "language", "lone")
_FIRST, _SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@functools.cache
def files() -> Mapping[str, bytes]:
    """Everything that the spec names, by key: about 20 MB, most of it the checkpoint's first shard."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    shards = {
        _FIRST: {  # copied, and then two halves quantized: two tasks, each with 5 MiB and more to write
            "model.embed_tokens.weight": weight(3 << 10, 1 << 10),
            "model.layers.0.mlp.up_proj.weight": weight(6 << 10, 1 << 10),
        },
        _SECOND: {
            "model.layers.1.mlp.up_proj.weight": weight(256, 1 << 10),
            "model.norm.weight": weight(1024),
        },
    }
    index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    return {
        **{f"train-{number}.npz": _points(32, number) for number in range(2)},
        "eval.npz": _points(32, 9),
        "tiny.pt2": save_program(module_to_program(net, [torch.zeros(2, 6)]), compress=False),
        "language/config.json": b'{"model_type": "llama", "tie_word_embeddings": false}',
        "language/model.safetensors.index.json": json.dumps(index).encode(),
        "language/tokenizer.json": json.dumps({"words": [str(number) for number in range(2000)]}).encode(),
        **{f"language/{file}": save(shard) for file, shard in shards.items()},
        "lone.safetensors": save(
            {"layers.4.up.weight": weight(64, 64), "layers.4.down.weight": weight(64, 64)}
        ),
    }


def _points(rows: int, seed: int) -> bytes:
    inputs = np.random.default_rng(seed).standard_normal((rows, 6), dtype=np.float32)
    buffer = io.BytesIO()
    np.savez(buffer, inputs=inputs, targets=inputs[:, :3].argmax(1))
    return buffer.getvalue()


def write_spec(path: Path, source: str, output: str) -> str:
    """The spec as a file; gives its path."""
    path.write_text(SPEC.format(source=source, output=output))
    return str(path)


@dataclass(frozen=True, kw_only=True)
class Published:
    """The artifacts of an output: hashes of their files by model, digest and path, and what is wrong with them."""

    artifacts: Mapping[str, Mapping[str, Mapping[str, str]]]
    problems: tuple[str, ...]

    def lost(self, quiet: "Published") -> int:
        """Models that the quiet run published, and this output does not hold."""
        return sum(not self.artifacts.get(name) for name in quiet.artifacts)

    def doubled(self) -> int:
        """Artifacts beyond one of each model."""
        return sum(max(0, len(digests) - 1) for digests in self.artifacts.values())

    def wrong(self, quiet: "Published") -> list[str]:
        """Files that are not those of the quiet run, and files that are not what their manifest says."""
        mine, theirs = _flat(self), _flat(quiet)
        models = {name for name, digests in self.artifacts.items() if digests}
        return [
            *self.problems,
            *sorted(
                "/".join(key)
                for key in mine.keys() | theirs.keys()
                if key[0] in models and mine.get(key) != theirs.get(key)
            ),
        ]


def _flat(published: Published) -> dict[tuple[str, str, str], str]:
    return {
        (name, digest, path): sha256
        for name, digests in published.artifacts.items()
        for digest, found in digests.items()
        for path, sha256 in found.items()
    }


def published(output: str) -> Published:
    """What is published at `output`: artifacts that have a manifest."""
    store = open_store(output)
    keys = [info.key for info in store.list("models/")]
    artifacts: dict[str, dict[str, dict[str, str]]] = {}
    problems: list[str] = []
    for manifest in (key for key in keys if key.endswith("/manifest.json")):
        _, name, digest, _ = manifest.split("/")
        inside = f"models/{name}/{digest}/"
        artifacts.setdefault(name, {})[digest] = {
            key.removeprefix(inside): _hash(key, store.get(key)) for key in keys if key.startswith(inside)
        }
        problems += [f"{name}: {problem}" for problem in verify_files(f"{output}/{inside}".rstrip("/"))]
    return Published(artifacts=artifacts, problems=tuple(problems))


def _hash(key: str, data: bytes) -> str:
    content = without_times(key.rpartition("/")[2], data)
    return hashlib.sha256(content if isinstance(content, bytes) else repr(content).encode()).hexdigest()
