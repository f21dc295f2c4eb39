"""What a run was made with: versions of Python and of the libraries that decide its results; nothing is imported."""

import platform
from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("fleetpress", "torch", "ray", "numpy", "scipy", "transformers", "constriction", "pcodec")


def versions() -> dict[str, str]:
    """Of this process, by name."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
