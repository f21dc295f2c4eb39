"""Two runs and one model: who holds, who waits, who takes over; on a folder and on S3."""

import json

import pytest

from fleetpress.jobs.driver.leases import LEASES, Leases
from fleetpress.jobs.runs.heartbeat import (
    DEAD_SECONDS,
    Heartbeat,
    Watch,
    alive_key,
    cancel_key,
)
from fleetpress.storage.errors import StoreUnreachable
from fleetpress.storage.store import ObjectStore


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class SteadyHeart(Heartbeat):
    """Beats once, at the beginning, and says what a test wants of its gaps."""

    def __init__(self, store: ObjectStore, run: str) -> None:
        super().__init__(store, run, lambda: None)
        self.gap = 0.0
        store.put(alive_key(run), f'{{"run": "{run}"}}'.encode())

    def longest_gap_seconds(self) -> float:
        return self.gap


@pytest.fixture
def clock() -> Clock:
    return Clock()


def leases(store: ObjectStore, run: str, clock: Clock) -> Leases:
    made = Leases(store, run, SteadyHeart(store, run))
    made.watch = Watch(store, clock)
    return made


def test_one_run_holds_and_the_other_is_told_so(store: ObjectStore, clock: Clock) -> None:
    one, other = leases(store, "one", clock), leases(store, "other", clock)
    held = one.take("d")
    assert held is not None
    assert (held.token, held.is_first) == (1, True)
    assert one.take("d") is held
    assert other.take("d") is None
    assert other.take("e") is not None
    one.release("d")
    after = other.take("d")
    assert after is not None
    assert not after.is_first  # the other may have left records: look for them


def test_a_dead_holder_is_overtaken_with_the_next_token(store: ObjectStore, clock: Clock) -> None:
    dead, heir = leases(store, "dead", clock), leases(store, "heir", clock)
    assert dead.take("d") is not None
    assert heir.take("d") is None
    clock.now = DEAD_SECONDS - 1
    assert heir.take("d") is None
    clock.now = DEAD_SECONDS
    found = heir.take("d")
    assert found is not None
    assert (found.token, found.is_first) == (2, False)
    heir.release("d")
    assert store.sizes(LEASES) == {}


def test_a_holder_that_beats_is_never_overtaken(store: ObjectStore, clock: Clock) -> None:
    holder, other = leases(store, "holder", clock), leases(store, "other", clock)
    holder.take("d")
    for beat in range(5):
        store.put(alive_key("holder"), json.dumps({"beat": beat}).encode())
        assert other.take("d") is None
        clock.now += DEAD_SECONDS - 1


def test_a_run_that_has_ended_holds_nothing(store: ObjectStore, clock: Clock) -> None:
    ended, other = leases(store, "ended", clock), leases(store, "other", clock)
    ended.take("d")
    store.delete(alive_key("ended"))
    assert other.take("d") is not None


def test_one_that_seemed_dead_asks_before_it_publishes(store: ObjectStore, clock: Clock) -> None:
    sleeper, heir = leases(store, "sleeper", clock), leases(store, "heir", clock)
    sleeper.take("d")
    heir.take("d")
    clock.now = DEAD_SECONDS
    assert heir.take("d") is not None
    sleeper.check("d")
    assert sleeper.take("d") is not None  # it has no reason to ask yet
    sleeper.heartbeat.gap = DEAD_SECONDS  # type: ignore[attr-defined]
    sleeper.check("d")
    store.put(alive_key("heir"), b"new")
    assert sleeper.take("d") is None


def test_two_that_take_over_at_once_get_different_answers(store: ObjectStore, clock: Clock) -> None:
    dead = leases(store, "dead", clock)
    dead.take("d")
    store.delete(alive_key("dead"))
    heirs = [leases(store, f"heir-{number}", clock) for number in range(4)]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: one.take("d"), heirs))
    assert sum(lease is not None for lease in found) == 1


@pytest.mark.parametrize("claim", [b"", b"[]", b"{}", b"\xff", b'{"run": 3}'])
def test_a_claim_that_nobody_can_read_binds_nobody(store: ObjectStore, clock: Clock, claim: bytes) -> None:
    store.put(f"{LEASES}d/000001", claim)
    found = leases(store, "one", clock).take("d")
    assert found is not None
    assert found.token == 2


def test_a_heart_beats_from_a_thread_and_hears_the_wish_to_end(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    monkeypatch.setattr("fleetpress.jobs.runs.heartbeat.BEAT_SECONDS", 0.05)
    asked = threading.Event()
    with Heartbeat(store, "r", asked.set) as heart:
        first = store.get(alive_key("r"))
        store.put(cancel_key("r"), b"{}")
        assert asked.wait(10)
        assert store.get(alive_key("r")) != first
        assert heart.longest_gap_seconds() < 5
    assert store.sizes("runs/") == {}


def test_a_beat_that_cannot_be_written_is_only_missed(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setattr("fleetpress.jobs.runs.heartbeat.BEAT_SECONDS", 0.02)
    with Heartbeat(store, "r", lambda: None) as heart:

        def gone(key: str, data: bytes) -> None:
            raise StoreUnreachable("no answer")

        with monkeypatch.context() as patch:
            patch.setattr(store, "put", gone)
            time.sleep(0.2)
        deadline = time.monotonic() + 10
        while heart.longest_gap_seconds() < 0.15 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert heart.longest_gap_seconds() >= 0.15


def test_a_driver_of_this_machine_that_is_gone_is_dead_at_once(store: ObjectStore, clock: Clock) -> None:
    import socket
    import subprocess
    import sys

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    sign = {"beat": 1, "host": socket.gethostname(), "process": ended.pid}
    store.put(alive_key("r"), json.dumps(sign).encode())
    assert not Watch(store, clock).is_alive("r")
    store.put(alive_key("r"), json.dumps({**sign, "host": "another"}).encode())
    assert Watch(store, clock).is_alive("r")
