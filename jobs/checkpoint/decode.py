"""A published checkpoint back to plain weights, by blocks of rows: no tensor is held as a whole unless asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fleetpress.compression.errors import CompressionError, QuantizationError
from fleetpress.compression.quantization.compressed_tensors import loaded_rows
from fleetpress.compression.quantization.weight import QuantizedWeight
from fleetpress.compression.treatment import (
    KEPT,
    PACK,
    PACKED,
    SCALE,
    SHAPE,
    ZERO_POINT,
    Stored,
    Treatment,
    matrix_shape,
    treatment_from_config,
)
from fleetpress.storage.buffers import SHARED
from fleetpress.storage.checkpoint import Checkpoint, TensorLocation, read_tensor
from fleetpress.storage.errors import ArtifactCorrupt
from fleetpress.storage.safetensors_layout import header_of_file, size_of
from fleetpress.storage.store import ObjectStore, open_store
from fleetpress.storage.streams import ONE_PUT_BYTES, PartWriter, Stages, part_sizes
from fleetpress.storage.tensors import DTYPES

from .layout import SHARD_BYTES, Item, bytes_until, shard_file

_BLOCK_BYTES = 4 << 20  # of plain weights that are decoded at once


@dataclass(frozen=True, kw_only=True)
class PlainTensor:
    """A tensor as it was before: `item` says what was done to it, `parts` where the stored tensors are, by suffix."""

    item: Item
    parts: Mapping[str, TensorLocation]

    @property
    def bytes(self) -> int:
        """Its size when it is plain."""
        return size_of(self.item.dtype, self.item.shape)


def plain_tensors(checkpoint: Checkpoint) -> list[PlainTensor]:
    """The tensors of a published checkpoint, in the order of their bytes. Raises ArtifactCorrupt."""
    config = (checkpoint.config or {}).get("quantization_config")
    places = sorted(
        checkpoint.tensors.items(), key=lambda entry: (entry[1].file.path, entry[1].info.offset_bytes)
    )
    if not isinstance(config, dict):
        return [_as_it_is(name, place) for name, place in places]
    sides = {
        name.removesuffix(SCALE) + suffix
        for name in checkpoint.tensors
        if name.endswith(SCALE)
        for suffix in (SCALE, ZERO_POINT, SHAPE)
    }
    found = []
    for name, place in places:
        if name in sides:
            continue
        weight = name.removesuffix(PACKED)
        if weight + SCALE in checkpoint.tensors:
            found.append(_quantized(checkpoint, config, weight))
        else:
            found.append(_as_it_is(name, place))
    return found


def rows_of(checkpoint: Checkpoint, plain: PlainTensor) -> Iterator[Tensor]:
    """The tensor's values as blocks [rows, columns] in order, in its own dtype; what is as it was as raw bytes."""
    for block in stored_rows_of(checkpoint, plain):
        yield block.dequantize() if isinstance(block, QuantizedWeight) else block


