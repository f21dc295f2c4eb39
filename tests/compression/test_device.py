"""Gradients on another device. No GPU is needed: the `meta` device refuses, as a GPU does, what lies elsewhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fleetpress.compression import training
from fleetpress.compression.device import CPU, batch_on, deterministic, pick, random_devices, to_device
from fleetpress.compression.errors import DeviceMissingError
from fleetpress.compression.evaluation import Runner
from fleetpress.compression.losses import LOSSES
from fleetpress.compression.modes import state_of, training_module
from fleetpress.compression.program import tensors
from fleetpress.compression.statistics import GradientCollector
from fleetpress.compression.training import TrainOptions

META = torch.device("meta")
CUDA = torch.device("cuda")


def test_the_processor_unless_a_gpu_is_asked_for() -> None:
    assert pick(gpu=False) == CPU


def test_no_other_device_takes_the_place_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceMissingError, match="gpus_per_task"):
        pick(gpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick(gpu=True) == CUDA


class Constants(nn.Module):
    """A net that makes tensors on the device that it was exported on, keeps a constant, and names the device."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.shift = torch.tensor([0.5, 1.0, 2.0])

    def forward(self, x: Tensor) -> Tensor:
        """Scores of [samples, 8]."""
        places = self.table(torch.arange(8))
        mask = torch.ones(8, dtype=torch.bool, device="cpu")
        hidden = (x.unsqueeze(-1).to("cpu") * places).masked_fill(~mask.unsqueeze(-1), 0.0).mean(1)
        return self.norm(self.head(hidden) + self.shift)


@pytest.fixture
def program() -> ExportedProgram:
    return torch.export.export(Constants().eval(), (torch.randn(4, 8),))


def assert_all_on_meta(program: ExportedProgram, inputs: dict[str, Tensor]) -> None:
    """Forward, backward and the statistics, in train mode and in eval mode; anything left on the CPU raises."""
    for module in (training_module(program), Runner(program, widen=True).module):
        to_device(module, META)
        outputs = training.run(module, program, batch_on(META, inputs))
        assert outputs.device == META
        params = training._parameters(module, program)
        gradients = torch.autograd.grad(
            outputs.square().mean(), list(params.values()), allow_unused=True, materialize_grads=True
        )
        collector = GradientCollector(program, META)
        collector.update(dict(zip(params, gradients, strict=True)))
        assert all(part.sums.weight.device == META for part in collector._parts)


def test_nothing_of_a_program_stays_behind(program: ExportedProgram) -> None:
    assert_all_on_meta(program, {"x": torch.randn(4, 8)})


def test_nothing_of_any_architecture_stays_behind(
    architecture: str,
    architectures: dict[str, Any],
    exported: Callable[..., tuple[nn.Module, ExportedProgram]],
) -> None:
    _, made = exported(architecture, True)
    name = next(iter(made.graph_signature.user_inputs))
    assert_all_on_meta(made, {str(name): architectures[architecture].inputs(3)})


def test_the_program_itself_stays_where_it_is(program: ExportedProgram) -> None:
    before = {name: value.clone() for name, value in tensors(program).items()}
    module = training_module(program)
    to_device(module, META)
    assert all(torch.equal(value, before[name]) for name, value in tensors(program).items())
    expected = Runner(program).outputs({"x": torch.ones(4, 8)})
    assert expected.device == CPU
    assert set(state_of(training_module(program), program)) == set(before)


def test_a_runner_on_a_device_takes_arrays_of_the_processor(program: ExportedProgram) -> None:
    assert Runner(program, device=META).outputs({"x": torch.ones(4, 8)}).device == META


def test_training_runs_where_it_is_told(program: ExportedProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of a step but reading the loss, which a tensor without data has not."""
    arrays = {"x": torch.randn(4, 8), "targets": torch.randn(4, 3)}
    run = training._Run(
        program,
        arrays,
        TrainOptions(batch_size=4),
        loss=LOSSES["mse"],
        teacher=None,
        collect=True,
        products=True,
        recurrent=False,
        weights=False,
        masks={name: value != 0 for name, value in tensors(program).items() if name.endswith("weight")},
        gradual=None,
        quantized={},
        collective=training.ALONE,
        device=META,
    )
    monkeypatch.setattr(training, "float", lambda value: 1.0 if value.device == META else None, raising=False)
    assert run.step(arrays) == (1.0, 4)
    assert all(parameter.device == META for parameter in run._params.values())
    assert run.collector is not None
    assert run.collector._batches == 1


def test_a_gpu_is_told_to_be_deterministic_and_told_no_more_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with deterministic(CPU):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(CUDA):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.allow_tf32
    assert (random_devices(CPU), random_devices(CUDA)) == ([], [CUDA])
