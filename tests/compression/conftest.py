"""The small nets, and programs exported from them: `architecture` runs a test on every one of them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import load
from torch import nn
from torch.export import Dim, ExportedProgram, export

HERE = Path(__file__).parent
_MODULE = load("fleetpress_test_architectures", HERE / "architectures.py")
_SEQUENCE = load("fleetpress_test_architectures_sequence", HERE / "architectures_sequence.py")
_ARCHITECTURES = {**_MODULE.ARCHITECTURES, **_SEQUENCE.ARCHITECTURES}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", list(_ARCHITECTURES))


@cache
def _exported(name: str, dynamic: bool) -> tuple[nn.Module, ExportedProgram]:
    torch.manual_seed(0)
    model = _MODULE.randomise(_ARCHITECTURES[name].build())
    sample = (_ARCHITECTURES[name].inputs(3),)
    return model, export(model, sample, dynamic_shapes=({0: Dim.AUTO},) if dynamic else None)


@pytest.fixture(scope="session")
def architectures() -> dict[str, Any]:
    """`Architecture`s by name."""
    return dict(_ARCHITECTURES)


@pytest.fixture(scope="session")
def exported() -> Callable[[str, bool], tuple[nn.Module, ExportedProgram]]:
    """`exported(name, dynamic)`: a net of float64 weights in eval mode, and its program; batch 3 if not dynamic."""
    return _exported


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small nets are slower on several threads, and sums come out differently."""
    torch.set_num_threads(1)