def stored_rows_of(checkpoint: Checkpoint, plain: PlainTensor) -> Iterator[Tensor | QuantizedWeight]:
    """As `rows_of`, before quantized blocks are decoded."""
    store, item = open_store(checkpoint.root), plain.item
    cut = item.geometry
    step = max(1, _BLOCK_BYTES // (cut.tile_rows * max(1, cut.row_bytes))) * cut.tile_rows
    for first in range(0, cut.rows, step):
        end = min(first + step, cut.rows)
        rows = {
            tensor.name.removeprefix(item.name): _rows(store, plain, tensor, first, end)
            for tensor in item.stored
            if not tensor.name.endswith(SHAPE)
        }
        main = item.stored[0].name.removeprefix(item.name)
        if item.treatment.scheme is None:
            yield rows[main]
        else:
            shape = end - first, item.shape[1]
            yield loaded_rows(rows[main], rows[SCALE], rows.get(ZERO_POINT), item.treatment, shape)


def whole(checkpoint: Checkpoint, plain: PlainTensor) -> Tensor:
    """The tensor in memory. Raises InvalidModelFile for dtypes that torch has not."""
    item = plain.item
    if item.treatment.scheme is None:
        return read_tensor(checkpoint, item.name)
    return torch.cat(list(rows_of(checkpoint, plain))).reshape(item.shape)


def write_plain(checkpoint: Checkpoint, target: ObjectStore) -> tuple[list[str], dict[str, str], int]:
    """Write plain shards to `target`: their names, the shard of every tensor, and the bytes of all tensors."""
    runs: list[list[PlainTensor]] = [[]]
    for plain in plain_tensors(checkpoint):
        if runs[-1] and sum(other.bytes for other in runs[-1]) + plain.bytes > SHARD_BYTES:
            runs.append([])
        runs[-1].append(plain)
    files: list[str] = []
    weight_map: dict[str, str] = {}
    for index, run in enumerate(runs):
        file = shard_file(index, len(runs))
        # The widest entries first, so that each tensor lies at a multiple of its own.
        run.sort(key=lambda plain: -size_of(plain.item.dtype, (1,)))
        _write_shard(checkpoint, run, target, file)
        files.append(file)
        weight_map |= {plain.item.name: file for plain in run}
    return files, weight_map, sum(plain.bytes for run in runs for plain in run)


def _write_shard(checkpoint: Checkpoint, run: Sequence[PlainTensor], target: ObjectStore, file: str) -> None:
    header, _, size_bytes = header_of_file(
        [(plain.item.name, plain.item.dtype, plain.item.shape) for plain in run]
    )
    blocks = (_bytes(block) for plain in run for block in rows_of(checkpoint, plain))
    if size_bytes < ONE_PUT_BYTES:
        target.put(file, b"".join((header, *(bytes(block) for block in blocks))))
        return
    upload = target.create_upload(file)

    def send(number: int, offset_bytes: int, data: memoryview) -> str:
        return target.upload_part(file, upload, number=number, offset=offset_bytes, data=data)

    with PartWriter(send, part_sizes(size_bytes), Stages(), buffers=SHARED) as writer:
        writer.write(memoryview(header))
        for block in blocks:
            writer.write(block)
        etags = writer.finish()
    target.complete_upload(file, upload, etags)


def _bytes(block: Tensor) -> memoryview:
    return block.contiguous().view(-1).view(torch.uint8).numpy().data


def _as_it_is(name: str, place: TensorLocation) -> PlainTensor:
    return PlainTensor(item=_item(name, place, place.info.shape, KEPT), parts={"": place})


def _item(name: str, place: TensorLocation, shape: Sequence[int], treatment: Treatment) -> Item:
    return Item(
        name=name,
        path=place.file.path,
        etag=place.file.etag,
        offset_bytes=place.info.offset_bytes,
        size_bytes=size_of(place.info.dtype, shape),
        dtype=place.info.dtype,
        shape=tuple(shape),
        treatment=treatment,
    )


def _quantized(checkpoint: Checkpoint, config: Mapping[str, Any], weight: str) -> PlainTensor:
    parts = {
        suffix: checkpoint.tensors[weight + suffix]
        for suffix in ("", PACKED, SCALE, ZERO_POINT, SHAPE)
        if weight + suffix in checkpoint.tensors
    }
    treatment = _treatment(config, weight.removesuffix(".weight"))
    assert treatment.scheme is not None
    main = PACKED if treatment.layout == PACK else ""
    wanted = [main, SCALE, *([SHAPE] if main else []), *([] if treatment.scheme.symmetric else [ZERO_POINT])]
    missing = next((suffix for suffix in wanted if suffix not in parts), None)
    if missing is not None:
        raise ArtifactCorrupt(
            f"{checkpoint.uri} holds no tensor {weight}{missing}, which the weight needs; publish the model again"
        )
    shape: Sequence[int] = parts[main].info.shape
    if main:
        shape = read_tensor(checkpoint, weight + SHAPE).reshape(-1).tolist()
    try:
        item = _item(weight, parts[SCALE], matrix_shape(weight, shape), treatment)
        for tensor in item.stored:
            info = checkpoint.tensors[tensor.name].info
            if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
                raise QuantizationError(
                    f"{tensor.name} is {info.dtype} {list(info.shape)}, but weights of {list(shape)} have "
                    f"{tensor.dtype} {list(tensor.shape)}; publish the model again"
                )
    except CompressionError as error:
        raise ArtifactCorrupt(f"{checkpoint.uri}: {error}") from None
    return PlainTensor(item=item, parts=parts)


def _treatment(config: Mapping[str, Any], module: str) -> Treatment:
    """The treatment of a module: that of the group which names it, else of the group that names its class."""
    groups = list(config["config_groups"].values())
    mine = next((group for group in groups if module in group["targets"]), groups[0])
    return treatment_from_config(mine, config.get("format", PACK))


def _rows(store: ObjectStore, plain: PlainTensor, tensor: Stored, first: int, end: int) -> Tensor:
    """The part of a stored tensor that belongs to rows `first` to `end` of the weight."""
    item, place = plain.item, plain.parts[tensor.name.removeprefix(plain.item.name)]
    start, stop = bytes_until(tensor, item, first), bytes_until(tensor, item, end)
    if tensor.shape == (1,):  # one for all rows
        start, stop = 0, place.info.size_bytes
    data = torch.empty(stop - start, dtype=torch.uint8)
    if len(data):
        view = data.numpy().data
        store.read_into(place.file.path, place.info.offset_bytes + start, view, etag=place.file.etag)
    if item.treatment.scheme is None:
        return data
    return data.view(DTYPES[tensor.dtype]).view(-1, *tensor.shape[1:])
