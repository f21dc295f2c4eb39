"""The small nets, and programs exported from them: `architecture` runs a test on every one of them."""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export


def _load(name: str, file: str) -> ModuleType:
    """Test modules are imported by path, so these are, too; that keeps `tests` from being a package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_MODULE = _load("fleetpress_test_architectures", "architectures.py")
_SEQUENCE = _load("fleetpress_test_architectures_sequence", "architectures_sequence.py")
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
