"""A published checkpoint against its source: every tensor decoded, compared, and its error bounded, block by block."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fleetpress.compression.quantization.weight import QuantizedWeight
from fleetpress.storage.artifact import read_manifest
from fleetpress.storage.checkpoint import Checkpoint, open_checkpoint
from fleetpress.storage.store import open_store, read_json
from fleetpress.storage.tensors import DTYPES

from .choice import choose
from .decode import PlainTensor, plain_tensors, stored_rows_of
from .layout import Item

_TOLERANCE_DB = 0.01  # sums of squares are added up in another order here


def compare(uri: str) -> list[str]:
    """What differs between an artifact and what its recipe makes of its source; nothing if all is well.

    Tensors that are kept must be equal byte for byte, cast ones equal to the cast; quantized and zeroed ones must have
    the signal-to-noise ratio that was measured when they were made, and no weight an error that rounding does not
    explain (smallest_error clips weights, so there the ratio alone tells).
    """
    manifest: Mapping[str, Any] = read_manifest(uri)
    source = open_checkpoint(manifest["source"]["uri"])
    changed = _changed(source, manifest["source"]["files"])
    if changed:
        return [f"{source.root}/{changed} is not what the artifact was made of: it cannot be compared"]
    metrics = read_json(open_store(uri), "metrics.json")
    measured = {layer["name"]: layer["sqnr_db"] for layer in metrics["layers"]}
    published = open_checkpoint(uri)
    plain = {tensor.item.name: tensor for tensor in plain_tensors(published)}
    problems = []
    for item in choose(source, manifest["recipe"]).items:
        if item.name not in plain:
            problems.append(f"{item.name}: missing")
            continue
        found = _difference(source, item, published, plain[item.name], measured.get(item.layer or ""))
        problems += [f"{item.name}: {found}"] if found else []
    return problems


def _changed(source: Checkpoint, files: list[dict[str, Any]]) -> str | None:
    etags = {file["path"]: file["etag"] for file in files}
    return next((file.path for file in source.files if etags.get(file.path) != file.etag), None)


def _difference(
    source: Checkpoint, item: Item, published: Checkpoint, plain: PlainTensor, measured: float | None
) -> str | None:
    signal = noise = 0.0
    worst = 0.0
    for original, made, allowed in _blocks(source, item, published, plain):
        if not item.treatment.is_measured:
            if not torch.equal(original.view(torch.uint8), made.contiguous().view(torch.uint8)):
                return "differs from the source"
            continue
        exact = original.double()
        error = (exact - made.double()).abs_()
        signal, noise = signal + float(exact.square().sum()), noise + float(error.square().sum())
        if item.treatment.sparsity:
            error[made == 0] = (
                0  # zeroed, or small: the sum of squares tells whether these are the right ones
            )
        if allowed is not None and error.numel():
            worst = max(worst, float((error / allowed).max()))
    if worst > 1:
        return f"a weight is {worst:.3g} times as far from the source's as rounding can take it"
    found = 10 * math.log10(signal / noise) if signal and noise else None
    if item.treatment.is_measured and (
        (found is None) != (measured is None) or abs((found or 0.0) - (measured or 0.0)) > _TOLERANCE_DB
    ):
        return f"its signal-to-noise ratio is {found} dB, but {measured} dB was measured when it was made"
    return None


def _blocks(
    source: Checkpoint, item: Item, published: Checkpoint, plain: PlainTensor
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Flat blocks of the source's values and the published ones, and how far apart each pair may be if that is known.

    What is cast only comes as the cast values; dtypes that torch has not come as bytes.
    """
    store, offset = open_store(source.root), item.offset_bytes
    dtype = DTYPES.get(item.dtype, torch.uint8)
    for block in stored_rows_of(published, plain):
        if isinstance(block, QuantizedWeight):
            made = block.dequantize().view(-1)
        else:
            made = block.view(DTYPES.get(plain.item.dtype, torch.uint8))
        data = torch.empty(made.numel() * dtype.itemsize, dtype=torch.uint8)
        store.read_into(item.path, offset, data.numpy().data, etag=item.etag)
        offset += len(data)
        original = data.view(dtype)
        if item.treatment.cast and not item.treatment.is_measured:
            original = original.to(made.dtype)
        yield original, made, _allowed(item, original, block)


def _allowed(item: Item, original: Tensor, block: Tensor | QuantizedWeight) -> Tensor | None:
    """The largest error of each weight that rounding explains (see `affine` and `float8`); None: not known."""
    if item.treatment.method != "round_to_nearest" or item.treatment.cast:
        return None
    if not isinstance(block, QuantizedWeight):
        return torch.full(original.shape, torch.finfo(torch.float64).tiny, dtype=torch.float64)
    rows, columns = block.shape
    rounding = torch.finfo(block.dtype).eps  # of the scale, and of the decoded weight
    scale = block.scale.double()
    group = columns if block.group_size is None else block.group_size
    step = scale.repeat_interleave(group, 1)[:, :columns].expand(rows, columns).reshape(-1)
    size = original.double().abs()
    if block.scheme.type == "float":
        return size * (1 / 16 + 2 * rounding) + step / 1024
    codes = 1 << block.scheme.num_bits
    return step * (0.5 + codes * rounding / 2) + size * rounding
