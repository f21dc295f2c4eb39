"""Modules at the door: a state dict and the code its factory names become a program. Only with --allow-code."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fleetpress.compression.batches import TARGETS
from fleetpress.storage.errors import InvalidModelFile
from fleetpress.storage.programs import module_to_program
from fleetpress.storage.state_dicts import load_state_dict

from ..errors import ModelError
from .materials import check_finite, naming

_ROWS = 2  # rows of an example: exporting with one would fix the batch size to one
_FREE = "batch"


def build_program(model: Mapping[str, Any], data: bytes, arrays: Mapping[str, Tensor]) -> ExportedProgram:
    """The module of `model["factory"]` with the weights in `data`, exported with a free batch size.

    Its example inputs are those of the spec (`inputs`), else the first rows of its data. Raises ModelError.
    """
    module = _module(model["factory"])
    with naming(model["uri"], InvalidModelFile):
        state = load_state_dict(data)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise ModelError(f"{model['uri']} does not fit the module of {model['factory']}: {details}") from None
    check_finite(model["uri"], dict(module.named_parameters()))
    with naming(model["uri"], InvalidModelFile):
        return module_to_program(module.eval(), _example(model, arrays))


def _module(factory: str) -> nn.Module:
    package, _, name = factory.partition(":")
    try:
        found: Any = importlib.import_module(package)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"factory {factory!r} cannot be imported here: {error}; correct its name, install its package on every "
            "worker, or put its folder on PYTHONPATH"
        ) from None
    except Exception as error:  # code of the user may raise anything
        raise _failed(factory, "importing it", error) from error
    try:
        module = found()
    except Exception as error:  # as above
        raise _failed(factory, "calling it without arguments", error) from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"factory {factory!r} gave a {type(module).__name__}; it must return a torch.nn.Module"
        )
    return module


def _failed(factory: str, doing: str, error: Exception) -> ModelError:
    return ModelError(
        f"factory {factory!r}: {doing} raised {type(error).__name__}: {error}; correct its code"
    )


def _example(model: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> list[Tensor] | dict[str, Tensor]:
    if model["inputs"]:
        made = {name: _made(item) for name, item in model["inputs"].items()}
    else:
        made = {name: value[:_ROWS] for name, value in arrays.items() if name != TARGETS}
    if not made:
        raise ModelError(
            f"{model['uri']}: exporting a module needs example inputs; give the model `data` or `inputs`"
        )
    return [made["inputs"]] if list(made) == ["inputs"] else made


def _made(item: Mapping[str, Any]) -> Tensor:
    shape = [_ROWS if size == _FREE else size for size in item["shape"]]
    return torch.zeros(shape, dtype=getattr(torch, item["dtype"]))
