"""State dicts: tensors out, no code run, and what is wrong is named."""

import collections
import io
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from fleetpress.storage.errors import InvalidModelFile, UnsafeModelFile
from fleetpress.storage.state_dicts import load_state_dict

STATE = nn.Sequential(
    nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(3, 2, dtype=torch.bfloat16)
).state_dict()


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        saved(STATE),
        saved(STATE, _use_new_zipfile_serialization=False),
        saved(dict(STATE)),
        saved({"state_dict": STATE, "epoch": 3}),
        saved({"model": {"state_dict": STATE}}),
        safetensors.torch.save(STATE),
    ],
    ids=["zip", "legacy", "dict", "wrapped", "wrapped_twice", "safetensors"],
)
def test_every_form_gives_the_same_tensors(data: bytes) -> None:
    loaded = load_state_dict(data)
    assert sorted(loaded) == sorted(STATE)
    for name, tensor in loaded.items():
        assert tensor.dtype == STATE[name].dtype
        assert torch.equal(tensor, STATE[name])


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_named_and_not_run(legacy: bool, tmp_path: Path) -> None:
    state = collections.OrderedDict(STATE, evil=Payload(tmp_path / "ran"))
    data = saved(state, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeModelFile, match="mkdir"):
        load_state_dict(data)
    assert not (tmp_path / "ran").exists()
    torch.load(io.BytesIO(data), weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_whole_module_is_code() -> None:
    with pytest.raises(UnsafeModelFile, match=r"torch\.nn\.modules\.linear\.Linear"):
        load_state_dict(saved(nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_code() -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    with pytest.raises(UnsafeModelFile):
        load_state_dict(buffer.getvalue())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello", "damaged|cannot be unpickled"),
        (saved(STATE)[:-100], "damaged"),
        (safetensors.torch.save(STATE)[:-10], "cut short"),
        (saved([1, 2]), "list, not a state dict"),
        (saved({}), "no tensors"),
        (saved({"weight": torch.ones(1), "note": "x"}), "'note' is a str"),
        (saved({3: torch.ones(1)}), "entry 3"),
    ],
    ids=["empty", "text", "cut", "cut_safetensors", "list", "nothing", "text_entry", "number"],
)
def test_what_is_no_state_dict(data: bytes, message: str) -> None:
    with pytest.raises(InvalidModelFile, match=message) as raised:
        load_state_dict(data)
    assert not isinstance(raised.value, UnsafeModelFile)
