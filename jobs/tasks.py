"""The small values that travel between driver, scheduler, workers and ledger; each has a JSON form.

Tensors never appear here: they lie in the store, and an `Output` says where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Literal, get_args

from fleetpress.storage.errors import InvalidUri
from fleetpress.storage.uri import validate_key

ErrorClass = Literal["input", "transient", "lost", "memory", "bug"]

GPU = "cuda"
"""The `device` in the payload, and so in the digest, of a task that computes on a GPU."""

_LEAST_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Task:
    """One unit of work of one model.

    `digest` names everything that can change the result, and so names its record in the ledger; `needs` are
    ids of tasks of the same model; `payload` is JSON-like and small; `memory_bytes` is what each worker of
    the task may use (0 = not declared), `gpus` the share of a GPU, or how many, that each of them needs; `workers`
    counts data-parallel workers of a training task; `small` asks for the smallest unit that gives the same bytes.
    """

    id: str
    model: str
    kind: str
    digest: str
    needs: tuple[str, ...] = ()
    payload: Mapping[str, Any] = field(default_factory=dict)
    memory_bytes: int = 0
    gpus: float = 0.0
    workers: int = 1
    small: bool = False


@dataclass(frozen=True, kw_only=True)
class Output:
    """One object that a step has stored: its key in the output, its size, and the hash of its bytes.

    With `upload` it is an object in the making: that multipart upload, until it is completed to one of `bytes`.
    """

    key: str
    bytes: int
    sha256: str
    upload: str = ""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step function returns: a small JSON-like result, and the objects it has already stored."""

    result: Mapping[str, Any]
    outputs: tuple[Output, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """The ledger's proof that a task is done: what came out, how long it took, at which attempt, on which node.

    Bytes are those of the objects that the task read and wrote, this record left out.
    """

    task: str
    model: str
    kind: str
    digest: str
    outputs: tuple[Output, ...]
    result: Mapping[str, Any]
    seconds: float
    attempts: int = 1
    fleetpress_version: str
    where: str = ""
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a task did not finish.

    `reason` is one line for the user. `error_class` decides what happens next: "input" and "bug" are never
    retried, "transient" is, "lost" (with its machine) more often, "memory" once. `details` holds the traceback of
    a bug.
    """

    task: str
    model: str
    reason: str
    error_class: ErrorClass
    details: str = ""
    seconds: float = 0.0
    where: str = ""
    bytes_read: int = 0
    bytes_written: int = 0


def smaller(task: Task) -> Task:
    """The same work in smaller units: blocks of a quarter, and nothing kept in memory from earlier tasks."""
    payload = task.payload
    if "block_bytes" in payload:
        payload = {**payload, "block_bytes": max(_LEAST_BLOCK_BYTES, payload["block_bytes"] // 4)}
    return replace(task, small=True, payload=payload)


def to_json(value: Task | TaskRecord | Failure | StepResult) -> dict[str, Any]:
    """The value as a dict of JSON types; the functions below read it back."""
    plain = _plain(value)
    return {name: list(item) if isinstance(item, tuple) else item for name, item in plain.items()}


def _plain(value: Any) -> Any:
    """As dataclasses.asdict, but without a deep copy of every string: a large checkpoint has millions."""
    kind = type(value)
    if kind is str or kind is int:
        return value
    if kind is dict:
        return {name: _plain(item) for name, item in value.items()}
    if kind is list or kind is tuple:
        return kind([_plain(item) for item in value])
    if is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def task_from_json(fields: Mapping[str, Any]) -> Task:
    """The task that `to_json` wrote down."""
    return Task(**{**fields, "needs": tuple(fields["needs"])})


def step_result_from_json(fields: Mapping[str, Any]) -> StepResult:
    """The step result that `to_json` wrote down."""
    return StepResult(result=fields["result"], outputs=_outputs(fields["outputs"]))


def record_from_json(fields: object) -> TaskRecord:
    """The record that `to_json` wrote down; ValueError says what is wrong with anything else."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"a record must be an object, not {type(fields).__name__}")
    for name, kind in _RECORD_FIELDS.items():
        if not isinstance(fields.get(name), kind):
            raise ValueError(f"field {name!r} is missing or of the wrong type")
    for name, kind in _LATER_FIELDS.items():
        if not isinstance(fields.get(name, kind()), kind):
            raise ValueError(f"field {name!r} is of the wrong type")
    return TaskRecord(
        **{name: fields[name] for name in _RECORD_FIELDS if name != "outputs"},
        **{name: fields[name] for name in _LATER_FIELDS if name in fields},
        outputs=_outputs(fields["outputs"]),
    )


def failure_from_json(fields: Mapping[str, Any]) -> Failure:
    """The failure that `to_json` wrote down."""
    assert fields["error_class"] in get_args(ErrorClass), fields["error_class"]
    return Failure(**fields)


_RECORD_FIELDS: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "model": str,
    "kind": str,
    "digest": str,
    "outputs": list,
    "result": dict,
    "seconds": (int, float),
    "attempts": int,
    "fleetpress_version": str,
}
_LATER_FIELDS: dict[str, type] = {
    "where": str,
    "bytes_read": int,
    "bytes_written": int,
}  # old records lack them


def _outputs(items: list[Any]) -> tuple[Output, ...]:
    try:
        return tuple(
            Output(
                key=validate_key(str(item["key"])),
                bytes=int(item["bytes"]),
                sha256=str(item["sha256"]),
                upload=str(item.get("upload", "")),
            )
            for item in items
        )
    except (TypeError, KeyError, OverflowError, InvalidUri) as error:
        raise ValueError("an output needs key, bytes and sha256, and the key must be a valid one") from error
