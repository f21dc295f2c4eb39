"""Where links in a folder may lead: a model's folder comes from strangers, and what it links to would be published."""

import os

from .errors import AccessDenied

_HUB_SNAPSHOTS, _HUB_BLOBS = "snapshots", "blobs"


def check_inside(path: str, root: str) -> None:
    """Raises AccessDenied if links lead from `path` to somewhere outside of the folder `root`."""
    if not is_inside(path, root):
        raise AccessDenied(
            f"{path} is a link that leads out of {root}, to {os.path.realpath(path)}: put a copy there, or name the "
            "place itself"
        )


def is_inside(path: str, root: str) -> bool:
    """Whether the path, links followed, lies below `root`, or among the blobs of the hub cache that holds `root`."""
    real, real_root = os.path.realpath(path), os.path.realpath(root)
    return _is_below(real, real_root) or any(_is_below(real, blobs) for blobs in _blobs_beside(real_root))


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _blobs_beside(root: str) -> list[str]:
    """The blobs of `models--owner--name/snapshots/<revision>`: its files are links to them."""
    parts = root.split(os.sep)
    return [
        os.sep.join([*parts[:place], _HUB_BLOBS])
        for place, part in enumerate(parts[:-1])
        if part == _HUB_SNAPSHOTS and place
    ]
