"""The small nets, and programs exported from them: `architecture` runs a test on every one of them."""

import importlib.util
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

# Test modules are imported by path, so this one is, too; that keeps `tests` from being a package.
_SPEC = importlib.util.spec_from_file_location(
    "fleetpress_test_architectures", Path(__file__).with_name("architectures.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _MODULE
_SPEC.loader.exec_module(_MODULE)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", list(_MODULE.ARCHITECTURES))


@lru_cache(maxsize=None)
def _exported(name: str, dynamic: bool) -> tuple[nn.Module, ExportedProgram]:
    torch.manual_seed(0)
    model = _MODULE.randomise(_MODULE.ARCHITECTURES[name].build())
    sample = (_MODULE.ARCHITECTURES[name].inputs(3),)
    return model, export(model, sample, dynamic_shapes=({0: Dim.AUTO},) if dynamic else None)


@pytest.fixture(scope="session")
def architectures() -> dict[str, Any]:
    """`Architecture`s by name."""
    return dict(_MODULE.ARCHITECTURES)


@pytest.fixture(scope="session")
def exported() -> Callable[[str, bool], tuple[nn.Module, ExportedProgram]]:
    """`exported(name, dynamic)`: a net of float64 weights in eval mode, and its program; batch 3 if not dynamic."""
    return _exported


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small nets are slower on several threads, and sums come out differently."""
    torch.set_num_threads(1)
