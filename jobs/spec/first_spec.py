"""A first spec for the models that lie at a place: found by one listing, written with comments, to be edited."""

import json
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fleetpress.storage.errors import ObjectNotFound, StorageError
from fleetpress.storage.globs import has_glob
from fleetpress.storage.near_misses import hint
from fleetpress.storage.sources import KIND_BY_SUFFIX, Kind, find_models, is_checkpoint_folder
from fleetpress.storage.store import open_store
from fleetpress.storage.uri import is_s3, join, normalize

_DATA_SUFFIXES = (".npz", ".parquet", ".safetensors")
_ROLES = {"train": re.compile(r"train", re.I), "eval": re.compile(r"test|eval|val", re.I)}
_RUN = re.compile(r"((?:.*/)?)runs/[^/]+/summary\.json")
_PLAIN = re.compile(r"[\w./~+=@-]+")
_FACTORY = "my_package.models:build"

_RECIPES = {
    "small": """\
  small:                              # halves the neurons, trains what is left, 4 bits a weight
    prune: {method: gradient_stability, sparsity: 0.5}       # `fleetpress methods` lists the others
    finetune: {epochs: 10, lr: 3.0e-3}
    quantize: {scheme: W4A16}                                # W8A16 is safer
    validate: {max_drop: 1%}                                 # else it is rejected, and the next run tries again
""",
    "w8": """\
  w8:                                 # 8 bits a weight, no data needed
    quantize: {scheme: W8A16}
""",
    "w4": """\
  w4:                                 # 4 bits a weight in groups of 128, streamed, no data needed
    quantize: {scheme: W4A16, ignore: [lm_head]}
""",
}


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """One model: its file, or the folder it fills (with a slash)."""

    source: str
    kind: Kind


def first_spec(place: str, *, output: str | None = None) -> str:
    """The text of a spec for the models at `place`: a file, a folder with models at any depth, or a pattern.

    Raises ObjectNotFound if there are none, and what the store raises.
    """
    units = _by_pattern(place) if has_glob(place) or _kind_of(place) else []
    data: dict[str, dict[str, str]] = {}
    if not units:
        store = open_store(place)
        keys = _foreign(sorted(store.sizes()))
        root = place.rstrip("/") or "/"
        units, data = _units(root, keys), _data(root, keys)
    if not units:
        looked_for = ", ".join(f"*{suffix}" for suffix in KIND_BY_SUFFIX)
        raise ObjectNotFound(f"{place} holds no models; looked for {looked_for}{hint(place)}")
    return _text(place, _entries(units), data, output or _default_output(place))


def _by_pattern(place: str) -> list[_Unit]:
    return [_Unit(source=place, kind=kind) for kind in sorted({model.kind for model in find_models(place)})][
        :1
    ]


def _kind_of(key: str) -> Kind | None:
    return KIND_BY_SUFFIX.get(posixpath.splitext(key)[1])


def _foreign(keys: Sequence[str]) -> list[str]:
    """Those that do not lie in an output of fleetpress: a folder with a run's summary."""
    outputs = {found[1] for key in keys if (found := _RUN.fullmatch(key))}
    return [key for key in keys if not any(key.startswith(output) for output in outputs)]


def _units(root: str, keys: Sequence[str]) -> list[_Unit]:
    """The models below `root`: folders of checkpoints as a whole, other model files one by one."""
    folders: dict[str, list[str]] = {}
    for key in keys:
        folder, name = posixpath.split(key)
        folders.setdefault(folder, []).append(name)
    whole = {folder for folder, names in folders.items() if is_checkpoint_folder(names)}
    units = [_Unit(source=f"{_joined(root, folder)}/", kind="checkpoint") for folder in whole]
    for folder, names in folders.items():
        if any(_is_within(folder, taken) for taken in whole) or _is_hidden(folder):
            continue
        models = [name for name in names if _kind_of(name) and not name.startswith(".") and not _role(name)]
        for name in models:
            kind, stem = _kind_of(name), posixpath.splitext(name)[0]
            assert kind is not None
            fills = stem == "model" and len(models) == 1 and folder != ""
            source = f"{_joined(root, folder)}/" if fills else _joined(root, posixpath.join(folder, name))
            units.append(_Unit(source=source, kind=kind))
    return sorted(units, key=lambda unit: unit.source.encode())


def _joined(root: str, key: str) -> str:
    return f"{root.rstrip('/')}/{key}" if key else root


def _is_within(folder: str, other: str) -> bool:
    return other in ("", folder) or folder.startswith(other + "/")


def _is_hidden(folder: str) -> bool:
    return any(part.startswith(".") for part in folder.split("/"))


def _role(name: str) -> str | None:
    """Whether a file is called like data, and then for what."""
    if not name.endswith(_DATA_SUFFIXES):
        return None
    stem = posixpath.splitext(name)[0]
    return next((role for role, words in _ROLES.items() if words.match(stem)), None)


