"""What is left over in an output: unfinished writes, files that no manifest lists, signs of runs that are dead.

Records and what lies beside them for other runs to use stay, and so does everything that is not laid out as ours.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fleetpress.storage.artifact import LATEST, MANIFEST
from fleetpress.storage.errors import ObjectNotFound
from fleetpress.storage.store import ObjectStore, Unfinished, text_field

from .checkpoint.steps import CRUMBS
from .driver.leases import LEASES
from .handover import SPILLED
from .ledger import Ledger
from .runs.heartbeat import (
    Watch,
    alive_key,
    cancel_key,
)
from .runs.published import pointed_to
from .runs.results import RUNS
from .threads import side_by_side

_DIGEST = re.compile(r"[0-9a-f]{32}")
_MODELS = "models/"
_RECORDS = "records/"
_OURS = (_MODELS, _RECORDS, LEASES, RUNS, "schedules/")
_PROBE = "fleetpress-probe-"
_OF_DEAD_RUNS = ("lease", "sign of life", "wish to cancel")
_LOOK_SECONDS = 1.0
_RESUMABLE = "left by a run that did not end; running the spec again would go on with it"


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """One thing that nothing needs any more. `bytes` is None if the store does not say.

    `keys` are its objects, in the order in which they may go; `unfinished` is a write instead. `resumable`: work is
    done again without it. `kept`: a living run may be working on it. `deleted`: it is gone.
    """

    what: str
    key: str
    why: str
    bytes: int | None = None
    keys: tuple[str, ...] = ()
    unfinished: Unfinished | None = None
    resumable: bool = False
    kept: bool = False
    deleted: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        told = ("what", "key", "why", "bytes", "resumable", "kept", "deleted")
        return {name: getattr(self, name) for name in told}


@dataclass(frozen=True, kw_only=True)
class Leftovers:
    """Everything that is left over in an output; `runs` are all it holds, `busy` those that worked while we looked."""

    output: str
    runs: frozenset[str]
    busy: tuple[str, ...]
    found: tuple[Leftover, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "output": self.output,
            "busy": list(self.busy),
            "leftovers": [item.as_dict() for item in self.found],
        }


def find_leftovers(
    store: ObjectStore,
    *,
    superseded: bool = False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Leftovers:
    """What nothing needs any more; with `superseded` also artifacts that their model's pointer has left behind.

    Looks for up to DEAD_SECONDS at runs that may live: what a run may be working on is `kept`. Raises the store's
    errors.
    """
    first = store.sizes(RUNS)  # before and after the rest: a run may end, or begin, while we look
    objects = {prefix: store.sizes(prefix) for prefix in (_MODELS, _RECORDS, LEASES, _PROBE)}
    writes = store.list_unfinished()
    last = store.sizes(RUNS)
    busy = _runs(last) - _runs(first) | busy_runs(store, _with_sign(first) | _with_sign(last), clock, sleep)
    artifacts = _artifacts(objects[_MODELS])
    work = [
        *_unfinished(writes, artifacts),
        *_unlisted(objects[_MODELS], artifacts),
        *_crumbs(store, objects[_RECORDS], artifacts),
        *_spilled(store, objects[_RECORDS], artifacts),
        *_probes(objects[_PROBE]),
        *(_superseded(store, objects[_MODELS], artifacts) if superseded else ()),
    ]
    if busy:
        work = [replace(item, kept=True) for item in work]
    dead = [*_leases(store, objects[LEASES], busy), *_signs(last, busy)]
    return Leftovers(
        output=store.uri, runs=frozenset(_runs(last)), busy=tuple(sorted(busy)), found=(*work, *dead)
    )


def delete_leftovers(store: ObjectStore, leftovers: Leftovers) -> Leftovers:
    """Delete what is not kept. If a run has begun since it was found, what that may be working on is kept after all.

    Start no run while this works: it might go on with what is about to be deleted.
    """
    is_quiet = _runs(store.sizes(RUNS)) <= leftovers.runs
    done = side_by_side(partial(_delete, store, is_quiet), leftovers.found)
    return replace(leftovers, found=tuple(done))


def busy_runs(
    store: ObjectStore, runs: Set[str], clock: Callable[[], float], sleep: Callable[[float], None]
) -> set[str]:
    """Those of the runs with a sign of life that were seen to beat, or to end. The others are dead."""
    watch = Watch(store, clock)
    first = {run: _sign(store, run) for run in runs}
    unsure = {run for run in runs if watch.is_alive(run)}
    while unsure:
        sleep(_LOOK_SECONDS)
        unsure = {run for run in unsure if watch.is_alive(run) and _sign(store, run) == first[run]}
    return {run for run in runs if _sign(store, run) != first[run] or not first[run]}


def _delete(store: ObjectStore, is_quiet: bool, item: Leftover) -> Leftover:
    if item.kept or not (is_quiet or item.what in _OF_DEAD_RUNS):
        return replace(item, kept=True)
    if item.unfinished is not None:
        store.discard(item.unfinished)
    for key in item.keys:
        store.delete(key)
    return replace(item, deleted=True)


def _sign(store: ObjectStore, run: str) -> bytes:
    try:
        return store.get(alive_key(run))
    except ObjectNotFound:
        return b""


def _run_of(key: str) -> str:
    return key.removeprefix(RUNS).partition("/")[0]


def _runs(keys: Mapping[str, int]) -> set[str]:
    return {_run_of(key) for key in keys}


def _with_sign(keys: Mapping[str, int]) -> set[str]:
    """Runs that have a sign of life among these keys."""
    return {run for run in _runs(keys) if alive_key(run) in keys}


def _artifacts(sizes: Mapping[str, int]) -> set[str]:
    """Folders of published artifacts: models/<name>/<digest>."""
    folders = (key.removesuffix(f"/{MANIFEST}") for key in sizes if key.endswith(f"/{MANIFEST}"))
    return {folder for folder in folders if folder in _candidates(f"{folder}/{MANIFEST}")}


def _candidates(key: str) -> list[str]:
    """Folders that may be the artifact that a file belongs to; a model's name may look like a digest."""
    parts = key.split("/")
    if parts[-1] == LATEST:
        return []
    return [
        "/".join(parts[: index + 1]) for index in range(2, len(parts) - 1) if _DIGEST.fullmatch(parts[index])
    ]


