"""The small JSON records that schedules keep in the output, and how they are read: what is none of ours is refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fleetpress.storage import canonical_json
from fleetpress.storage.errors import ArtifactCorrupt, ObjectNotFound
from fleetpress.storage.store import ObjectStore, read_json

from ..spec.yaml_lines import shortened
from .fires import unstamp

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Decision = Literal["run", "skip"]
JobState = Literal["pending", "running", "succeeded", "failed", "stopped", "unknown"]
ENDED: tuple[JobState, ...] = ("succeeded", "failed", "stopped", "unknown")

_Record = TypeVar("_Record", bound="DataclassInstance")
_MOMENTS = ("fire", "at", "since", "beat_at")
_WORDS = {"decision": ("run", "skip"), "phase": ("starting", "running", "ended")}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What was decided about a fire, by whom and when; `state` is how its job ended, once that was seen."""

    fire: str
    job: str
    decision: str
    reason: str = ""
    by: str = ""
    at: str = ""
    state: str = ""
    token: str = ""


@dataclass(frozen=True, kw_only=True)
class OpenJob:
    """A fire whose job may live: when it was last tried to begin it, whether that worked, and what stood in the way."""

    fire: str
    job: str
    address: str = ""
    launched: bool = False
    problem: str = ""
    by: str = ""
    at: str = ""


@dataclass(frozen=True, kw_only=True)
class Control:
    """Whether a schedule is paused, and from when on its fires count."""

    paused: bool = False
    by: str = ""
    at: str = ""
    since: str = ""


@dataclass(frozen=True, kw_only=True)
class LocalJob:
    """A job that a process of some machine attends: which, when it last showed itself, and how it ended."""

    job: str
    phase: str
    host: str
    process: int = 0
    beat_at: str = ""
    exit_code: int = 0
    reason: str = ""
    token: str = ""


@dataclass(frozen=True, kw_only=True)
class FirstSeen:
    """Since when a cron line counts."""

    since: str
    cron: str = ""


def read_record(store: ObjectStore, key: str, kind: type[_Record]) -> _Record | None:
    """The record at a key, if there is one. Raises ArtifactCorrupt for what is none of ours."""
    try:
        told = read_json(store, key)
        record = kind(**{field.name: told[field.name] for field in fields(kind) if field.name in told})
        _check(record)
    except ObjectNotFound:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise ArtifactCorrupt(
            f"{store.uri}/{key} is no record of a schedule ({error}); look who wrote it, and delete it"
        ) from None
    return record


def record_bytes(record: DataclassInstance) -> bytes:
    """A record as it is stored."""
    told: dict[str, Any] = asdict(record)
    return canonical_json.dumps(told)


def _check(record: DataclassInstance) -> None:
    for field in fields(record):
        value = getattr(record, field.name)
        if type(value).__name__ != field.type:
            raise TypeError(f"{field.name} is {shortened(repr(value))}")
        if field.name in _MOMENTS and value:
            _check_moment(field.name, value)
        if field.name in _WORDS and value not in _WORDS[field.name]:
            raise ValueError(f"{field.name} is {shortened(repr(value))}")


def _check_moment(name: str, text: str) -> None:
    try:
        unstamp(text)
    except ValueError:
        raise ValueError(f"{name} is no moment: {shortened(repr(text))}") from None
