"""The fleets that are crashed: of each kind of model the smallest that takes every step of its road."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import open_store

_SPEC = """\
version: 1
name: {name}
output: {output}
models:
{models}
data:
  points: {{train: "{source}/train-*.npz", eval: "{source}/eval.npz", loss: cross_entropy}}
  tokens: {{train: "{source}/tokens.npz", eval: "{source}/held-out.npz"}}
recipes:
  all:
    train: {{epochs: 1, batch_size: 16}}
    collect: {{batch_size: 16}}
    prune: {{method: gradient_stability, sparsity: 0.25}}
    finetune: {{epochs: 1, batch_size: 16}}
    quantize: {{scheme: W8A16}}
    validate: {{max_drop: 1.0}}
  packed: {{quantize: {{scheme: W8A16_ASYM}}}}
  solved:
    calibrate: {{samples: 4, batch_size: 2}}
    quantize: {{num_bits: 4, group_size: 16, method: gptq}}
    validate: {{max_drop: 100%}}
"""
_CODE = """\
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
"""
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of model: its entry in the spec, and what `run` must be told beside the spec."""

    name: str
    entry: str
    arguments: tuple[str, ...] = ()

    def spec_text(self, source: str, output: str, *others: "Kind") -> str:
        """The spec of the sources below `source`, which publishes to `output`; with the models of other kinds."""
        entries = [f"  - {kind.entry.format(source=source)}" for kind in (self, *others)]
        return _SPEC.format(name=self.name, source=source, output=output, models="\n".join(entries))


KINDS = {
    "program": Kind(name="program", entry='{{source: "{source}/net.pt2", data: points, recipe: all}}'),
    "checkpoint": Kind(name="checkpoint", entry='{{source: "{source}/lone.safetensors", recipe: packed}}'),
    "shards": Kind(name="shards", entry='{{source: "{source}/language/", recipe: packed}}'),
    "module": Kind(
        name="module",
        entry='{{source: "{source}/state.pt", factory: "crash_nets:Net", data: points, recipe: all}}',
        arguments=("--allow-code",),
    ),
}


# Run by transformers, which takes seconds to load: not among those that the tests take a selection of.
CALIBRATED = Kind(name="calibrated", entry='{{source: "{source}/llama/", data: tokens, recipe: solved}}')


def write_sources(place: str, *, seed: int = 0) -> None:
    """Every model and all data that the specs name, below `place`; another seed gives others of the same shapes."""
    store = open_store(place)
    for key, data in files(seed).items():
        store.put(key, data)


def write_code(folder: Path) -> None:
    """The module that the state dict's factory is in."""
    (folder / "crash_nets.py").write_text(_CODE)


def files(seed: int = 0) -> dict[str, bytes]:
    """What `write_sources` writes, by key. With the sizes of `crash_forks` the first shard is three tasks of parts."""
    torch.manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape).bfloat16()

    shards = {
        FIRST: {
            "model.embed_tokens.weight": weight(12, 64),
            "model.norm.weight": weight(64),
            **{f"model.layers.{layer}.mlp.up_proj.weight": weight(24, 64) for layer in range(4)},
        },
        SECOND: {"model.layers.4.mlp.up_proj.weight": weight(24, 64)},
    }
    index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    state = io.BytesIO()
    torch.save(net.state_dict(), state)
    return {
        **{f"train-{number}.npz": _points(32, 10 * seed + number) for number in range(2)},
        "eval.npz": _points(32, 10 * seed + 9),
        "net.pt2": save_program(module_to_program(net, [torch.zeros(2, 6)]), compress=False),
        "state.pt": state.getvalue(),
        "lone.safetensors": save({"layers.0.up.weight": weight(8, 32), "norm.weight": weight(32)}),
        "language/config.json": b'{"model_type": "llama", "tie_word_embeddings": false}',
        "language/tokenizer.json": json.dumps({"model": {"seed": seed}}).encode(),
        "language/model.safetensors.index.json": json.dumps(index).encode(),
        **{f"language/{file}": save(shard) for file, shard in shards.items()},
        **_llama(seed),
    }


def _llama(seed: int) -> dict[str, bytes]:
    """A model of three blocks, and tokens for it."""
    drawn = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (20, 16), "model.norm.weight": (16,), "lm_head.weight": (20, 16)}
    for block in range(3):
        inside = {f"self_attn.{name}_proj": (16, 16) for name in "qkvo"}
        inside |= {"mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16), "mlp.down_proj": (16, 32)}
        inside |= {"input_layernorm": (16,), "post_attention_layernorm": (16,)}
        shapes |= {f"model.layers.{block}.{name}.weight": shape for name, shape in inside.items()}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    found = {
        "llama/config.json": json.dumps(config).encode(),
        "llama/model.safetensors": save(
            {name: 0.2 * torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
        ),
    }
    for name, rows in (("tokens", 4), ("held-out", 3)):
        buffer = io.BytesIO()
        np.savez(buffer, input_ids=torch.randint(0, 20, (rows, 6), generator=drawn).numpy())
        found[f"{name}.npz"] = buffer.getvalue()
    return found


def _points(rows: int, seed: int) -> bytes:
    inputs = np.random.default_rng(seed).standard_normal((rows, 6), dtype=np.float32)
    buffer = io.BytesIO()
    np.savez(buffer, inputs=inputs, targets=inputs[:, :3].argmax(1))
    return buffer.getvalue()
