"""One trial: a run that meets a fault, the same run again, and what is to be found in the output then.

Compared with an undisturbed run: every published file (measured times and names of runs left out), what tasks were
done, and everything else that lies in the output.
"""

import hashlib
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crash_fleets import Kind
from crash_forks import Order, Outcome, Runs

from fleetpress.jobs.gc import delete_leftovers, find_leftovers
from fleetpress.storage.artifact import LATEST, MANIFEST, verify_files, without_times
from fleetpress.storage.errors import ObjectNotFound
from fleetpress.storage.store import ObjectStore, open_store

_OF_A_RUN = re.compile(r"runs/[^/]+/(summary\.json|events\.jsonl|report\.html|spec\.yaml)")


@dataclass(frozen=True, kw_only=True)
class Quiet:
    """An undisturbed run: hashes of what it published, its other keys, and how many operations it took."""

    published: Mapping[str, str]
    others: frozenset[str]
    operations: int
    tasks: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of one fault. `lost` and `doubled` name files and tasks, and must be empty; `left` is what gc deleted.

    `operation` is what the fault hit, empty if the run ended before. `codes` are the exit codes of the two runs.
    """

    mode: str
    at: int
    operation: str
    codes: tuple[int, int]
    lost: tuple[str, ...]
    doubled: tuple[str, ...]
    left: tuple[str, ...]
    reason: str
    seconds: float


class Course:
    """Trials of one kind of fleet on one store; each has an output of its own below `outputs`."""

    def __init__(
        self,
        runs: Runs,
        kind: Kind,
        *,
        source: str,
        outputs: str,
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self._runs = runs
        self._source = source
        self.outputs = outputs
        self._folder = folder
        self._environment = dict(environment or {})

    def quiet(self) -> Quiet:
        """The undisturbed run. Raises AssertionError if it does not publish."""
        output = f"{self.outputs}/{self.kind.name}-quiet"
        (outcome,) = self.run(output)
        assert outcome.code == 0, outcome.out + outcome.err
        store = open_store(output)
        keys = set(store.sizes())
        assert not store.list_unfinished(), store.list_unfinished()
        starts = outcome.noted("start")
        assert len({note["digest"] for note in starts}) == len(starts), starts
        return Quiet(
            published=published(store),
            others=frozenset(key for key in keys if not key.startswith(("models/", "runs/"))),
            operations=outcome.noted("count")[0]["operations"],
            tasks=len(starts),
        )

    def trial(self, quiet: Quiet, mode: str, at: int) -> Trial:
        """A run with the fault, and the resume."""
        started = time.monotonic()
        output = f"{self.outputs}/{self.kind.name}-{mode.replace(' ', '-')}-{at}"
        (first,) = self.run(output, mode=mode, at=at)
        (second,) = self.run(output)
        store = open_store(output)
        left = left_over(store, quiet)
        faults = first.noted("fault")
        trial = Trial(
            mode=mode,
            at=at,
            operation=str(faults[0]["operation"]).removeprefix(f"{output}/") if faults else "",
            codes=(first.code, second.code),
            lost=tuple(lost(store, quiet, second)),
            doubled=tuple(doubled(first, second)),
            left=tuple(left),
            reason=reason_of(second),
            seconds=time.monotonic() - started,
        )
        clear(output, store)
        return trial

    def run(self, output: str, *, times: int = 1, **trouble: Any) -> list[Outcome]:
        """`times` runs at once, all with the same trouble; of pauses each has its own."""
        spec = self._folder / f"{self.kind.name}.yaml"
        spec.write_text(self.kind.spec_text(self._source, output))
        arguments = ("run", str(spec), "--executor", "inline", "--json", *self.kind.arguments)
        seed = trouble.pop("pauses", None)
        return self._runs.at_once(
            *(
                Order(
                    arguments=arguments,
                    environment=self._environment,
                    import_from=str(self._folder),
                    pauses=None if seed is None else times * seed + index,
                    **trouble,
                )
                for index in range(times)
            )
        )


def lost(store: ObjectStore, quiet: Quiet, last: Outcome) -> Iterable[str]:
    """What is not as after an undisturbed run: files that are missing, other, or too many."""
    if last.code:
        yield f"exit code {last.code}: {reason_of(last)}"
    for manifest in (key for key in quiet.published if key.endswith(f"/{MANIFEST}")):
        with suppress(ObjectNotFound):  # told below
            yield from verify_files(f"{store.uri}/{manifest.removesuffix(f'/{MANIFEST}')}")
    found = published(store)
    for key in sorted(quiet.published.keys() | found.keys()):
        if found.get(key) != quiet.published.get(key):
            yield f"{key} is {'missing' if key not in found else 'too many' if key not in quiet.published else 'other'}"
    for key in store.sizes():
        known = key in quiet.published or key in quiet.others
        if not known and not _OF_A_RUN.fullmatch(key):
            yield f"{key} is of no use, and gc does not list it"
    for item in store.list_unfinished():
        yield f"{item.place or item.key} is unfinished, and gc does not list it"


def doubled(*outcomes: Outcome) -> list[str]:
    """Tasks that ran though they had ended well before, or had a record and were not those in flight at the fault."""
    found = []
    in_flight: Counter[str] = Counter()
    ended: set[str] = set()
    for outcome in outcomes:
        for note in outcome.notes:
            if note["event"] == "fault":
                in_flight.update(note["in_flight"])
            elif note["event"] == "end" and note["recorded"]:
                ended.add(note["digest"])
            elif note["event"] == "start" and note["digest"] in ended:
                found.append(note["task"])
            elif note["event"] == "start" and note["recorded"]:
                if not in_flight[note["digest"]]:
                    found.append(note["task"])
                in_flight[note["digest"]] -= 1
    return found


def left_over(store: ObjectStore, quiet: Quiet) -> list[str]:
    """What gc lists beyond what it lists of an undisturbed run. All of it is deleted then: the rest must do."""
    found = delete_leftovers(store, find_leftovers(store))
    return [f"{item.what} {item.key}" for item in found.found if item.key not in quiet.others]


def published(store: ObjectStore) -> dict[str, str]:
    """Hashes of everything below models/ by key, without what may differ: latencies, and the run in a pointer."""
    return {info.key: _hash(info.key, store.get(info.key)) for info in store.list("models/")}


def _hash(key: str, data: bytes) -> str:
    name = key.rpartition("/")[2]
    content = json.loads(data)["digest"] if name == LATEST else without_times(name, data)
    return hashlib.sha256(repr(content).encode()).hexdigest()


def reason_of(outcome: Outcome) -> str:
    """Why a run did not end well, in its own words; empty if it did."""
    if not outcome.code:
        return ""
    try:
        told = [str(model["reason"]) for model in json.loads(outcome.out)["models"] if model["reason"]]
    except ValueError:
        told = []
    return "; ".join(told) or (outcome.err.strip().splitlines() or ["it says nothing"])[-1]


def clear(output: str, store: ObjectStore) -> None:
    """Remove what a trial has made."""
    if "://" not in output:
        shutil.rmtree(output, ignore_errors=True)
        return
    for item in store.list_unfinished():
        store.discard(item)
    for key in store.sizes():
        store.delete(key)
