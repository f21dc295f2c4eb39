"""Shards as planned are shards as made: every byte in its place, whatever the sizes of tasks, parts and blocks."""

import math
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor

from fleetpress.compression.quantization import QUANTIZERS, quantize_weight
from fleetpress.compression.quantization.compressed_tensors import pack_checkpoint_weight
from fleetpress.compression.scheme import QuantScheme, resolve
from fleetpress.compression.treatment import INT, PACK, Treatment, fitted
from fleetpress.jobs.checkpoint import layout as checkpoint_layout
from fleetpress.jobs.checkpoint.layout import Item, PlannedShard, plan_shards
from fleetpress.jobs.checkpoint.stream import Block, blocks, requests, stream
from fleetpress.jobs.checkpoint.tasks import pieces_of, pieces_to_json
from fleetpress.storage.streams import Stages

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "U8": torch.uint8,
}
METHOD = QUANTIZERS["round_to_nearest"]


@st.composite
def tensors(draw: st.DrawFn) -> list[tuple[str, Tensor, Treatment]]:
    """A few tensors of a model, some of them to be quantized."""
    found = []
    for index in range(draw(st.integers(1, 7))):
        seed = torch.Generator().manual_seed(index)
        if draw(st.booleans()):
            rows, columns = draw(st.integers(1, 150)), draw(st.integers(1, 70))
            dtype = DTYPES[draw(st.sampled_from(["BF16", "F16", "F32"]))]
            weight = torch.randn(rows, columns, generator=seed).to(dtype)
            bits = draw(st.integers(2, 8))
            kind = draw(st.sampled_from([{"group_size": 16}, {"group_size": None}, {"strategy": "tensor"}]))
            scheme = fitted(resolve(num_bits=bits, symmetric=draw(st.booleans()), **kind), columns)
            layout = draw(st.sampled_from([PACK, INT])) if bits == 8 else PACK
            found.append((f"layer{index}.weight", weight, Treatment(scheme=scheme, layout=layout)))
        else:
            shape = draw(st.lists(st.integers(0, 40), max_size=3))
            name = draw(st.sampled_from(sorted(DTYPES)))
            value = torch.randint(0, 100, shape, generator=seed).to(DTYPES[name])
            found.append((f"kept{index}", value, Treatment()))
    return found


def raw(value: Tensor) -> bytes:
    return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def source_of(model: list[tuple[str, Tensor, Treatment]]) -> tuple[list[Item], bytes]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    items, data = [], b"headers" * 3
    for name, value, treatment in model:
        items.append(
            Item(
                name=name,
                path="model.safetensors",
                etag="etag",
                offset_bytes=len(data),
                size_bytes=value.nbytes,
                dtype=names[value.dtype],
                shape=tuple(value.shape),
                treatment=treatment,
            )
        )
        data += raw(value)
    return items, data


class Parts:
    """Collects what a task makes."""

    def __init__(self) -> None:
        self.bytes = b""
        self.crumbs: dict[int, bytes] = {}

    def body(self, data: memoryview) -> None:
        self.bytes += bytes(data)

    def crumb(self, kind: int, data: memoryview) -> None:
        self.crumbs[kind] = self.crumbs.get(kind, b"") + bytes(data)


def made(shard: PlannedShard, data: bytes, block_bytes: int) -> bytes:
    """The shard's file, from what each task makes alone, the last task first."""
    image = bytearray(shard.size_bytes)

    def read(block: Block, view: memoryview) -> None:
        view[:] = data[block.offset_bytes : block.offset_bytes + block.bytes]

    done = []
    for task in reversed(shard.tasks):
        parts = Parts()
        pieces = pieces_of(pieces_to_json(task.pieces))
        assert pieces == list(task.pieces)
        stream("here", pieces, read, parts, Stages(), block_bytes=block_bytes)
        assert [
            (kind, len(parts.crumbs[kind])) for kind in sorted(parts.crumbs) if parts.crumbs[kind]
        ] == list(task.crumbs)
        header = shard.header if task is shard.tasks[0] else b""
        region = header + parts.bytes
        if len(shard.tasks) == 1:
            region += b"".join(parts.crumbs[kind] for kind in sorted(parts.crumbs))
        assert len(region) == sum(task.parts)
        image[task.offset_bytes : task.offset_bytes + len(region)] = region
        done.insert(0, parts.crumbs)
    if len(shard.tasks) > 1:
        tail = b"".join(
            crumbs.get(kind, b"") for kind in sorted({k for c in done for k in c}) for crumbs in done
        )
        assert len(tail) == sum(shard.tail_parts)
        image[shard.size_bytes - len(tail) :] = tail
    return bytes(image)


