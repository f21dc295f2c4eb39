"""What the tasks need in memory that calibrate a block of a checkpoint: told from shapes, before any runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fleetpress.compression.calibration import block_columns, products_bytes
from fleetpress.compression.checkpoint.layers import holds_experts
from fleetpress.compression.triangles import packed_length
from fleetpress.storage.checkpoint import TensorLocation

from .layout import Item
from .memory import LIBRARIES_BYTES, TORCH_BYTES, TRANSFORMERS_BYTES

_COMPUTE_BYTES = 4  # of a weight, or a product, while it is worked on
_DOUBLE_BYTES = 8  # of one that is a double
# Copies of a weight that a method makes, in the dtype that it computes in (measured).
_COPIES = {"gptq": 5, "learned_rounding": 14}
_MOST_COPIES = 7


@dataclass(frozen=True, kw_only=True)
class BlockMemory:
    """What the tasks of a block of a calibrated checkpoint need, without hidden states, in bytes.

    `observing` is for a task that looks at what its layers read, `passing` what its weights add to another, `solving`
    for the matrix that needs most, `largest` (no matrix: "").
    """

    observing: int
    passing: int
    solving: int
    largest: str


def block_memory(places: Sequence[tuple[str, TensorLocation]], items: Sequence[Item]) -> BlockMemory:
    """Of the block that is made of these tensors, with the matrices of it that are calibrated."""
    libraries = LIBRARIES_BYTES + TORCH_BYTES
    weights = sum(_weight_bytes(name, at) for name, at in places)
    products = [_packed_bytes(columns) for columns in _readers(items)]
    # Written one after the other, with a copy each for the file and for its bytes, when the weights are gone.
    seen = sum(products) + max(weights, 2 * max(products, default=0))
    needs = {item.name: _solving_bytes(item) for item in items}
    largest = max(needs, key=needs.__getitem__, default="")
    return BlockMemory(
        observing=libraries + TRANSFORMERS_BYTES + seen,
        passing=sum(_COMPUTE_BYTES * math.prod(at.info.shape) for _, at in places),
        solving=libraries + needs.get(largest, 0),
        largest=largest,
    )


def _readers(items: Sequence[Item]) -> list[int]:
    """Columns of the inputs that a block's layers read: those of queries, keys and values are the same ones."""
    alike = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj", "w3": "w1"}
    found: dict[str, int] = {}
    for item in items:
        path, _, leaf = item.name.removesuffix(".weight").rpartition(".")
        found[f"{path}.{alike.get(leaf, leaf)}"] = item.shape[1]
    return list(found.values())


def _weight_bytes(name: str, at: TensorLocation) -> int:
    """Of a tensor while it is put into its block: as it is stored, and as it is run; experts are put together then."""
    copies = 2 if holds_experts(name, at.info.shape) or ".experts." in name else 1
    return at.info.size_bytes + copies * _COMPUTE_BYTES * math.prod(at.info.shape)


def _solving_bytes(item: Item) -> int:
    """Of one matrix: the products that its layer reads, and beside them those of one part, or a factor of all.

    Methods factor products in the dtype that they compute in, block by block.
    """
    rows, columns = item.geometry.rows, math.prod(item.shape[1:])
    compute = _DOUBLE_BYTES if item.dtype == "F64" else _COMPUTE_BYTES
    copies = _COPIES.get(item.treatment.method, _MOST_COPIES)
    beside = max(2 * _packed_bytes(columns), compute * block_columns(columns) ** 2)
    return products_bytes(columns) + beside + 2 * item.size_bytes + copies * compute * rows * columns


def _packed_bytes(columns: int) -> int:
    """Of the upper triangles of products of a row's columns."""
    size = block_columns(columns)
    return _COMPUTE_BYTES * packed_length(size) * -(-columns // size)
