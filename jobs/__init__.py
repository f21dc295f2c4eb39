"""When and where: from a spec to published artifacts, on one machine or a cluster."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifacts import load_artifact as load_artifact
    from .driver.run import run_fleet as run_fleet

__all__ = ["load_artifact", "run_fleet"]
_HOMES = {"load_artifact": "artifacts", "run_fleet": "driver.run"}


def __getattr__(name: str) -> Any:
    """The Python interface, imported when it is first used: the command line must start without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