def _unfinished(writes: Sequence[Unfinished], artifacts: Set[str]) -> Iterator[Leftover]:
    for item in writes:
        place = item.place or item.key
        if "/" in place and not place.startswith(_OURS):
            continue
        is_published = any(folder in artifacts for folder in _candidates(place))
        resumable = bool(item.upload) and not is_published and place.startswith(_MODELS)
        why = "a write that was cut off" if not item.upload else "an upload that nobody will complete"
        yield Leftover(
            what="upload" if item.upload else "torn write",
            key=place,
            why=_RESUMABLE if resumable else why,
            bytes=item.size_bytes or None,
            unfinished=item,
            resumable=resumable,
        )


def _unlisted(sizes: Mapping[str, int], artifacts: Set[str]) -> Iterator[Leftover]:
    """Files of artifacts that have no manifest, an artifact at a time."""
    found: dict[str, list[str]] = {}
    for key in sizes:
        folders = _candidates(key)
        if folders and not any(folder in artifacts for folder in folders):
            found.setdefault(folders[0], []).append(key)
    for folder, keys in found.items():
        yield Leftover(
            what="files without manifest",
            key=folder,
            why=_RESUMABLE,
            bytes=sum(sizes[key] for key in keys),
            keys=tuple(keys),
            resumable=True,
        )


