"""What gradients are computed on: the processor, or the GPU that a task was given. Written once, for every step.

Only training and the collection of gradient statistics move there; their results come back to the processor's memory,
where everything else happens.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx

from fleetpress.compression.errors import DeviceMissingError

CPU = torch.device("cpu")


def pick(*, gpu: bool) -> torch.device:
    """The GPU of this process if the work is to be done on one, the processor otherwise.

    Ray shows a task its own GPUs only, so the first one is it. Raises DeviceMissingError rather than to compute other
    bits than were asked for.
    """
    if not gpu:
        return CPU
    if not torch.cuda.is_available():
        raise DeviceMissingError(
            "the step is to run on a GPU (resources.gpus_per_task), and torch finds none here: install a torch that is "
            "built for the GPU and its driver on every node, or leave gpus_per_task out"
        )
    return torch.device("cuda")


def random_devices(device: torch.device) -> list[torch.device]:
    """The devices whose random numbers a step leaves as it found them, beside the processor's."""
    return [device] if device.type == "cuda" else []


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Inside, a GPU sums in the same order every time, wherever torch has such a kernel, and in full float32.

    The processor does so by itself, on one thread.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False  # it chooses kernels by how fast they are today
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[2:4]
        torch.backends.cudnn.benchmark = before[4]


def to_device(module: fx.GraphModule, device: torch.device) -> None:
    """Move a module of one's own, and what its graphs say of devices: exported programs name the one they came from."""
    if device == CPU:
        return
    module.to(device)
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor):  # a constant that is no buffer
                setattr(part, name, value.to(device))
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args = _moved(node.args, device)
                node.kwargs = {name: _moved(value, device) for name, value in node.kwargs.items()}
            part.recompile()


def batch_on(device: torch.device, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays of a batch on the device."""
    return {name: array.to(device) for name, array in batch.items()}


def _moved(value: object, device: torch.device) -> object:
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return device if isinstance(value, torch.device) else value
