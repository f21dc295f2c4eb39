"""What a job takes to the cluster: fleetpress as it is installed here, the spec, and the code that the user names.

Everything is copied into a folder of its own first, so that nothing else goes along: no working folder, no hidden file,
no environment. The nodes bring the dependencies (ray, torch ...) and their own credentials.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from fleetpress.storage import canonical_json
from fleetpress.storage.uri import is_s3, normalize

from .errors import UsageError
from .spec.fleet_spec import (
    Spec,
    parse_spec,
    read_spec,
)

SPEC_IN_JOB = "fleetpress-job/spec.yaml"
"""Where the driver finds the spec, below its working folder; no module can have that name."""
_PACKAGES = ("compression", "storage", "jobs")
_MOST_CODE_BYTES = 20 << 20
_LEFT_OUT = {".c", ".pyc"}
_COMPILED = ".so"  # the same source gives other bytes with every compiler
_HIDING = {"fleetpress", "fleetpress-job", "compression", "ray", "torch"}
_NAMED_PLACES = 3  # in a message


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """Files by their paths in the job: `package` for the path of modules, `code` for the working folder."""

    spec: Spec
    text: str
    package: dict[str, Path]
    code: dict[str, Path]
    allow_code: bool
    warnings: tuple[str, ...]

    @property
    def version(self) -> str:
        """Of fleetpress."""
        return _version()

    @cached_property
    def digest(self) -> str:
        """12 hexadecimal characters for all that can change what the job does."""
        package = {path: file for path, file in self.package.items() if not path.endswith(_COMPILED)}
        facts = {
            "spec": hashlib.sha256(self.text.encode()).hexdigest(),
            "fleetpress": [_version(), _hashes(package)],
            "code": _hashes(self.code),
            "allow_code": self.allow_code,
        }
        return hashlib.sha256(canonical_json.dumps(facts)).hexdigest()[:12]

    def lay_out(self, folder: Path) -> dict[str, Any]:
        """Copy everything below `folder`; gives Ray's runtime environment, whose paths lead into it."""
        # The content of the wheel. As a wheel, Ray would have pip install it on every node, with its dependencies.
        metadata = folder / f"fleetpress-{_version()}.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(_metadata(), encoding="utf-8")
        work = folder / "work"
        for place, files in ((folder, self.package), (work, self.code)):
            for path, file in files.items():
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place / path)
        (work / SPEC_IN_JOB).parent.mkdir(parents=True)
        (work / SPEC_IN_JOB).write_text(self.text, encoding="utf-8")
        return {"working_dir": str(work), "py_modules": [str(folder / "fleetpress"), str(metadata)]}


def pack(spec_path: str, *, allow_code: bool, code: Sequence[str | Path] = ()) -> Shipment:
    """What the spec needs on a cluster. Raises SpecError, StorageError, and UsageError for what cannot go there."""
    text = read_spec(spec_path)
    spec = parse_spec(text, spec_path)
    warnings = [*_folders(spec, spec_path)]
    factories = sorted({model.factory for model in spec.models if model.factory})
    files = _code(code, factories) if code else {}
    if code and not allow_code:
        raise UsageError("--code sends code to run on the cluster; allow it with --allow-code")
    if factories and not allow_code:
        warnings.append(f"{factories[0]} is code: its models fail without --allow-code")
    return Shipment(
        spec=spec,
        text=text,
        package=dict(_package()),
        code=files,
        allow_code=allow_code,
        warnings=tuple(warnings),
    )


def _folders(spec: Spec, name: str) -> Iterator[str]:
    """A warning of folders, which every node has to see. Raises UsageError for relative ones."""
    places = {"output": spec.output}
    places |= {f"models[{index}].source": model.source for index, model in enumerate(spec.models)}
    for key, data in spec.data.items():
        shards = {"train": data.train or (), "eval": data.eval or ()}
        places |= {f"data.{key}.{part}": place for part, found in shards.items() for place in found}
    local = {path: place for path, place in places.items() if not is_s3(place)}
    relative = [path for path, place in local.items() if not os.path.isabs(normalize(place))]
    if relative:
        raise UsageError(
            "\n".join(
                f"{name}: {path}: `{local[path]}` is relative to a folder that the cluster does not have; "
                "give s3://bucket/prefix, or the whole path of a folder that every node sees"
                for path in relative
            )
        )
    if local:
        named = ", ".join(list(dict.fromkeys(local.values()))[:_NAMED_PLACES])
        yield f"{named}: folders are only right where every node sees them at the same place; else use s3://"


def _package() -> Iterator[tuple[str, Path]]:
    """The files of fleetpress as it is installed here, from a wheel or from its sources."""
    for package in _PACKAGES:
        origin = import_module(f"fleetpress.{package}").__file__
        root = Path(str(origin)).parent
        for path, file in _files(root):
            if file.suffix not in _LEFT_OUT:
                yield f"fleetpress/{package}/{path}", file


def _code(places: Sequence[str | Path], factories: Sequence[str]) -> dict[str, Path]:
    """Files to send along, by their paths in the job's folder, where the factories must be found."""
    found: dict[str, Path] = {}
    size_bytes = 0
    for path, file in (item for place in places for item in _code_at(Path(place))):
        found[path] = file
        size_bytes += file.stat().st_size
        if size_bytes > _MOST_CODE_BYTES:
            raise UsageError(
                f"--code: more than {_MOST_CODE_BYTES >> 20} MiB are no code; name the folder of the code alone"
            )
    tops = {path.partition("/")[0].removesuffix(".py") for path in found}
    hiding = sorted(tops & _HIDING)
    if hiding:
        raise UsageError(
            f"--code: its {hiding[0]!r} would hide another package; name the folder of the code alone"
        )
    if not tops & {factory.partition(":")[0].partition(".")[0] for factory in factories}:
        named = ", ".join(factories) or "none"
        raise UsageError(
            f"--code holds no module of the spec's factories ({named}); name the folder that holds them"
        )
    return found


def _code_at(place: Path) -> Iterator[tuple[str, Path]]:
    """A module's file, a package's folder, or the modules and packages in a folder."""
    if place.is_file() and place.suffix == ".py":
        yield place.name, place
    elif place.is_dir():
        root = place.resolve()
        prefix = f"{root.name}/" if (root / "__init__.py").exists() else ""
        for path, file in _files(root):
            yield f"{prefix}{path}", file
    else:
        raise UsageError(
            f"--code {place}: no Python file and no folder; name the one that holds the factories"
        )


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder, without hidden ones and caches; a link that leads out of it is refused."""
    for folder, names, found in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith(".") and name != "__pycache__")
        for name in sorted(found):
            file = Path(folder, name)
            if name.startswith(".") or not file.is_file():
                continue
            if file.is_symlink() and not file.resolve().is_relative_to(root.resolve()):
                raise UsageError(f"{file}: is a link that leads out of {root}; put the file itself there")
            yield file.relative_to(root).as_posix(), file


def _hashes(files: dict[str, Path]) -> list[list[str]]:
    return [[path, hashlib.sha256(file.read_bytes()).hexdigest()] for path, file in sorted(files.items())]


def _version() -> str:
    return distribution("fleetpress").version


def _metadata() -> str:
    """What importlib.metadata reads on the cluster: the version, and the dependencies."""
    here = distribution("fleetpress")
    return (
        here.read_text("METADATA")
        or here.read_text("PKG-INFO")
        or f"Name: fleetpress\nVersion: {here.version}\n"
    )
