"""Encoders and language models as transformers exports them: heads, and the residual stream of those with RMS norms."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from fleetpress.compression.layers import layers
from fleetpress.compression.program import tensors
from fleetpress.compression.pruning import PruneOptions, delete, prune

IDS = torch.randint(0, 50, (3, 5), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 5, dtype=torch.int64)
MASK[1, 3:] = 0
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bert = BertModel(BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=16))
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.bert(input_ids=ids, attention_mask=mask).last_hidden_state.mean(1))


class Language(nn.Module):
    """Two heads of keys and values for four of the queries; the products of its attention are written out."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=24, max_position_embeddings=16)
        config._attn_implementation = "eager"
        config.use_cache = False
        self.model = LlamaForCausalLM(config)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).logits


def silenced(model: nn.Module, program: ExportedProgram, removed: dict[str, tuple[int, ...]]) -> Tensor:
    """What the model gives when the rows and biases of these units are zero."""
    known = {layer.name: layer for layer in layers(program)}
    with torch.no_grad():
        for name, units in removed.items():
            layer = known[name]
            model.get_parameter(layer.weights[0]).index_fill_(layer.axis, torch.tensor(units), 0.0)
            for bias in layer.biases:
                model.get_parameter(bias)[list(units)] = 0
        return model(IDS, MASK)


@pytest.mark.parametrize(
    ("kind", "structure", "tolerance"),
    # The norms of Llama compute in float32.
    [(Encoder, ("head",), 1e-12), (Language, ("head", "normalized"), 1e-6)],
    ids=["bert", "llama"],
)
def test_what_is_left_is_exact(kind: type[nn.Module], structure: tuple[str, ...], tolerance: float) -> None:
    torch.manual_seed(0)
    model = kind().double().eval()
    free = {0: Dim.AUTO, 1: Dim.AUTO}
    program = torch.export.export(model, (IDS, MASK), dynamic_shapes=(free, free), strict=False)
    options = PruneOptions(method="random", sparsity=0.5, structure=structure)
    result = prune(program, options, seed=1)
    removed = dict(result.removed)
    smaller = delete(program, removed, structure)
    found = smaller.module()(IDS, MASK)
    whole = model(IDS, MASK)
    if "normalized" in structure:
        # The embedding writes to the stream, too; it is no layer whose units are chosen.
        table = "model.model.embed_tokens.weight"
        with torch.no_grad():
            stream = removed["model.model.layers.0.mlp.down_proj"]
            model.get_parameter(table).index_fill_(1, torch.tensor(stream), 0.0)
        assert tensors(smaller)[table].shape == (50, 8)
    torch.testing.assert_close(found, silenced(model, program, removed), rtol=0, atol=tolerance)
    assert (found - whole).abs().max() > 100 * tolerance
    assert all(2 * len(units) == result.units[name] for name, units in removed.items())
    short = smaller.module()(IDS[:2, :4], MASK[:2, :4])
    assert short.isfinite().all()
