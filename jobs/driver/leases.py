"""Who works on a model: runs of the same output at the same time share the fleet instead of doing everything twice.

A lease is the object `leases/<artifact digest>/<token>`, created only if it is absent; the highest token holds. A run
that finds a dead holder creates the next token (the fencing token), and the old holder, should it wake up, sees that it
was overtaken before it publishes. No result depends on any of this: outputs are named by their content, and equal work
gives equal bytes. Where the server ignores conditions no lease is taken.
"""

from __future__ import annotations

import logging
import re
import secrets
from dataclasses import dataclass

from fleetpress.storage import canonical_json
from fleetpress.storage.errors import StorageError, WriteConflict
from fleetpress.storage.store import ObjectStore, text_field

from ..runs.heartbeat import (
    DEAD_SECONDS,
    Heartbeat,
    Watch,
)

LEASES = "leases/"
_TOKEN = re.compile(r"\d{6}")
_SAFE_GAP_SECONDS = DEAD_SECONDS / 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A held lease; `is_first` if nobody else was seen to hold it before, so that no other run has left work."""

    digest: str
    token: int
    is_first: bool


class Leases:
    """The leases of one run; those of different artifacts may be asked for at once. Raises the store's errors."""

    def __init__(self, store: ObjectStore, run: str, heartbeat: Heartbeat) -> None:
        self._store = store
        self._run = run
        self.heartbeat = heartbeat
        self.watch = Watch(store)
        self._held: dict[str, Lease] = {}
        self._refused: set[str] = set()

    def holds(self, digest: str) -> bool:
        """Whether it was taken, and neither given back nor seen to be lost."""
        return digest in self._held

    def take(self, digest: str) -> Lease | None:
        """The lease of an artifact, or None while another living run holds it. Held ones are simply given again."""
        if digest in self._held:
            return self._held[digest]
        try:
            token = self._claim(digest)
        except WriteConflict:  # another run asks for it at this very moment: see later who has it
            token = 0
        if not token:
            self._refused.add(digest)
            return None
        lease = Lease(digest=digest, token=token, is_first=token == 1 and digest not in self._refused)
        self._held[digest] = lease
        return lease

    def _claim(self, digest: str) -> int:
        """The token that was created for us; 0 if another living run holds the lease."""
        token = 1
        while not self._create(digest, token):
            last = self._tokens(digest)[-1]
            if last and not self._is_free(digest, last):
                return 0
            token = last + 1
        return token

    def check(self, digest: str) -> None:
        """Let a held lease go if another run has taken it over; asks the store only if we may have seemed dead."""
        lease = self._held.get(digest)
        if lease is None or self.heartbeat.longest_gap_seconds() < _SAFE_GAP_SECONDS:
            return
        if self._tokens(digest)[-1] != lease.token:
            del self._held[digest]
            self._refused.add(digest)

    def release(self, digest: str) -> bool:
        """Give the lease back, if it is ours; False if it stays behind, which harms nobody."""
        lease = self._held.pop(digest, None)
        try:
            for token in range(1, lease.token + 1 if lease is not None else 1):
                self._store.delete(_key(digest, token))
        except StorageError as error:
            _log.warning("a lease stays behind (%s); gc removes it", error)
            return False
        return True

    def release_all(self) -> None:
        """Give everything back."""
        for digest in list(self._held):
            if not self.release(digest):  # each of the others would take as long to fail
                break

    def _create(self, digest: str, token: int) -> bool:
        # No two claims are alike: an old one of ours, long overtaken, is not taken for a new one.
        claim = canonical_json.dumps({"run": self._run, "token": token, "claim": secrets.token_hex(8)})
        return self._store.put_if_absent(_key(digest, token), claim)

    def _tokens(self, digest: str) -> list[int]:
        """Tokens that were given out, in their order, after 0."""
        names = (name.rpartition("/")[2] for name in self._store.sizes(f"{LEASES}{digest}/"))
        return [0, *sorted(int(name) for name in names if _TOKEN.fullmatch(name))]

    def _is_free(self, digest: str, token: int) -> bool:
        """Whether nobody alive holds the token; a claim that cannot be read was made by nobody we know."""
        run = text_field(
            self._store, _key(digest, token), "run"
        )  # None, too, if it was given back since the listing
        return run in (None, self._run) or not self.watch.is_alive(str(run))


def _key(digest: str, token: int) -> str:
    return f"{LEASES}{digest}/{token:06d}"
