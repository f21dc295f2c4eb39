"""A synthetic language model for the benchmarks: a Llama's tensors, random, in bfloat16, with everything beside them.

    python benchmarks/checkpoints/make_model.py DEST [--layers 16 | --gigabytes 2.2 | --giant] [--shards 6]

Hidden size 2048, feed-forward 8192, 32 heads with 8 of keys and values, vocabulary 32000, untied head; weights are
0.02 * normal, the same ones for the same seed. 16 layers are 2.2 GB. `--giant` is one layer in one shard of 2.1 GB,
whose feed-forward matrices are 600 MB each. Tensors are made and written one by one.
"""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

HIDDEN, HEADS, KV_HEADS, VOCABULARY = 2048, 32, 8, 32_000
FEED_FORWARD, GIANT_FEED_FORWARD = 8192, 146_560
ITEM_BYTES = 2

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Size:
    """What differs between the models made here."""

    layers: int = 16
    shards: int = 6
    feed_forward: int = FEED_FORWARD


def giant() -> Size:
    """One shard of 2.1 GB with tensors of 600 MB."""
    return Size(layers=1, shards=1, feed_forward=GIANT_FEED_FORWARD)


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Every tensor by its name, in the order in which they are stored."""
    kv = HIDDEN // HEADS * KV_HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(size.layers):
        inside = {
            "input_layernorm": (HIDDEN,),
            "mlp.down_proj": (HIDDEN, size.feed_forward),
            "mlp.gate_proj": (size.feed_forward, HIDDEN),
            "mlp.up_proj": (size.feed_forward, HIDDEN),
            "post_attention_layernorm": (HIDDEN,),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
        }
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def size_bytes(of: Shapes) -> int:
    """Bytes of all tensors."""
    return sum(ITEM_BYTES * math.prod(shape) for shape in of.values())


def layers_of(gigabytes: float) -> int:
    """The number of layers whose model is nearest to so many GB, at least 1."""
    one, two = (size_bytes(shapes(Size(layers=count))) for count in (1, 2))
    return max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)


def make(destination: Path, size: Size, seed: int = 0) -> int:
    """Write the model into a folder that need not exist; gives the bytes of its tensors."""
    destination.mkdir(parents=True, exist_ok=True)
    everything = shapes(size)
    total = size_bytes(everything)
    generator = torch.Generator().manual_seed(seed)
    shards = _shards(everything, size.shards)
    places: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{index:05}-of-{len(shards):05}.safetensors"
        _write_shard(destination / file, shard, generator)
        places |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        _write(destination / "model.safetensors.index.json", _index(places, total))
    _write(destination / "config.json", _config(size))
    _write(destination / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write(destination / "tokenizer.json", _tokenizer())
    _write(destination / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return total


def _shards(everything: Shapes, count: int) -> list[dict[str, tuple[int, ...]]]:
    """Cut where a shard comes nearest to an equal share of what is left."""
    found: list[dict[str, tuple[int, ...]]] = [{}]
    left, inside = size_bytes(everything), 0
    for name, shape in everything.items():
        much = size_bytes({name: shape})
        shards_left = count - len(found) + 1
        if found[-1] and shards_left > 1 and inside + much / 2 > left / shards_left:
            left, inside = left - inside, 0
            found.append({})
        found[-1][name] = shape
        inside += much
    return found


def _write_shard(path: Path, shard: Shapes, generator: torch.Generator) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shard.items():
        end = start + size_bytes({name: shape})
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shard.values():
            _write_tensor(file, shape, generator)


def _write_tensor(file: BinaryIO, shape: tuple[int, ...], generator: torch.Generator) -> None:
    if len(shape) == 1:
        file.write(torch.ones(shape, dtype=torch.bfloat16).view(torch.uint8).numpy().data)
        return
    step = max(1, (16 << 20) // shape[1])
    for row in range(0, shape[0], step):
        rows = torch.randn(min(step, shape[0] - row), shape[1], generator=generator).mul_(0.02)
        file.write(rows.bfloat16().view(torch.uint8).numpy().data)


def _config(size: Size) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": size.feed_forward,
        "num_hidden_layers": size.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _tokenizer() -> dict[str, object]:
    words = ["<unk>", "<s>", "</s>", *(f"word{number}" for number in range(3, VOCABULARY))]
    special = [
        {
            "id": number,
            "content": word,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for number, word in enumerate(words[:3])
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }


def _index(places: Mapping[str, str], total: int) -> dict[str, object]:
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def main() -> None:
    """Make the model that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("destination", type=Path, metavar="DEST")
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--layers", type=int, default=16)
    much.add_argument("--gigabytes", type=float, help="as many layers as come nearest to it")
    much.add_argument("--giant", action="store_true", help="one layer, one shard, matrices of 600 MB")
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    layers = layers_of(arguments.gigabytes) if arguments.gigabytes else arguments.layers
    size = giant() if arguments.giant else Size(layers=layers, shards=arguments.shards)
    total = make(arguments.destination, size, arguments.seed)
    print(f"{arguments.destination}: {size.layers} layers, {total / 1e9:.3f} GB in {size.shards} shards")


if __name__ == "__main__":
    main()
