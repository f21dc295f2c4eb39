"""A small program's archive taken apart and put together: what strangers may have changed on the way."""

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from fleetpress.storage.archive import write_archive

Members = dict[str, bytes]


class Net(torch.nn.Module):
    """One layer, a constant and a dynamic batch: every kind of member and a symbolic size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.tensor([1.0, 2.0])


def saved() -> bytes:
    torch.manual_seed(0)
    example = (torch.ones(4, 3),)
    program = torch.export.export(Net().eval(), example, dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


PLAIN = saved()
X = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [0.5, 0.25, 0.125]])


def unpacked(data: bytes = PLAIN) -> Members:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}


def packed(members: Members) -> bytes:
    return write_archive({f"archive/{name}": data for name, data in members.items()}, compress=False)


MODEL = "models/model.json"
WEIGHTS_CONFIG = "data/weights/model_weights_config.json"
CONSTANTS_CONFIG = "data/constants/model_constants_config.json"


def edit(members: Members, name: str, change: Callable[[Any], None]) -> None:
    value = json.loads(members[name])
    change(value)
    members[name] = json.dumps(value).encode()
