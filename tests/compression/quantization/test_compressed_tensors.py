"""The checkpoint layout against the compressed-tensors library, and through transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, CompressedTensorsConfig, LlamaConfig

from fleetpress.compression.errors import MethodError, QuantizationError
from fleetpress.compression.quantization import QUANTIZERS, QuantizedWeight, quantize_weight
from fleetpress.compression.quantization.compressed_tensors import (
    loaded_rows,
    pack_checkpoint_weight,
    stored_rows,
    unpack_checkpoint_weight,
)
from fleetpress.compression.scheme import SCHEMES, QuantScheme, resolve
from fleetpress.compression.treatment import (
    FLOAT,
    INT,
    PACK,
    Treatment,
    fitted,
    quantization_config,
    stored,
    treatment_from_config,
)

METHOD = QUANTIZERS["round_to_nearest"]
NAMES = {torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.int8: "I8"}
KINDS = [{"group_size": 32}, {"group_size": None}, {"strategy": "tensor"}]


def weights(rows: int = 40, columns: int = 96) -> Tensor:
    """Rows of both signs, one sign, and zeros."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(6)) * 0.05
    values[3] = 0
    values[5] = values[5].abs()
    values[6] = -values[6].abs()
    return values


def library_scheme(scheme: QuantScheme) -> QuantizationScheme:
    arguments = QuantizationArgs(
        num_bits=scheme.num_bits,
        symmetric=scheme.symmetric,
        strategy=scheme.strategy,
        group_size=scheme.group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=arguments)


