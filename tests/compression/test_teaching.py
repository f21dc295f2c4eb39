"""A teacher's outputs are computed once where they are small, and mean the same."""

import pytest
import torch
from torch import Tensor, nn

from fleetpress.compression import training
from fleetpress.compression.evaluation import Runner
from fleetpress.compression.teaching import TEACHER, with_outputs
from fleetpress.compression.training import TrainOptions, train
from fleetpress.storage.programs import module_to_program


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def teacher() -> Runner:
    torch.manual_seed(0)
    return Runner(module_to_program(nn.Linear(24, 3).eval(), [_draw(2, 24)]))


def test_outputs_lie_beside_their_samples(teacher: Runner) -> None:
    arrays = {"inputs": _draw(11, 24), "targets": torch.zeros(11, dtype=torch.long)}
    found = with_outputs(arrays, teacher, 4)
    assert found.keys() == {"inputs", "targets", TEACHER}
    torch.testing.assert_close(found[TEACHER], teacher.outputs(arrays))


def test_large_outputs_are_not_kept(teacher: Runner) -> None:
    arrays = {"inputs": _draw(11, 24).to(torch.uint8)}
    assert with_outputs(arrays, teacher, 4) is arrays


def test_training_is_the_same_with_and_without(teacher: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"inputs": _draw(20, 24), "targets": torch.arange(20) % 3}
    torch.manual_seed(1)
    student = module_to_program(nn.Linear(24, 3).eval(), [_draw(2, 24)])
    options = TrainOptions(epochs=3, batch_size=8, lr=1e-2, distill=0.5)
    calls: list[int] = []
    outputs = Runner.outputs

    def counted(self: Runner, batch: dict[str, Tensor]) -> Tensor:
        calls.append(len(batch["inputs"]))
        return outputs(self, batch)

    monkeypatch.setattr(Runner, "outputs", counted)
    kept = train(student, arrays, options, loss="cross_entropy", seed=5, teacher=teacher.program)
    assert sum(calls) == 20
    monkeypatch.setattr(training, "with_outputs", lambda arrays, teacher, batch_size: arrays)
    each = train(student, arrays, options, loss="cross_entropy", seed=5, teacher=teacher.program)
    assert sum(calls) == 20 + 60
    for name, value in each.values.items():
        torch.testing.assert_close(kept.values[name], value)