def _crumbs(store: ObjectStore, sizes: Mapping[str, int], artifacts: Set[str]) -> Iterator[Leftover]:
    """What tasks left beside their records for the one that ends their shard."""
    keys = [key for key in sizes if key.endswith(CRUMBS)]
    digests = [key.removeprefix(_RECORDS).removesuffix(CRUMBS) for key in keys]
    records = side_by_side(Ledger(store).read, digests)
    for key, record in zip(keys, records, strict=True):
        shards = [output.key for output in record.outputs if output.upload] if record else []
        resumable = any(artifacts.isdisjoint(_candidates(shard)) for shard in shards)
        why = _RESUMABLE if resumable else "the shard that it was for is finished"
        yield Leftover(
            what="crumbs",
            key=key,
            why=why if record else "no record names it",
            bytes=sizes[key],
            keys=(key,),
            resumable=resumable,
        )


def _spilled(store: ObjectStore, sizes: Mapping[str, int], artifacts: Set[str]) -> Iterator[Leftover]:
    """What a calibration left beside its records for later tasks of the same model."""
    keys = [key for key in sizes if key.endswith(tuple(SPILLED))]
    digests = [key.removeprefix(_RECORDS).partition(".")[0] for key in keys]
    records = side_by_side(Ledger(store).read, digests)
    for key, record in zip(keys, records, strict=True):
        resumable = (
            record is not None and f"{_MODELS}{record.model}/{record.result['artifact']}" not in artifacts
        )
        why = _RESUMABLE if resumable else "the model that it was for is published"
        yield Leftover(
            what=SPILLED[f".{key.rpartition('.')[2]}"],
            key=key,
            why=why if record else "no record names it",
            bytes=sizes[key],
            keys=(key,),
            resumable=resumable,
        )


def _probes(sizes: Mapping[str, int]) -> Iterator[Leftover]:
    for key, size in sizes.items():
        yield Leftover(
            what="probe", key=key, why="a test of the store that was cut off", bytes=size, keys=(key,)
        )


def _superseded(store: ObjectStore, sizes: Mapping[str, int], artifacts: Set[str]) -> Iterator[Leftover]:
    """Published artifacts of models whose pointer shows another one that is there."""
    folders = sorted(artifacts)
    names = sorted({folder.removeprefix(_MODELS).rpartition("/")[0] for folder in folders})
    pointers = dict(zip(names, side_by_side(partial(pointed_to, store), names), strict=True))
    files: dict[str, list[str]] = {}
    for key in sizes:
        for folder in _candidates(key):
            files.setdefault(folder, []).append(key)
    for folder in folders:
        name = folder.removeprefix(_MODELS).rpartition("/")[0]
        shown = f"{_MODELS}{name}/{pointers[name]}"
        if shown != folder and shown in artifacts:
            manifest = f"{folder}/{MANIFEST}"  # goes first: half an artifact is none
            rest = [key for key in files[folder] if key != manifest]
            yield Leftover(
                what="superseded artifact",
                key=folder,
                why=f"{_MODELS}{name}/{LATEST} shows {pointers[name]}",
                bytes=sum(sizes[key] for key in files[folder]),
                keys=(manifest, *rest),
            )


def _leases(store: ObjectStore, sizes: Mapping[str, int], busy: Set[str]) -> Iterator[Leftover]:
    holders = side_by_side(partial(text_field, store, name="run"), sizes)
    for key, run in zip(sizes, holders, strict=True):
        if run not in busy:
            yield Leftover(
                what="lease",
                key=key,
                why=f"run {run} does not live" if run else "no run holds it",
                bytes=sizes[key],
                keys=(key,),
            )


def _signs(sizes: Mapping[str, int], busy: Set[str]) -> Iterator[Leftover]:
    for key, size in sizes.items():
        run = _run_of(key)
        what = {alive_key(run): "sign of life", cancel_key(run): "wish to cancel"}.get(key)
        if what and run not in busy:
            yield Leftover(what=what, key=key, why=f"run {run} does not live", bytes=size, keys=(key,))