def packed_by_the_library(weight: Tensor, scheme: QuantScheme) -> dict[str, Tensor]:
    if scheme.group_size is not None:
        groups = weight.unflatten(1, (-1, scheme.group_size))
        low, high = groups.amin(-1), groups.amax(-1)
    elif scheme.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        low, high = weight.amin().view(1), weight.amax().view(1)
    theirs = library_scheme(scheme)
    scale, zero_point = calculate_qparams(low, high, theirs.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    packed: dict[str, Tensor] = PackedQuantizationCompressor.compress(state, theirs)
    return packed


def assert_same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype, name
        assert torch.equal(mine[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS, ids=["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_same_input_same_numbers(num_bits, symmetric, kind, dtype):
    scheme = resolve(num_bits=num_bits, symmetric=symmetric, **kind)
    weight = weights().to(dtype)
    quantized = quantize_weight("weight", weight, 0, scheme, METHOD)
    assert_same(pack_checkpoint_weight("weight", quantized), packed_by_the_library(weight, scheme))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["W8A16", "W4A16", "W4A16_ASYM"])
def test_half_precision_is_rounded_once(name, dtype):
    """The library divides in the weight's dtype and rounds twice; under our scales in float32 it says the same."""
    scheme = fitted(SCHEMES[name], 96)
    weight = weights().to(dtype)
    quantized = quantize_weight("weight", weight, 0, scheme, METHOD)
    mine = pack_checkpoint_weight("weight", quantized)
    theirs = packed_by_the_library(weight, scheme)
    zero_point = None
    if quantized.zero_point is not None:
        zero_point = (quantized.zero_point.int() - scheme.middle).to(torch.int8)
    state = {
        "weight": weight.float(),
        "weight_scale": quantized.scale.float(),
        "weight_zero_point": zero_point,
    }
    exact = PackedQuantizationCompressor.compress(state, library_scheme(scheme))
    assert torch.equal(mine["weight_packed"], exact["weight_packed"])

    if not scheme.symmetric:
        return
    assert torch.equal(mine["weight_scale"], theirs["weight_scale"])

    def noise(packed: Mapping[str, Tensor]) -> float:
        back = PackedQuantizationCompressor.decompress(dict(packed), library_scheme(scheme))["weight"]
        return float((back.double() - weight.double()).square().sum())

    assert noise(mine) <= noise(theirs)


@pytest.mark.parametrize("kind", KINDS, ids=["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("num_bits", [3, 4, 8])
def test_there_and_back(num_bits, symmetric, kind):
    scheme = resolve(num_bits=num_bits, symmetric=symmetric, **kind)
    quantized = quantize_weight("a.weight", weights().bfloat16(), 0, scheme, METHOD)
    packed = pack_checkpoint_weight("a.weight", quantized)
    treatment = Treatment(scheme=scheme, layout=PACK)
    assert {name: (NAMES[value.dtype], tuple(value.shape)) for name, value in packed.items()} == {
        part.name: (part.dtype, part.shape) for part in stored("a.weight", "BF16", (40, 96), treatment)
    }
    back = unpack_checkpoint_weight("a.weight", {**packed, "other": torch.ones(1)}, treatment)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.dequantize(), quantized.dequantize())
    local = {name.removeprefix("a."): value for name, value in packed.items()}
    theirs = PackedQuantizationCompressor.decompress(local, library_scheme(scheme))["weight"]
    assert torch.equal(theirs, quantized.dequantize())


def test_group_sizes_that_do_not_divide_are_fitted_or_refused():
    quantized = quantize_weight("a.weight", weights(8, 96), 0, resolve("W4A16", group_size=64), METHOD)
    with pytest.raises(MethodError, match=r"a\.weight: group_size 64 does not divide rows of 96.*take 48"):
        pack_checkpoint_weight("a.weight", quantized)
    assert fitted(quantized.scheme, 96).group_size == 48
    assert fitted(SCHEMES["W8A16"], 97) == SCHEMES["W8A16"]


def test_only_matrices_have_this_layout():
    quantized = quantize_weight("conv.weight", torch.ones(4, 3, 2, 2), 0, SCHEMES["W8A16"], METHOD)
    with pytest.raises(MethodError, match=r"conv\.weight: shape \(4, 3, 2, 2\).*matrices"):
        pack_checkpoint_weight("conv.weight", quantized)
    with pytest.raises(MethodError, match=r"conv\.weight"):
        stored("conv.weight", "F32", (4, 3, 2, 2), Treatment(scheme=SCHEMES["W8A16"], layout=PACK))


def test_damaged_tensors_are_named():
    scheme = resolve("W4A16_ASYM", group_size=32)
    treatment = Treatment(scheme=scheme, layout=PACK)
    packed = pack_checkpoint_weight("a.weight", quantize_weight("a.weight", weights(), 0, scheme, METHOD))
    for name in packed:
        with pytest.raises(QuantizationError, match=f"{name}: the checkpoint holds no such tensor"):
            unpack_checkpoint_weight("a.weight", {k: v for k, v in packed.items() if k != name}, treatment)
    for name in ("a.weight_packed", "a.weight_scale", "a.weight_zero_point"):
        with pytest.raises(QuantizationError, match=name):
            unpack_checkpoint_weight("a.weight", {**packed, name: packed[name][:-1]}, treatment)
    with pytest.raises(QuantizationError, match=r"a\.weight_shape: \[40\] is no shape"):
        unpack_checkpoint_weight("a.weight", {**packed, "a.weight_shape": torch.tensor([40])}, treatment)


@pytest.mark.parametrize("layout", [PACK, INT])
@pytest.mark.parametrize("kind", KINDS, ids=["group", "channel", "tensor"])
def test_rows_one_by_one_give_the_bytes_of_the_whole(layout, kind):
    """Tiles of 32 rows, the last one shorter: their bytes one after the other are those of all rows."""
    scheme = resolve(num_bits=8 if layout == INT else 3, symmetric=False, **kind)
    treatment = Treatment(scheme=scheme, layout=layout)
    quantized = quantize_weight("a.weight", weights(70), 0, scheme, METHOD)
    parts = stored_rows(quantized, layout)
    assert torch.equal(loaded_rows(*parts, treatment, (70, 96)).dequantize(), quantized.dequantize())
    if scheme.strategy == "tensor":
        return
    tiles = []
    for start in range(0, 70, 32):
        rows = slice(start, start + 32)
        tile = QuantizedWeight(
            codes=quantized.codes[rows],
            scale=quantized.scale[rows],
            zero_point=quantized.zero_point[rows],
            scheme=scheme,
            shape=tuple(quantized.codes[rows].shape),
        )
        tiles.append(stored_rows(tile, layout))
    assert all(
        torch.equal(torch.cat(together), part)
        for together, part in zip(zip(*tiles, strict=True), parts, strict=True)
    )


def test_the_config_is_what_the_library_writes():
    own = Treatment(scheme=SCHEMES["W4A16_ASYM"], layout=PACK)
    other = Treatment(scheme=resolve("W4A16_ASYM", group_size=40), layout=PACK)
    float8 = Treatment(scheme=SCHEMES["FP8"], layout=FLOAT)
    for groups in ([(own, ["Linear"]), (other, ["a.c", "a.d"])], [(float8, ["Linear"])]):
        config = quantization_config(groups, ["lm_head"])
        written = QuantizationConfig(**config).model_dump(mode="json")
        written.pop("moe_sparsity_config", None)
        assert written == config
        told = config["config_groups"].values()
        assert [treatment_from_config(one, config["format"]) for one in told] == [one for one, _ in groups]
    with pytest.raises(MethodError, match="nvfp4"):
        treatment_from_config({"weights": {"num_bits": 8}, "format": "nvfp4-pack-quantized"}, PACK)


LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=32,
)
BERT = BertConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    vocab_size=64,
    max_position_embeddings=32,
)


def write_quantized(folder: Path, model: Any, scheme: QuantScheme) -> dict[str, Tensor]:
    """Publish the model's linear layers packed, all but the head; gives the dequantized state."""
    tensors: dict[str, Tensor] = {}
    reference: dict[str, Tensor] = {}
    groups: dict[QuantScheme, list[str]] = {}
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    for name, value in model.state_dict().items():
        if name not in linear - {"lm_head.weight"}:
            tensors[name] = reference[name] = value.clone()
            continue
        own = fitted(scheme, value.shape[1])
        groups.setdefault(own, []).append(name.removesuffix(".weight"))
        quantized: QuantizedWeight = quantize_weight(name, value, 0, own, METHOD)
        tensors |= pack_checkpoint_weight(name, quantized)
        reference[name] = quantized.dequantize()
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    told = [
        (Treatment(scheme=own, layout=PACK), ["Linear"] if own == scheme else names)
        for own, names in groups.items()
    ]
    config["quantization_config"] = quantization_config(told, ["lm_head"])
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return reference


@pytest.mark.parametrize(
    ("config", "auto", "scheme", "options"),
    [
        (LLAMA, AutoModelForCausalLM, SCHEMES["W8A16"], {}),
        (LLAMA, AutoModelForCausalLM, resolve("W4A16", group_size=32), {}),  # down_proj takes 24
        (BERT, AutoModel, resolve("W3A16", group_size=16), {}),
        # Without this option transformers refuses packed zero points.
        (LLAMA, AutoModelForCausalLM, resolve("W4A16_ASYM", group_size=16), {"dequantize": True}),
    ],
    ids=["llama-8bit", "llama-4bit-fitted", "bert-3bit", "llama-4bit-asymmetric"],
)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_loads_what_is_published(config, auto, scheme, options, *, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    reference = write_quantized(tmp_path, model, scheme)
    how = {"quantization_config": CompressedTensorsConfig(**options)} if options else {}
    loaded = auto.from_pretrained(tmp_path, dtype=torch.float32, **how).eval()
    model.load_state_dict(reference)
    tokens = torch.arange(18).view(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(tokens)[0], model(tokens)[0])
