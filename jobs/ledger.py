"""The ledger: one small record per finished task, in the output, shared by all runs. Done once, never done again.

A record is written after the objects that it names, and names their sizes, so a record that can be read and
whose objects are there proves the task; anything less is as good as no record.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Set

from fleetpress.storage.canonical_json import dumps
from fleetpress.storage.errors import ObjectNotFound
from fleetpress.storage.store import ObjectStore, read_json

from .tasks import Output, Task, TaskRecord, record_from_json, to_json
from .threads import side_by_side

_PREFIX = "records/"
_SUFFIX = ".json"

_log = logging.getLogger(__name__)


class Ledger:
    """Records of the output at `store`. Raises the store's errors (StoreUnreachable, AccessDenied ...)."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._known: set[str] | None = None
        self._sizes: Mapping[str, int] = {}
        self._open: dict[tuple[str, str], bool] = {}

    def known(self) -> Set[str]:
        """Digests that have a record, by one listing at the first call; `find` says whether it holds."""
        if self._known is None:
            self._sizes = self.store.sizes(_PREFIX)
            names = (key.removeprefix(_PREFIX) for key in self._sizes)
            self._known = {name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)}
        return self._known

    def find(self, digest: str) -> TaskRecord | None:
        """The record of a finished task whose objects are all there in their full size, else None."""
        record = self.read(digest)
        problem = "" if record is None else self._problem(record)
        if problem:
            _log.warning(
                "%s/%s does not hold (%s): the task runs again", self.store.uri, _key(digest), problem
            )
            return None
        return record

    def find_all(self, tasks: Iterable[Task], *, again: bool = False) -> dict[str, TaskRecord]:
        """Records that hold, by task id: of the tasks that the listing knows, or with `again` of all of them."""
        known = self.known()
        asked = [task for task in tasks if again or task.digest in known]
        found = side_by_side(self.find, [task.digest for task in asked])
        return {task.id: record for task, record in zip(asked, found, strict=True) if record is not None}

    def read(self, digest: str) -> TaskRecord | None:
        """The record of a finished task, its objects not looked for; None if there is no valid one."""
        key = _key(digest)
        try:
            record = record_from_json(read_json(self.store, key))
        except ObjectNotFound:
            return None
        except ValueError as error:  # torn, endless, not UTF-8, not JSON, or not a record
            _log.warning("%s/%s is no valid record (%s): the task runs again", self.store.uri, key, error)
            return None
        if record.digest != digest:
            _log.warning(
                "%s/%s does not hold (it is the record of %s): the task runs again",
                self.store.uri,
                key,
                record.digest,
            )
            return None
        return record

    def write(self, record: TaskRecord) -> None:
        """Writes the record; whatever `record.outputs` names must be stored already."""
        self.store.put(_key(record.digest), dumps(to_json(record)))
        if self._known is not None:
            self._known.add(record.digest)

    def _problem(self, record: TaskRecord) -> str:
        return next((problem for output in record.outputs if (problem := self._output_problem(output))), "")

    def _output_problem(self, output: Output) -> str:
        if output.upload and self._is_open(output.key, output.upload):
            return ""
        if self._sizes.get(output.key) == output.bytes:
            return ""
        try:
            stored = self.store.head(output.key).size_bytes
        except ObjectNotFound:
            return f"{output.key} is gone"
        return "" if stored == output.bytes else f"{output.key} has {stored} bytes instead of {output.bytes}"

    def _is_open(self, key: str, upload: str) -> bool:
        """Whether an upload that several records name is still under way; asked once."""
        if (key, upload) not in self._open:
            self._open[key, upload] = self.store.upload_exists(key, upload)
        return self._open[key, upload]


def _key(digest: str) -> str:
    return f"{_PREFIX}{digest}{_SUFFIX}"
