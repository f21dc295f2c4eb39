"""The k centers with the smallest (weighted) squared error of numbers: k-means in one dimension.

Clusters of numbers are runs of the sorted numbers, so sums over a cluster are differences of prefix sums. Lloyd's
iterations then cost a look-up a center, whatever the count of numbers. They start from three places, and the best end
wins: evenly over the range (Han et al. 2015, Deep Compression, arXiv:1510.00149: "linear initialization"), evenly over
the numbers, and the exact optimum of at most `_BINS` runs by dynamic programming (Wang and Song 2011, Ckmeans.1d.dp,
The R Journal 3/2). With no more distinct numbers than that, the last one is the optimum itself.
"""

import torch
from torch import Tensor
from torch.nn import functional

_BINS = {16: 1024, 256: 512}  # by the count of centers: about 0.1 s each
_MOST_ITERATIONS = 2000
_MOST_PLACES = 1 << 22  # 130 MB of sums
_TILE_ROWS = 1 << 20


class SortedNumbers:
    """Numbers in order, with the sums of everything below each place, in float64.

    A place is a number, or of very many numbers a few neighbours that always stay together.
    """

    def __init__(self, numbers: Tensor, weights: Tensor | None = None) -> None:
        """`numbers` [n] and their `weights` [n], 1 each if left out."""
        ordered = numbers.sort(stable=True)
        together = -(-len(numbers) // _MOST_PLACES)
        missing = -len(numbers) % together
        values, mass = ordered.values, None
        if weights is not None:
            mass = weights.index_select(0, ordered.indices)
        del ordered
        if missing:
            mass = torch.ones_like(values) if mass is None else mass
            values, mass = (
                torch.cat([values, values[-1:].expand(missing)]),
                functional.pad(mass, (0, missing)),
            )
        values = values.view(-1, together)
        mass = torch.ones(1, 1).expand(values.shape) if mass is None else mass.view(-1, together)
        sums = torch.zeros(3, len(values) + 1, dtype=torch.float64)
        for start in range(0, len(values), _TILE_ROWS):
            at = slice(start, start + _TILE_ROWS)
            number, moment = values[at].double(), mass[at].double()
            for power in range(3):
                sums[power, 1:][at] = moment.sum(1)
                moment = moment * number
        self.values = values[:, 0].double()
        self.mass, self.first, self.second = sums.cumsum(1)

    def edges(self, centers: Tensor) -> Tensor:
        """Where the clusters of ascending `centers` [k] begin and end, [k + 1]."""
        between = (centers[1:] + centers[:-1]) / 2
        inner = torch.searchsorted(self.values, between, right=True)
        ends = torch.tensor([0, len(self.values)])
        return torch.cat([ends[:1], inner, ends[1:]])

    def error(self, centers: Tensor) -> float:
        """The sum of squared distances to the nearest center."""
        mass, first, second = self._sums(self.edges(centers))
        return float((second - 2 * centers * first + centers.square() * mass).clamp(min=0).sum())

    def means(self, edges: Tensor, otherwise: Tensor) -> Tensor:
        """The mean of every cluster, `otherwise` [k] of those without weight."""
        mass, first, _ = self._sums(edges)
        return torch.where(mass > 0, first / mass.clamp(min=torch.finfo(mass.dtype).tiny), otherwise)

    def _sums(self, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mass, first, second = (
            sums[edges[1:]] - sums[edges[:-1]] for sums in (self.mass, self.first, self.second)
        )
        return mass, first, second


def best_centers(numbers: SortedNumbers, count: int, *, keep_zero: bool = False) -> Tensor:
    """`count` ascending centers, float64, of numbers of which there is at least one; the last ones may be equal.

    With `keep_zero`, for numbers with a zero among them, one is exactly zero. The same numbers give the same centers on
    any number of threads.
    """
    distinct = torch.unique_consecutive(numbers.values)
    if len(distinct) <= count:
        return torch.cat([distinct, distinct[-1:].expand(count - len(distinct))])
    found = [
        _settled(numbers, start)
        for start in (
            torch.linspace(float(distinct[0]), float(distinct[-1]), count, dtype=torch.float64),
            _quantiles(numbers, count),
            _best_of_runs(numbers, count, len(distinct)),
        )
    ]
    errors = [numbers.error(centers) for centers in found]
    best = found[errors.index(min(errors))]
    if not keep_zero:
        return best
    pinned = int(best.abs().argmin())
    best[pinned] = 0.0
    return _settled(numbers, best, pinned)


def _settled(numbers: SortedNumbers, centers: Tensor, pinned: int | None = None) -> Tensor:
    """Lloyd's iterations until nothing moves; the center `pinned` stays where it is."""
    edges = numbers.edges(centers)
    for _ in range(_MOST_ITERATIONS):
        moved = numbers.means(edges, centers)
        if pinned is not None:
            moved[pinned] = centers[pinned]
        centers = moved.sort().values
        after = numbers.edges(centers)
        if torch.equal(after, edges):
            break
        edges = after
    return centers


def _quantiles(numbers: SortedNumbers, count: int) -> Tensor:
    """The middles of `count` runs of equal weight."""
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count * numbers.mass[-1]
    places = torch.searchsorted(numbers.mass, shares).clamp(1, len(numbers.values)) - 1
    return numbers.values[places]


def _best_of_runs(numbers: SortedNumbers, count: int, distinct: int) -> Tensor:
    """Means of the best `count` clusters that are made of whole runs of neighbouring numbers."""
    edges = _runs(numbers, next(bins for most, bins in _BINS.items() if count <= most), distinct)
    mass, first, second = numbers.mass[edges], numbers.first[edges], numbers.second[edges]
    # costs[i, j]: the squared error of the numbers from edge i to edge j as one cluster.
    weight = mass[None, :] - mass[:, None]
    costs = (first[None, :] - first[:, None]).square_().div_(weight.clamp(min=torch.finfo(weight.dtype).tiny))
    costs = (second[None, :] - second[:, None]).sub_(costs).clamp_(min=0)
    costs.masked_fill_(torch.ones_like(costs, dtype=torch.bool).tril_(-1), torch.inf)
    best = costs[0]
    choices = []
    for _ in range(count - 1):
        best, choice = (best[:, None] + costs).min(0)
        choices.append(choice)
    ends = [len(edges) - 1]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    cuts = torch.tensor([0, *reversed(ends)])
    cuts = edges[cuts.sort().values]
    otherwise = numbers.values[cuts[1:].clamp(1, len(numbers.values)) - 1]
    return numbers.means(cuts, otherwise).sort().values


def _runs(numbers: SortedNumbers, most: int, distinct: int) -> Tensor:
    """Edges of at most `most` runs: every distinct number alone, else half evenly in count and half in range."""
    values = numbers.values
    last = torch.tensor([len(values)])
    if distinct <= most:
        starts = torch.cat([torch.ones(1, dtype=torch.bool), values[1:] != values[:-1]])
        return torch.cat([starts.nonzero()[:, 0], last])
    half = most // 2
    even = torch.arange(half) * len(values) // half
    steps = torch.linspace(float(values[0]), float(values[-1]), half, dtype=torch.float64)
    by_range = torch.searchsorted(values, steps)
    edges = torch.cat([even, by_range, last]).sort().values
    found: Tensor = torch.unique_consecutive(edges)
    return found
