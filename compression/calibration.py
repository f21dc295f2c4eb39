"""What a program's layers see: inputs of every weight, and gradients of its outputs. Sums, so that they merge.

An input row is what one output position multiplies with a unit's row of the weight: `columns` entries in the order of
`quantization.weight.to_rows` (for a convolution the patch, channels first). Everything is kept as sums over input rows,
so that statistics of disjoint samples add up, whoever collected them; in a fixed order they add up to the same bits.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fleetpress.compression.errors import DataMismatchError

WHOLE_COLUMNS = 4096  # up to here products of all pairs of columns are kept,
BLOCK_COLUMNS = 512  # beyond only those within blocks of neighbours: a row of 65,536 would take 17 GB
_SAMPLES = "samples"
_SAME = "|same|"


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Sums over `rows` input rows x of a weight; a convolution with groups has one set for each of its G groups.

    `total` [G, columns]: sum of x; `squares` [G, columns]: sum of x^2, both float64. `gram` [G, blocks, size, size]:
    sum of x x^T within blocks of `size` neighbouring columns, float32, zero beyond the last column. `range` [2]: the
    smallest and the largest entry, float32. `histogram` [4096]: how many entries have which upper 12 bits as float32
    (sign, exponent, three digits), int64.
    """

    rows: int
    total: Tensor
    squares: Tensor
    gram: Tensor
    range: Tensor
    histogram: Tensor | None = None

    @property
    def groups(self) -> int:
        """Groups of the convolution; 1 for everything else."""
        return self.total.shape[0]

    @property
    def columns(self) -> int:
        """Entries of an input row."""
        return self.total.shape[1]

    @property
    def mean(self) -> Tensor:
        """Mean input row, float64 [G, columns]."""
        return self.total / max(1, self.rows)

    @property
    def root_mean_square(self) -> Tensor:
        """Root mean square of every column, float64 [G, columns]."""
        return (self.squares / max(1, self.rows)).sqrt()

    @property
    def is_whole(self) -> bool:
        """Whether the products of all pairs of columns are known, not only those within blocks."""
        return self.gram.shape[1] == 1

    def group(self, index: int) -> "InputStatistics":
        """Those of one group of a convolution, as of a weight of its own."""
        at = slice(index, index + 1)
        return replace(self, total=self.total[at], squares=self.squares[at], gram=self.gram[at])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns and their sum of x x^T [n, n], block by block; of a weight without groups."""
        size = self.gram.shape[-1]
        for index, block in enumerate(self.gram[0]):
            start, stop = index * size, min((index + 1) * size, self.columns)
            yield slice(start, stop), block[: stop - start, : stop - start]

    def merge(self, other: "InputStatistics") -> "InputStatistics":
        """Those over both sets of rows."""
        low, high = torch.minimum(self.range, other.range)[0], torch.maximum(self.range, other.range)[1]
        return InputStatistics(
            rows=self.rows + other.rows,
            total=self.total + other.total,
            squares=self.squares + other.squares,
            gram=self.gram + other.gram,
            range=torch.stack([low, high]),
            histogram=_added(self.histogram, other.histogram),
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
            raise DataMismatchError(
                "calibration statistics of different programs cannot be merged; collect them again"
            )
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
                found[f"{name}|rows"] = torch.tensor([item.inputs.rows])
                for part in ("total", "squares", "gram", "range", "histogram"):
                    if getattr(item.inputs, part) is not None:
                        found[f"{name}|{part}"] = getattr(item.inputs, part)
            else:
                found[f"{name}{_SAME}{owner}"] = torch.zeros(1)
            if item.output_squares is not None:
                found[f"{name}|output_squares"] = item.output_squares
        return found

    @classmethod
    def from_tensors(cls, values: Mapping[str, Tensor]) -> "CalibrationStatistics":
        """What `to_tensors` gave. Raises DataMismatchError for tensors that lack something."""
        owners = {
            key.removesuffix("|rows"): key.removesuffix("|rows") for key in values if key.endswith("|rows")
        }
        owners |= {name: owner for name, same, owner in (key.partition(_SAME) for key in values) if same}
        try:
            inputs = {
                owner: InputStatistics(
                    rows=int(values[f"{owner}|rows"]),
                    total=values[f"{owner}|total"],
                    squares=values[f"{owner}|squares"],
                    gram=values[f"{owner}|gram"],
                    range=values[f"{owner}|range"],
                    histogram=values.get(f"{owner}|histogram"),
                )
                for owner in sorted(set(owners.values()))
            }
            return cls(
                weights={
                    name: WeightStatistics(
                        inputs=inputs[owners[name]], output_squares=values.get(f"{name}|output_squares")
                    )
                    for name in sorted(owners)
                },
                samples=int(values[_SAMPLES]),
            )
        except KeyError as error:
            raise DataMismatchError(f"calibration statistics lack {error}; collect them again") from error


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one + other


def _shapes(statistics: CalibrationStatistics) -> dict[str, tuple[tuple[int, ...], bool]]:
    return {
        name: (tuple(item.inputs.gram.shape), item.output_squares is not None)
        for name, item in statistics.weights.items()
    }
