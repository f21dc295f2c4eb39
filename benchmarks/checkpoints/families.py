"""Which families of models can be calibrated: each one tiny, from its folder to its published artifact.

    python benchmarks/checkpoints/families.py

For every family a random model of a few thousand weights is saved, run block by block from that folder, and compared
with transformers' own forward pass over the same tokens, some of them padding; then a recipe with GPTQ publishes it.
Printed are whether the scores are the same to the last bit, and how many layers were solved with what they read, of how
many that were quantized.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).parents[1]))

import numpy as np
import torch
import transformers
from markdown_table import table
from safetensors.torch import load_file
from torch import Tensor

from fleetpress.compression.decoder.passage import Batch, advanced, check_independent, embedded, scores
from fleetpress.compression.decoder.skeleton import Skeleton
from fleetpress.jobs import run_fleet
from fleetpress.jobs.spec.fleet_spec import parse_spec

SHAPES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "GemmaForCausalLM": {},
    "Gemma2ForCausalLM": {"head_dim": 8},
    "Gemma3ForCausalLM": {"head_dim": 8},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {},
    "GPTNeoXForCausalLM": {},
    "GPTJForCausalLM": {"n_embd": 32, "n_head": 4, "n_layer": 3, "rotary_dim": 8},
    "OPTForCausalLM": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "BloomForCausalLM": {"n_layer": 3, "n_head": 4},
    "MptForCausalLM": {"d_model": 32, "n_heads": 4, "n_layers": 3},
    "FalconForCausalLM": {"num_kv_heads": 2},
    "Olmo2ForCausalLM": {},
    "GraniteForCausalLM": {},
    "CohereForCausalLM": {},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "Glm4ForCausalLM": {"head_dim": 8},
    "HeliumForCausalLM": {"head_dim": 8},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen2MoeForCausalLM": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "Qwen3MoeForCausalLM": _EXPERTS,
    "BertForMaskedLM": {},
    "XLMRobertaForMaskedLM": {},
    "DistilBertForMaskedLM": {"dim": 32, "n_heads": 4, "n_layers": 3, "hidden_dim": 64},
    "ModernBertForMaskedLM": {"global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
}
SPEC = """\
version: 1
name: families
output: {place}/output
models: [{{source: {place}/model, data: tokens, recipe: it}}]
data: {{tokens: {{train: {place}/tokens.npz}}}}
recipes: {{it: {{calibrate: {{samples: 8, batch_size: 4}}, quantize: {{num_bits: 4, group_size: 16, method: gptq}}}}}}
"""


def main() -> None:
    """One row a family."""
    torch.set_num_threads(1)
    rows = []
    for name, options in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append((f"`{name}`", *row(name, options, Path(folder))))
            print(rows[-1], file=sys.stderr, flush=True)
    table(("family", "the same scores", "solved / quantized"), rows)


def row(name: str, options: dict[str, Any], place: Path) -> tuple[str, str]:
    """What is told of a family."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    with contextlib.redirect_stderr(io.StringIO()):
        model = kind(kind.config_class(**{**SHAPES, **options})).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(place / "model")
    ids = torch.randint(3, 97, (8, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1::2, 9:] = 0
    np.savez(place / "tokens.npz", input_ids=ids.numpy(), attention_mask=mask.numpy())
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
    kept = mask.bool()
    same = torch.equal(
        streamed(place / "model", Batch(input_ids=ids, attention_mask=mask))[kept], expected[kept]
    )
    (result,) = run_fleet(parse_spec(SPEC.format(place=place), "spec.yaml"), executor="inline").models
    if result.state != "published":
        return str(same), f"{result.state}: {result.reason}"
    artifact = place / "output/models/model" / str(result.digest)
    layers = json.loads((artifact / "metrics.json").read_text())["layers"]
    quantized = [layer for layer in layers if layer["num_bits"]]
    solved = sum(layer.get("method") == "gptq" for layer in quantized)
    return "yes" if same else "no", f"{solved} / {len(quantized)}"


def streamed(place: Path, batch: Batch) -> Tensor:
    """The scores of tokens, block by block."""
    values = load_file(place / "model.safetensors")
    config = json.loads((place / "config.json").read_text())
    skeleton = Skeleton(
        config, values, lambda names: {one: values[one] for one in names}, lambda one, rows: values[one][rows]
    )
    check_independent(skeleton, batch)
    skeleton.embed_only(batch.input_ids)
    hidden = embedded(skeleton, batch)
    skeleton.embed_nothing()
    for index in range(len(skeleton.blocks)):
        skeleton.fill(index, {one: values[one] for one in skeleton.names_of(index)})
        hidden = advanced(skeleton, index, batch, hidden)
        skeleton.empty(index)
    return scores(skeleton, batch, hidden)


if __name__ == "__main__":
    main()