def expected(model: list[tuple[str, Tensor, Treatment]]) -> dict[str, Tensor]:
    result = {}
    for name, value, treatment in model:
        if treatment.scheme is None:
            result[name] = value
        else:
            quantized = quantize_weight(name, value, 0, treatment.scheme, METHOD)
            result |= pack_checkpoint_weight(name, quantized, treatment.layout)
    return result


@settings(max_examples=60, deadline=None)
@given(
    model=tensors(),
    sizes=st.fixed_dictionaries(
        {
            "SHARD_BYTES": st.sampled_from([2_000, 30_000, 10**9]),
            "TASK_BYTES": st.sampled_from([500, 5_000, 10**9]),
            "PART_BYTES": st.sampled_from([100, 2_000]),
            "_SMALL_BYTES": st.sampled_from([1, 300, 10**9]),
        }
    ),
    block=st.sampled_from([1, 3_000, 1 << 20]),
)
def test_every_byte_is_where_the_plan_says(model, sizes, block):
    with patch.multiple(checkpoint_layout, **sizes):
        _check_all(model, sizes["PART_BYTES"], block)


def _check_all(model: list[tuple[str, Tensor, Treatment]], part: int, block: int) -> None:
    items, data = source_of(model)
    found: dict[str, Tensor] = {}
    for planned in plan_shards(items):
        image = made(planned, data, block)
        tensors_of = load(image)
        assert set(tensors_of) == {tensor.name for tensor in planned.tensors}
        for tensor, offset in zip(planned.tensors, planned.offsets, strict=True):
            own = raw(tensors_of[tensor.name])
            assert image[offset : offset + len(own)] == own
        found |= tensors_of
        numbers = [
            number
            for one in planned.tasks
            for number in range(one.first_part, one.first_part + len(one.parts))
        ]
        assert numbers == list(range(1, planned.first_tail_part))
        if len(planned.tasks) > 1:
            assert min(size for one in planned.tasks for size in one.parts) >= part
    wanted = expected(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_whole_words_keep_their_places():
    """Without tensors of odd sizes every tensor lies at a multiple of its entries' size, as loaders like it."""
    scheme = QuantScheme(num_bits=4, strategy="group", group_size=32)
    shapes = {"a": (64, 64), "b": (40, 96), "norm": (3,), "c": (128, 32)}
    model = [
        (f"{name}.weight", torch.ones(shape, dtype=torch.bfloat16), Treatment(scheme=scheme, layout=PACK))
        if len(shape) == 2
        else (name, torch.ones(shape), Treatment())
        for name, shape in shapes.items()
    ]
    (shard,) = plan_shards(source_of(model)[0])
    for tensor, offset in zip(shard.tensors, shard.offsets, strict=True):
        assert offset % tensor.item_bytes == 0


def test_a_large_tensor_is_spread_over_tasks_and_small_ones_share_one():
    scheme = QuantScheme(num_bits=4, strategy="group", group_size=128)
    huge = Item(
        name="huge.weight",
        path="a",
        etag="e",
        offset_bytes=100,
        size_bytes=600_000_000,
        dtype="BF16",
        shape=(100_000, 3_000),
        treatment=Treatment(scheme=fitted(scheme, 3_000), layout=PACK),
    )
    tiny = [
        Item(
            name=f"norm{index}.weight",
            path="a",
            etag="e",
            offset_bytes=600_000_100 + 64 * index,
            size_bytes=64,
            dtype="BF16",
            shape=(32,),
            treatment=Treatment(),
        )
        for index in range(1000)
    ]
    (shard,) = plan_shards([huge, *tiny])
    sizes = [sum(piece.source_bytes for piece in task.pieces) for task in shard.tasks]
    assert len(sizes) == math.ceil(600_000_000 / checkpoint_layout.TASK_BYTES)
    assert max(sizes) < checkpoint_layout.TASK_BYTES + 100_000
    for task in shard.tasks:
        assert min(task.parts) >= 8 << 20
        assert len(list(blocks(task.pieces, 16 << 20))) == requests(task.pieces, 16 << 20)
        assert max(block.bytes for block in blocks(task.pieces, 16 << 20)) <= 16 << 20
    assert sum(len(task.pieces) for task in shard.tasks[-1:]) == 1001
