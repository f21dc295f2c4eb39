"""What a program's layers see: inputs of every weight, and gradients of its outputs. Sums, so that they merge.

An input row is what one output position multiplies with a unit's row of the weight: `columns` entries in the order of
`quantization.weight.to_rows` (for a convolution the patch, channels first). Everything is kept as sums over input rows,
so that statistics of disjoint samples add up, whoever collected them; in a fixed order they add up to the same bits.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fleetpress.compression.errors import DataMismatchError
from fleetpress.compression.triangles import add_to_upper, mirror_upper, packed_upper

WHOLE_COLUMNS = 16_384  # up to here products of all pairs of columns are kept: 1 GiB
BLOCK_COLUMNS = 2048  # beyond only those within blocks of neighbours: all of a row of 65,536 would take 17 GB
NARROW_COLUMNS = 4096  # up to here all are kept whatever else there is,
LEAST_BLOCK_COLUMNS = 512  # and blocks are never smaller than this
_PRODUCT_BYTES = 4
_SAMPLES = "samples"
_SAME = "|same|"


def block_columns(columns: int, most_bytes: int | None = None) -> int:
    """Within how many neighbouring columns products are kept: all of them, or a power of two.

    With `most_bytes` as many as fit into that, but never fewer than LEAST_BLOCK_COLUMNS.
    """
    if columns <= NARROW_COLUMNS:
        return columns
    if most_bytes is None:
        return columns if columns <= WHOLE_COLUMNS else BLOCK_COLUMNS
    fitting = most_bytes // (_PRODUCT_BYTES * columns)
    if columns <= min(fitting, WHOLE_COLUMNS):
        return columns
    return max(LEAST_BLOCK_COLUMNS, 1 << max(0, min(fitting, WHOLE_COLUMNS).bit_length() - 1))


def products_bytes(columns: int) -> int:
    """Of the products of a row's columns as `InputStatistics` holds them."""
    size = block_columns(columns)
    return _PRODUCT_BYTES * size * size * -(-columns // size)


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Sums over `rows` input rows x of a weight; a convolution with groups has one set for each of its G groups.

    `total` [G, columns]: sum of x; `squares` [G, columns]: sum of x^2, both float64. `gram` [G, blocks, size, size]:
    sum of x x^T within blocks of `size` neighbouring columns, float32, zero beyond the last column. Where rows do not
    count alike each of these is times its row's importance, and `importance` [G] is the sum of those, float64. `range`
    [2]: the smallest and the largest entry, float32. `histogram` [4096]: how many entries have which upper 12 bits as
    float32 (sign, exponent, three digits), int64.
    """

    rows: int
    total: Tensor
    squares: Tensor
    gram: Tensor
    range: Tensor
    histogram: Tensor | None = None
    importance: Tensor | None = None

    @property
    def groups(self) -> int:
        """Groups of the convolution; 1 for everything else."""
        return self.total.shape[0]

    @property
    def columns(self) -> int:
        """Entries of an input row."""
        return self.total.shape[1]

    @property
    def counted(self) -> Tensor:
        """What sums are divided by for means, float64 [G, 1]: the rows, or their importance; 1 where that is 0."""
        if self.importance is None:
            return torch.full((self.groups, 1), max(1, self.rows), dtype=torch.float64)
        return self.importance.where(self.importance > 0, 1.0).unsqueeze(1)

    @property
    def mean(self) -> Tensor:
        """Mean input row, float64 [G, columns]."""
        return self.total / self.counted

    @property
    def mean_square(self) -> Tensor:
        """Mean square of every column, float64 [G, columns]."""
        return self.squares / self.counted

    @property
    def root_mean_square(self) -> Tensor:
        """Root mean square of every column, float64 [G, columns]."""
        return self.mean_square.sqrt()

    @property
    def is_whole(self) -> bool:
        """Whether the products of all pairs of columns are known, not only those within blocks."""
        return self.gram.shape[1] == 1

    def group(self, index: int) -> "InputStatistics":
        """Those of one group of a convolution, as of a weight of its own."""
        at = slice(index, index + 1)
        return replace(
            self,
            total=self.total[at],
            squares=self.squares[at],
            gram=self.gram[at],
            importance=None if self.importance is None else self.importance[at],
        )

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns and their sum of x x^T [n, n], block by block; of a weight without groups."""
        size = self.gram.shape[-1]
        for index, block in enumerate(self.gram[0]):
            start, stop = index * size, min((index + 1) * size, self.columns)
            yield slice(start, stop), block[: stop - start, : stop - start]

    def to_tensors(self) -> dict[str, Tensor]:
        """Plain tensors, with the products' upper triangles only: what `summed` takes."""
        return input_tensors(
            rows=self.rows,
            total=self.total,
            squares=self.squares,
            triangles=packed_upper(self.gram),
            size=self.gram.shape[-1],
            range=self.range,
            histogram=self.histogram,
            importance=self.importance,
        )

    @classmethod
    def summed(cls, parts: Iterable[Mapping[str, Tensor]]) -> "InputStatistics":
        """Those over the disjoint rows of all parts, each what `to_tensors` gave, added up in their order.

        Of products there is one set in memory, and one part. Raises KeyError for parts that lack something,
        DataMismatchError for parts of different layers, and for none at all.
        """
        found = _Growing()
        for part in parts:
            found.add(part)
        return found.done()

    def merge(self, other: "InputStatistics") -> "InputStatistics":
        """Those over both sets of rows; raises DataMismatchError where those of one alone count alike."""
        if (self.importance is None) != (other.importance is None):
            raise _other_programs()
        low, high = torch.minimum(self.range, other.range)[0], torch.maximum(self.range, other.range)[1]
        return InputStatistics(
            rows=self.rows + other.rows,
            total=self.total + other.total,
            squares=self.squares + other.squares,
            gram=self.gram + other.gram,
            range=torch.stack([low, high]),
            histogram=_added(self.histogram, other.histogram),
            importance=_added(self.importance, other.importance),
        )


@dataclass(frozen=True, kw_only=True)
class WeightStatistics:
    """Of one weight: its `inputs`, and `output_squares` [units]: the sum over output positions of the squared gradient
    of the summed loss with respect to the unit's output, float64; None where no loss was given, and for weights of
    recurrent layers.
    """

    inputs: InputStatistics
    output_squares: Tensor | None = None

    def group(self, index: int) -> "WeightStatistics":
        """Those of one group of a convolution, as of a weight of its own."""
        squares = self.output_squares
        mine = None if squares is None else squares.chunk(self.inputs.groups)[index]
        return WeightStatistics(inputs=self.inputs.group(index), output_squares=mine)


@dataclass(frozen=True, kw_only=True)
class CalibrationStatistics:
    """By the state name of each weight, over `samples` samples. Weights that read the same inputs share one object.

    Of tied weights the first one stands for all. Embeddings and transposed convolutions are missing.
    """

    weights: Mapping[str, WeightStatistics]
    samples: int

    def merge(self, other: "CalibrationStatistics") -> "CalibrationStatistics":
        """The statistics over both sets of samples, which must be disjoint and of the same program."""
        if _shapes(self) != _shapes(other):
            raise _other_programs()
        merged: dict[tuple[int, int], InputStatistics] = {}
        found = {}
        for name, mine in self.weights.items():
            theirs = other.weights[name]
            pair = id(mine.inputs), id(theirs.inputs)
            if pair not in merged:
                merged[pair] = mine.inputs.merge(theirs.inputs)
            found[name] = WeightStatistics(
                inputs=merged[pair], output_squares=_added(mine.output_squares, theirs.output_squares)
            )
        return CalibrationStatistics(weights=found, samples=self.samples + other.samples)

    def to_tensors(self) -> dict[str, Tensor]:
        """Plain tensors by name, for a file."""
        found = {_SAMPLES: torch.tensor([self.samples])}
        owners: dict[int, str] = {}
        for name, item in self.weights.items():
            owner = owners.setdefault(id(item.inputs), name)
            if owner == name:
                found |= {f"{name}|{part}": value for part, value in item.inputs.to_tensors().items()}
            else:
                found[f"{name}{_SAME}{owner}"] = torch.zeros(1)
            if item.output_squares is not None:
                found[f"{name}|output_squares"] = item.output_squares
        return found

    @classmethod
    def from_tensors(cls, values: Mapping[str, Tensor]) -> "CalibrationStatistics":
        """What `to_tensors` gave. Raises DataMismatchError for tensors that lack something."""
        return cls.summed([values])

    @classmethod
    def summed(cls, parts: Iterable[Mapping[str, Tensor]]) -> "CalibrationStatistics":
        """The statistics over the disjoint samples of all parts, each what `to_tensors` gave, added up in their order.

        Of products there is one set in memory, and one part. Raises DataMismatchError for parts of different programs,
        and for tensors that lack something.
        """
        owners: dict[str, str] = {}
        inputs: dict[str, _Growing] = {}
        squares: dict[str, Tensor | None] = {}
        samples = 0
        try:
            for values in parts:
                mine = _owners(values)
                known = {name: values.get(f"{name}|output_squares") for name in mine}
                if not inputs:
                    owners, squares = mine, known
                    inputs = {owner: _Growing() for owner in sorted(set(mine.values()))}
                elif owners != mine or {name for name in mine if squares[name] is None} != {
                    name for name in mine if known[name] is None
                }:
                    raise _other_programs()
                else:
                    squares = {name: _added(squares[name], known[name]) for name in owners}
                for owner, growing in inputs.items():
                    growing.add({part: values[f"{owner}|{part}"] for part in _parts_of(values, owner)})
                samples += int(values[_SAMPLES])
        except KeyError as error:
            raise DataMismatchError(f"calibration statistics lack {error}; collect them again") from error
        done = {owner: growing.done() for owner, growing in inputs.items()}
        return cls(
            weights={
                name: WeightStatistics(inputs=done[owners[name]], output_squares=squares[name])
                for name in sorted(owners)
            },
            samples=samples,
        )


def input_tensors(
    *,
    rows: int,
    total: Tensor,
    squares: Tensor,
    triangles: Tensor,
    size: int,
    range: Tensor,
    histogram: Tensor | None,
    importance: Tensor | None,
) -> dict[str, Tensor]:
    """What `InputStatistics.summed` takes: `triangles` [G, blocks, ...] are packed products of blocks of `size`."""
    told = {"rows": torch.tensor([rows]), "size": torch.tensor([size])}
    told |= {"total": total, "squares": squares, "triangles": triangles, "range": range}
    own = {"histogram": histogram, "importance": importance}
    return {**told, **{name: value for name, value in own.items() if value is not None}}


class _Growing:
    """Adds up what `input_tensors` gave, the products in one dense tensor."""

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._rest: InputStatistics | None = None

    def add(self, part: Mapping[str, Tensor]) -> None:
        """The next part."""
        triangles, size = part["triangles"], int(part["size"])
        groups, blocks, _ = triangles.shape
        shape = groups, blocks, size, size
        if self._gram is None:
            self._gram = torch.zeros(shape, dtype=triangles.dtype)
        elif self._gram.shape != shape:
            raise _other_programs()
        for matrix, packed in zip(self._gram.flatten(0, 1), triangles.flatten(0, 1), strict=True):
            add_to_upper(matrix, packed)
        mine = InputStatistics(
            rows=int(part["rows"]),
            total=part["total"],
            squares=part["squares"],
            gram=torch.empty(0),  # they are added up apart
            range=part["range"],
            histogram=part.get("histogram"),
            importance=part.get("importance"),
        )
        self._rest = mine if self._rest is None else self._rest.merge(mine)

    def done(self) -> InputStatistics:
        """All of it."""
        if self._gram is None or self._rest is None:
            raise DataMismatchError("there are no calibration statistics; collect some")
        for matrix in self._gram.flatten(0, 1):
            mirror_upper(matrix)
        return replace(self._rest, gram=self._gram)


def _owners(values: Mapping[str, Tensor]) -> dict[str, str]:
    """By the name of each weight the one that its inputs stand under."""
    told = [key.removesuffix("|rows") for key in values if key.endswith("|rows")]
    shared = (key.partition(_SAME) for key in values)
    return {name: name for name in told} | {name: owner for name, same, owner in shared if same}


def _parts_of(values: Mapping[str, Tensor], owner: str) -> Sequence[str]:
    needed = ["rows", "size", "total", "squares", "triangles", "range"]
    return [*needed, *(part for part in ("histogram", "importance") if f"{owner}|{part}" in values)]


def _other_programs() -> DataMismatchError:
    return DataMismatchError(
        "calibration statistics of different programs cannot be merged; collect them again"
    )


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one + other


def _shapes(statistics: CalibrationStatistics) -> dict[str, tuple[tuple[int, ...], bool]]:
    return {
        name: (tuple(item.inputs.gram.shape), item.output_squares is not None)
        for name, item in statistics.weights.items()
    }
