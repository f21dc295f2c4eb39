"""Data-parallel training on several Ray workers: Ray Train starts them, gloo sums their gradients."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

import ray.train
import torch
import torch.distributed
from ray.exceptions import RayTaskError
from ray.train.torch import TorchConfig, TorchTrainer

from fleetpress.storage.traffic import counted, note_read, note_written

from ..tasks import StepResult, Task, step_result_from_json, to_json
from ..worker import RunRank, classify
from . import ray_cluster

_DEATH = "a training worker died"

# Read by Ray Train where `fit` is called.
_TRAIN_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative folders of a spec keep their meaning on the workers
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # by default the end of training is seen up to 2 s late
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nothing is saved half-way, so a warning would not help
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


class TorchDistributedCollective:
    """The `Collective` of a training rank, by the default process group of torch.distributed."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, which all end with the same bits."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor.detach() for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])  # one message, whatever their strides
            _all_reduce(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in alike])
            for tensor, part in zip(alike, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def differentiable_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks; the gradient of each rank's input is the sum of the gradients of all outputs."""
        summed: torch.Tensor = _Sum.apply(tensor)  # type: ignore[no-untyped-call]
        return summed


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return _sum_over_ranks(tensor)

    @staticmethod
    def backward(_context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return _sum_over_ranks(gradients[0])


def _sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    summed = tensor.clone(memory_format=torch.contiguous_format)
    _all_reduce(summed)
    return summed


def _all_reduce(tensor: torch.Tensor) -> None:
    try:
        torch.distributed.all_reduce(tensor)
    except RuntimeError as error:  # gloo's only way to say that a peer is gone
        raise ConnectionError(_DEATH) from error


class _Trainer(TorchTrainer):
    """Without Ray Data, of which nothing is used: one process less for each training, and its import on no worker."""

    def _create_default_callbacks(self) -> list[Any]:
        made: list[Any] = super()._create_default_callbacks()  # type: ignore[misc] # private: a Ray without it never asks
        return [callback for callback in made if type(callback).__name__ != "DatasetsCallback"]


def run_on_workers(
    task: Task, run_rank: RunRank, workers: int, variables: Mapping[str, str] | None = None
) -> StepResult:
    """What rank 0 returned, after `run_rank` ran on `workers` workers of one CPU (and `task.memory_bytes`) each.

    `variables` are AWS_* variables for the workers, None to leave theirs alone. Raises what a rank raised.
    The caller has made sure that the cluster has room: Ray Train would wait for ever.
    """
    os.environ.update(_TRAIN_SETTINGS)
    room = {"CPU": 1.0} | ({"memory": float(task.memory_bytes)} if task.memory_bytes else {})
    room |= {"GPU": task.gpus} if task.gpus else {}
    with tempfile.TemporaryDirectory(prefix="fleetpress-train-") as folder:
        trainer = _Trainer(
            _train_rank,  # type: ignore[arg-type]  # what rank 0 returns is kept since Ray 2.5x
            train_loop_config={"task": task, "run_rank": run_rank, "variables": variables},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers, use_gpu=bool(task.gpus), resources_per_worker=room
            ),
            run_config=ray.train.RunConfig(
                name="training", storage_path=folder, failure_config=ray.train.FailureConfig(max_failures=0)
            ),
        )
        try:
            result: Any = trainer.fit()  # its declared class is the one of Ray Train's first version
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from error
    answer = result.return_value
    for note, size_bytes in zip((note_read, note_written), answer["moved"], strict=True):
        note(size_bytes)  # by all ranks, for the task in this process
    return step_result_from_json(answer["result"])


def _train_rank(config: dict[str, Any]) -> dict[str, Any] | None:
    torch.set_num_threads(1)
    if config["variables"] is not None:
        ray_cluster.adopt_aws_variables(config["variables"])
    # Ray Train never gives back the CPUs of a group that loses a rank before all of them have begun.
    torch.distributed.barrier()
    with counted() as traffic:
        result = config["run_rank"](config["task"], TorchDistributedCollective())
    moved = torch.tensor([traffic.bytes_read, traffic.bytes_written])
    _all_reduce(moved)
    return None if result is None else {"result": to_json(result), "moved": moved.tolist()}


def _cause(error: ray.train.TrainingFailedError) -> BaseException:
    """What began the end of the group: a rank's own error rather than a lost connection to another rank."""
    failures = error.worker_failures.values() if isinstance(error, ray.train.WorkerGroupError) else ()
    raised = [failure for failure in failures if not _is_of_ray(failure)]
    if not raised:
        return ConnectionError(_DEATH)
    return min(raised, key=lambda failure: classify(failure) == "transient")


def _is_of_ray(failure: BaseException) -> bool:
    """True for what Ray says of a rank, a failed health check for one; False for what the rank itself raised."""
    return type(failure).__module__.startswith("ray.") and not isinstance(failure, RayTaskError)