def _data(root: str, keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Folders that hold both shards to train on and shards to evaluate on, by name."""
    found: dict[str, dict[str, list[str]]] = {}
    for key in keys:
        folder, name = posixpath.split(key)
        role = _role(name)
        if role and not _is_hidden(folder):
            found.setdefault(folder, {}).setdefault(role, []).append(name)
    sets: dict[str, dict[str, str]] = {}
    for folder, roles in found.items():
        if roles.keys() == _ROLES.keys():
            name = posixpath.basename(folder) or "data"
            sets.setdefault(name if name not in sets else folder.replace("/", "-"), {}).update(
                {
                    role: _joined(root, posixpath.join(folder, _pattern(names)))
                    for role, names in roles.items()
                }
            )
    return sets


def _pattern(names: Sequence[str]) -> str:
    """One name that names them all: itself, or with a star for what differs."""
    if len(names) == 1:
        return names[0]
    suffix = posixpath.splitext(names[0])[1]
    return f"{posixpath.commonprefix(list(names)).rstrip('0123456789')}*{suffix}"


def _entries(units: Sequence[_Unit]) -> list[_Unit]:
    """One entry a model, or one for all that lie side by side and are of one kind."""
    groups: dict[tuple[str, str, Kind], list[_Unit]] = {}
    for unit in units:
        parent, _, name = unit.source.rstrip("/").rpartition("/")
        form = "/" if unit.source.endswith("/") else posixpath.splitext(name)[1]
        groups.setdefault((parent, form, unit.kind), []).append(unit)
    entries: list[_Unit] = []
    for (parent, form, kind), members in groups.items():
        pattern = f"{parent}/*{form}"
        together = len(members) > 1 and _named_by(pattern) == {_identity(unit.source) for unit in members}
        entries += [_Unit(source=pattern, kind=kind)] if together else members
    return entries


def _named_by(pattern: str) -> set[str]:
    """The models of a pattern, each by its folder if it fills it."""
    try:
        return {_identity(model.uri) for model in find_models(pattern)}
    except StorageError:
        return set()


def _identity(source: str) -> str:
    folder, name = posixpath.split(normalize(source.rstrip("/")))
    return folder if posixpath.splitext(name)[0] == "model" else join(folder, name)


def _default_output(place: str) -> str:
    if is_s3(place):
        return f"s3://{normalize(place).removeprefix('s3://').partition('/')[0]}/compressed"
    return "compressed"


def _text(place: str, entries: Sequence[_Unit], data: dict[str, dict[str, str]], output: str) -> str:
    chosen = {unit.source: _recipe(unit.kind, bool(data)) for unit in entries}
    lines = [
        f"# A first spec for the models at `{place}`. See what it would do, then do it; the second again resumes:",
        "#   fleetpress plan THIS_FILE",
        "#   fleetpress run THIS_FILE",
        "version: 1",
        f"name: {_quoted(_name(place))}",
        f"output: {_quoted(output)}              # a folder or s3:// prefix; what is published lies in its models/",
        "models:",
    ]
    first = next(iter(data), None)
    for unit in entries:
        fields = [f"source: {_quoted(unit.source)}"]
        if unit.kind == "module":
            fields.append(f"factory: {_FACTORY}")
        if first and chosen[unit.source] == "small":
            fields.append(f"data: {_quoted(first)}")
        fields.append(f"recipe: {chosen[unit.source]}")
        note = (
            "  # adapt: the code that builds it; `--allow-code` lets it run" if unit.kind == "module" else ""
        )
        lines.append(f"  - {{{', '.join(fields)}}}{note}")
    if data:
        lines.append(
            "data:                                 # arrays `inputs` and, for a supervised loss, `targets`"
        )
        for name, roles in data.items():
            lines.append(f"  {_quoted(name)}:")
            lines += [f"    {role}: {_quoted(roles[role])}" for role in _ROLES]
            lines.append("    # loss: cross_entropy             # the default follows from the targets")
            lines.append("    # metric: accuracy")
    text = "\n".join([*lines, "recipes:"]) + "\n"
    text += "".join(recipe for name, recipe in _RECIPES.items() if name in chosen.values())
    return text + "resources: {memory_per_task: 2GiB}\nseed: 0\n"


def _recipe(kind: Kind, has_data: bool) -> str:
    if kind == "checkpoint":
        return "w4"
    return "small" if has_data else "w8"


def _name(place: str) -> str:
    parts = [
        part for part in place.removeprefix("s3://").split("/") if part and not has_glob(part) and part != "."
    ]
    name = re.sub(r"[^\w.-]+", "-", posixpath.splitext(parts[-1])[0] if parts else "fleet").strip("-.")
    return name or "fleet"


def _quoted(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
