"""What the layers of a block read: the statistics of `calibration`, by the checkpoint's names of their weights.

Linear layers show their inputs through hooks. Experts that a model holds together in one tensor [experts, outputs,
inputs] are looked at where each of them is multiplied: an expert reads only the tokens that are sent to it.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fleetpress.compression.decoder.passage import Batch, advanced
from fleetpress.compression.decoder.skeleton import Skeleton
from fleetpress.compression.input_sums import InputSums

_EXPERT = re.compile(r"experts\.(\d+)\.")
_Place = tuple[str, int]  # a parameter, and which of its matrices


class Observer:
    """Looks at what the layers of block `index` read, whose weights are there; sums over all that it has seen.

    `weights` are names of matrices in the checkpoint. Positions of padding are left out, except by experts.
    """

    def __init__(self, skeleton: Skeleton, index: int, weights: Collection[str]) -> None:
        self._skeleton, self._index = skeleton, index
        self._block = skeleton.blocks[index]
        self._names = _by_place(skeleton, weights)
        self._sums: dict[_Place, InputSums] = {}
        self._leaders: dict[_Place, _Place] = {}  # the first layer that reads the same tensor
        self._kept: Tensor | None = None
        parameters = dict(skeleton.model.named_parameters())
        owners = {
            id(module.weight): module for module in self._block.modules() if isinstance(module, nn.Linear)
        }
        self._layers: list[tuple[nn.Module, _Place]] = []
        self._experts: dict[int, tuple[str, Tensor]] = {}
        for place in self._names:
            parameter = parameters.get(place[0])
            if parameter is None:
                continue
            if parameter.dim() == 3:
                self._experts[parameter.untyped_storage().data_ptr()] = place[0], parameter
            elif id(parameter) in owners:
                self._layers.append((owners[id(parameter)], place))

    def see(self, batch: Batch, hidden: Sequence[Tensor]) -> None:
        """Send hidden states, which enter the block, through it: one tensor for each of the batch's parts."""
        for (_, part), states in zip(batch.parts(), hidden, strict=True):
            self._kept = part.kept
            self._inputs: list[tuple[Tensor, _Place]] = []
            with self._looking():
                advanced(self._skeleton, self._index, part, states)
        self._inputs = []

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Inside, what the block's layers read is added up."""
        hooks = [module.register_forward_pre_hook(self._seeing(place)) for module, place in self._layers]
        try:
            with _Products(self._multiplied) if self._experts else torch.no_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def found(self) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
        """What `InputStatistics.summed` takes, with the names of all weights that read it, in the order of names.

        Weights that read nothing, or whose layers cannot be watched, are missing. Each is given once, and then up.
        """
        together: dict[_Place, list[str]] = {}
        for place, leader in self._leaders.items():
            together.setdefault(leader, []).extend(self._names.get(place, ()))
        for names, leader in sorted((tuple(sorted(names)), leader) for leader, names in together.items()):
            sums = self._sums.pop(leader, None)
            if not names or sums is None:
                continue
            tensors = sums.tensors(names[0])
            if tensors is not None:
                yield names, tensors

    def _seeing(self, place: _Place) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._see(place, args[0], self._kept)

        return see

    def _multiplied(self, inputs: Tensor, weight: Tensor) -> None:
        """An expert's product: which one it is tells the place of its weight in the tensor of all."""
        known = self._experts.get(weight.untyped_storage().data_ptr())
        if known is None:
            return
        name, all_of_them = known
        self._see((name, weight.storage_offset() // all_of_them.stride(0)), inputs, kept=None)

    def _see(self, place: _Place, x: Tensor, kept: Tensor | None) -> None:
        if not x.numel():
            return  # what has no numbers tells nothing, not even whether it is the same
        x = x.detach()
        same = next((other for seen, other in self._inputs if seen is x or _is_same(seen, x)), None)
        leader = self._leaders.setdefault(place, place if same is None else same)
        if leader != place:
            return  # what it reads was added up when the first layer read it
        self._inputs.append((x, place))
        rows = x.reshape(-1, x.shape[-1])
        if kept is not None and len(rows) == len(kept):
            rows = rows[kept]
        if not len(rows):
            return
        sums = self._sums.setdefault(place, InputSums())
        sums.add_range(rows)
        sums.add(rows.unsqueeze(1))


class _Products(TorchFunctionMode):
    """Shows every call of `linear`."""

    def __init__(self, see: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and len(args) >= 2:
            self._see(args[0], args[1])
        return func(*args, **(kwargs or {}))


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of the same numbers."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def _by_place(skeleton: Skeleton, weights: Collection[str]) -> dict[_Place, list[str]]:
    """Names of weights by where the model holds them."""
    found: dict[_Place, list[str]] = {}
    for name in weights:
        expert = _EXPERT.search(name)
        place = skeleton.place_of(name)
        if place is None and expert:  # a matrix within a checkpoint's tensor of all experts
            place = _together(skeleton, name, expert)
        if place is not None:
            found.setdefault((place, int(expert[1]) if expert else 0), []).append(name)
    return found


def _together(skeleton: Skeleton, name: str, expert: re.Match[str]) -> str | None:
    """The parameter that holds an expert's matrix, where the checkpoint holds them together, too."""
    path, kind = name[: expert.start()], name[expert.end() :].removesuffix(".weight")
    return skeleton.place_of(f"{path}experts.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}")
