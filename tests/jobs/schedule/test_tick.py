"""What ticks do: begin once what is due, and leave the rest for a reason that they tell."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.jobs.errors import ClusterUnreachable
from fleetpress.jobs.schedule.claims import Claims
from fleetpress.jobs.schedule.records import OpenJob
from fleetpress.jobs.schedule.tick import TickResult, tick

NIGHTLY = 'cron: "30 2 * * *"'
HOURLY = 'cron: "0 * * * *"'
Make = Callable[[str], Any]


def told(result: TickResult) -> list[tuple[str, str]]:
    return [(row.action, row.reason) for row in result.rows]


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_a_day_of_ticks_begins_each_fire_once(store_ticker: Make) -> None:
    nightly = store_ticker(NIGHTLY)
    rows = nightly.every("2026-03-01T02:00", "2026-03-01T04:00", 10)
    assert [(row.action, row.job) for row in rows] == [("begun", "s-20260301T023000Z")]
    nightly.cluster.end()
    rows = nightly.every("2026-03-01T04:05", "2026-03-02T04:00", 60)
    assert [(row.action, row.job, row.reason) for row in rows] == [
        ("ended", "s-20260301T023000Z", "succeeded"),
        ("begun", "s-20260302T023000Z", "35 min 00 s late"),
    ]
    assert nightly.cluster.begun == ["s-20260301T023000Z", "s-20260302T023000Z"]


def test_a_tick_tells_what_it_waits_for_and_what_runs(ticker: Make) -> None:
    nightly = ticker(NIGHTLY)
    assert told(nightly.at("2026-03-01T02:00")) == [("waiting", "next fire at 2026-03-01 02:30 UTC")]
    assert told(nightly.at("2026-03-01T02:30")) == [("begun", "")]
    assert told(nightly.at("2026-03-01T02:31")) == [
        ("running", ""),
        ("waiting", "next fire at 2026-03-02 02:30 UTC"),
    ]
    nightly.cluster.end("failed")
    result = nightly.at("2026-03-01T02:32")
    assert told(result)[0] == ("ended", "failed")
    assert result.exit_code == 0


def test_a_first_tick_does_the_fire_that_started_it_and_nothing_older(ticker: Make) -> None:
    assert told(ticker(NIGHTLY).at("2026-03-01T02:30:04"))[0][0] == "begun"
    assert told(ticker(NIGHTLY).at("2026-03-01T02:50"))[0][0] == "waiting"


def test_another_cron_line_counts_from_when_it_was_first_seen(ticker: Make) -> None:
    before = ticker(NIGHTLY)
    before.at("2026-03-01T12:00")
    edited = type(before)(before.store, 'cron: "0 11 * * *"', before.cluster)
    assert told(edited.at("2026-03-01T12:01"))[0][0] == "waiting"
    assert told(edited.at("2026-03-02T11:00"))[0][0] == "begun"


@pytest.mark.parametrize(
    ("options", "begun", "words"),
    [
        ("misfire: skip", [], "missed: seen 9 h 30 min late, more than 10 min 00 s"),
        ("misfire: run_once", ["s-20260308T023000Z"], "9 h 30 min late"),
        ("misfire: run_once, misfire_deadline: 9h", [], "missed: seen 9 h 30 min late, more than 9 h 00 min"),
        ("misfire: skip, grace: 10h", ["s-20260308T023000Z"], ""),
    ],
)
def test_a_week_of_downtime(ticker: Make, options: str, begun: list[str], words: str) -> None:
    nightly = ticker(f"{NIGHTLY}, {options}")
    nightly.at("2026-03-01T20:00")
    result = nightly.at("2026-03-08T12:00")
    assert told(result) == [("begun" if begun else "skipped", words)]
    assert nightly.cluster.begun == begun
    assert result.exit_code == 0
    nightly.cluster.end()
    nightly.at("2026-03-08T12:01")
    assert told(nightly.at("2026-03-08T12:02")) == [("waiting", "next fire at 2026-03-09 02:30 UTC")]
    assert nightly.cluster.begun == begun


def test_a_paused_schedule_begins_nothing_and_catches_nothing_up(store_ticker: Make) -> None:
    nightly = store_ticker(f"{NIGHTLY}, misfire_deadline: 7d")
    nightly.at("2026-03-01T01:00")
    claims = Claims(nightly.store, "s")
    control = claims.pause(by="ann@desk", now=utc("2026-03-01T02:00"))
    assert (control.paused, control.by, control.at) == (True, "ann@desk", "20260301T020000Z")
    assert claims.pause(by="bob@desk", now=utc("2026-03-01T02:01")) == control
    assert told(nightly.at("2026-03-01T02:30")) == [("skipped", "paused")]
    assert told(nightly.at("2026-03-01T02:31"))[0][0] == "waiting"
    claims.resume(by="bob@desk", now=utc("2026-03-03T03:00"))  # no tick saw the second and the third
    assert told(nightly.at("2026-03-03T03:01"))[0][0] == "waiting"
    assert told(nightly.at("2026-03-04T02:30")) == [("begun", "")]


def test_forbid_skips_while_a_job_runs_and_says_which(ticker: Make) -> None:
    hourly = ticker(f"{HOURLY}, concurrency: forbid")
    hourly.at("2026-03-01T01:00")
    assert told(hourly.at("2026-03-01T02:00")) == [
        ("running", ""),
        ("skipped", "s-20260301T010000Z is still running"),
    ]
    hourly.cluster.end()
    assert told(hourly.at("2026-03-01T03:00")) == [("ended", "succeeded"), ("begun", "")]
    claim = Claims(hourly.store, "s").claim(utc("2026-03-01T02:00"))
    assert (claim.decision, claim.reason) == ("skip", "s-20260301T010000Z is still running")


def test_allow_lets_jobs_run_beside_one_another(ticker: Make) -> None:
    hourly = ticker(f"{HOURLY}, concurrency: allow")
    hourly.every("2026-03-01T01:00", "2026-03-01T03:00", 60)
    assert hourly.cluster.begun == ["s-20260301T010000Z", "s-20260301T020000Z", "s-20260301T030000Z"]


def test_replace_stops_the_old_job_first(store_ticker: Make) -> None:
    hourly = store_ticker(f"{HOURLY}, concurrency: replace")
    hourly.at("2026-03-01T01:00")
    hourly.cluster.calls.clear()
    assert told(hourly.at("2026-03-01T02:00")) == [
        ("running", ""),
        ("stopped", "replaced by a newer fire"),
        ("begun", ""),
    ]
    assert [call for call in hourly.cluster.calls if call[0] != "state"] == [
        ("stop", "s-20260301T010000Z"),
        ("launch", "s-20260301T020000Z"),
        ("begun", "s-20260301T020000Z"),
    ]
    claim = Claims(hourly.store, "s").claim(utc("2026-03-01T01:00"))
    assert (claim.state, claim.reason) == ("stopped", "replaced by a newer fire")


def test_replace_goes_on_when_the_old_job_does_not_end_in_time(ticker: Make) -> None:
    hourly = ticker(f"{HOURLY}, concurrency: replace")
    hourly.cluster.stops_at_once = False
    hourly.at("2026-03-01T01:00")
    rows = told(hourly.at("2026-03-01T02:00"))
    assert rows[1:] == [("running", "asked to make room for a newer fire, and still busy"), ("begun", "")]
    assert 60 < hourly.clock_seconds < 120


def test_a_job_over_its_deadline_is_stopped(ticker: Make) -> None:
    nightly = ticker(f"{NIGHTLY}, deadline: 2h")
    nightly.at("2026-03-01T02:30")
    assert told(nightly.at("2026-03-01T04:30"))[0] == ("running", "")
    nightly.cluster.stops_at_once = False
    assert told(nightly.at("2026-03-01T04:31"))[:2] == [
        ("stopped", "over its deadline of 2 h 00 min"),
        ("running", ""),
    ]
    nightly.cluster.stops_at_once = True
    assert told(nightly.at("2026-03-01T04:32"))[0] == ("stopped", "over its deadline of 2 h 00 min")
    assert told(nightly.at("2026-03-01T04:33"))[0][0] == "waiting"
    assert Claims(nightly.store, "s").claim(utc("2026-03-01T02:30")).state == "stopped"


def test_a_cluster_that_is_down_is_asked_again_until_it_is_too_late(ticker: Make) -> None:
    nightly = ticker(f"{NIGHTLY}, misfire_deadline: 1h")
    nightly.cluster.is_down = True
    down = nightly.at("2026-03-01T02:30")
    assert told(down) == [("failed", "nobody answers at http://head:8265; is the cluster up?")]
    assert down.exit_code == 5
    assert nightly.at("2026-03-01T02:31").exit_code == 5
    nightly.cluster.is_down = False
    rows = told(nightly.at("2026-03-01T02:32"))
    assert rows[0] == ("begun", "tried again: nobody answers at http://head:8265; is the cluster up?")
    assert nightly.cluster.begun == ["s-20260301T023000Z"]
    nightly.cluster.end()
    nightly.at("2026-03-01T03:00")
    nightly.cluster.is_down = True
    nightly.at("2026-03-02T02:30")
    assert told(nightly.at("2026-03-02T03:31"))[0][0] == "skipped"
    nightly.cluster.is_down = False
    assert told(nightly.at("2026-03-02T03:32")) == [("waiting", "next fire at 2026-03-03 02:30 UTC")]
    assert Claims(nightly.store, "s").claim(utc("2026-03-02T02:30")).state == "failed"


@pytest.mark.parametrize(
    ("concurrency", "actions"),
    [("allow", ["failed", "failed"]), ("forbid", ["failed", "waiting"]), ("replace", ["failed", "waiting"])],
)
def test_a_fire_waits_until_it_can_be_told_whether_a_job_runs(
    ticker: Make, concurrency: str, actions: list[str]
) -> None:
    """A claim is for ever: a fire is not skipped for a job that may have ended long ago."""
    hourly = ticker(f"{HOURLY}, concurrency: {concurrency}")
    hourly.at("2026-03-01T01:00")
    hourly.cluster.end()
    hourly.cluster.is_down = True
    assert [row.action for row in hourly.at("2026-03-01T02:00").rows] == actions
    hourly.cluster.is_down = False
    hourly.at("2026-03-01T02:01")
    assert hourly.cluster.begun == ["s-20260301T010000Z", "s-20260301T020000Z"]


def test_a_job_at_an_address_that_the_file_does_not_name_any_more_is_given_up(ticker: Make) -> None:
    before = ticker(f'{HOURLY}, address: "http://old:8265"')
    before.at("2026-03-01T01:00")
    moved = type(before)(before.store, f'{HOURLY}, address: "http://new:8265"', before.cluster)
    state = before.cluster.state

    def unreachable(job_id: str) -> str:
        if job_id == "s-20260301T010000Z":
            raise ClusterUnreachable("nobody answers at http://old:8265")
        return str(state(job_id))

    moved.cluster.state = unreachable
    assert told(moved.at("2026-03-01T02:00")) == [("ended", "unknown"), ("begun", "")]


def test_a_look_begins_nothing_and_sees_what_has_ended(ticker: Make) -> None:
    """A job in the foreground may outlast the next fire, which is another process's to begin."""
    hourly = ticker(HOURLY)
    hourly.at("2026-03-01T01:00")
    hourly.cluster.end()
    looking = replace(hourly.how(utc("2026-03-01T02:00")), only_looks=True)
    assert told(tick(hourly.file, looking, store=hourly.store)) == [("ended", "succeeded")]
    assert told(tick(hourly.file, looking, store=hourly.store)) == []
    assert len(hourly.cluster.begun) == 1


def test_what_could_not_be_begun_gives_way_to_the_next_fire(ticker: Make) -> None:
    hourly = ticker(HOURLY)
    hourly.cluster.is_down = True
    hourly.at("2026-03-01T01:00")
    hourly.cluster.is_down = False
    assert [action for action, _ in told(hourly.at("2026-03-01T02:00"))] == ["skipped", "begun"]
    assert hourly.cluster.begun == ["s-20260301T020000Z"]


@pytest.mark.parametrize("dies_after", [1, 2, 3])
def test_a_tick_that_dies_on_the_way_is_gone_on_with(ticker: Make, dies_after: int) -> None:
    """It opens the job, claims the fire, begins the job, and says so; here it dies after each of these."""
    nightly = ticker(NIGHTLY)
    nightly.at("2026-03-01T02:00")
    fire, claims = utc("2026-03-01T02:30"), Claims(nightly.store, "s")
    job = OpenJob(fire="20260301T023000Z", job="s-20260301T023000Z", at="20260301T023000Z", by="dead")
    claims.open(fire, job)
    if dies_after >= 2:
        claims.take(fire, "run", reason="", by="dead", now=fire)
    if dies_after >= 3:
        nightly.cluster.launch("fleet.yaml", job.job)
    nightly.every("2026-03-01T02:31", "2026-03-01T02:50")
    assert nightly.cluster.begun == ["s-20260301T023000Z"]
    nightly.cluster.end()
    nightly.at("2026-03-01T03:00")
    assert claims.open_jobs() == {}
    assert claims.claim(fire).state == "succeeded"


def test_a_job_that_the_cluster_has_forgotten_is_not_begun_again(ticker: Make) -> None:
    nightly = ticker(NIGHTLY)
    nightly.at("2026-03-01T02:30")
    nightly.cluster.states.clear()  # another cluster by now
    assert told(nightly.at("2026-03-01T02:40"))[0] == ("ended", "unknown")
    nightly.every("2026-03-01T02:41", "2026-03-01T02:59", 3)
    assert len(nightly.cluster.begun) == 1


def test_one_schedule_that_fails_does_not_stop_the_others(ticker: Make) -> None:
    nightly = ticker(f"{NIGHTLY}}}\n  - {{name: other, spec: other.yaml, {HOURLY}")
    nightly.store.put("schedules/s/control.json", b"{}garbage")
    result = nightly.at("2026-03-01T03:00")
    assert [row.action for row in result.rows] == ["failed", "begun"]
    assert "schedules/s/control.json is no record of a schedule" in result.rows[0].reason
    assert result.exit_code == 3


@pytest.mark.parametrize(
    "garbage",
    [
        b"[]",
        b'{"fire": 3}',
        b'{"fire": "20260301T023000Z", "job": "x", "decision": "maybe"}',
        b'{"fire": "x", "job": "x", "decision": "run"}',
    ],
)
def test_a_claim_that_is_none_of_ours_is_told_of(ticker: Make, garbage: bytes) -> None:
    nightly = ticker(NIGHTLY)
    nightly.store.put("schedules/s/20260301T023000Z.json", garbage)
    result = nightly.at("2026-03-01T02:30")
    assert result.exit_code == 4
    assert "20260301T023000Z.json is no record of a schedule" in result.rows[0].reason
    assert nightly.cluster.begun == []


def test_jitter_delays_the_beginning_and_two_machines_agree(ticker: Make) -> None:
    nightly = ticker(f"{NIGHTLY}, jitter: 1h")
    release = nightly.schedule.times.release(utc("2026-03-01T02:30"))
    assert release > utc("2026-03-01T02:31")
    nightly.at("2026-03-01T02:00")
    assert told(nightly.at(release - timedelta(seconds=1)))[0][0] == "waiting"
    assert told(nightly.at(release)) == [("begun", "")]


@settings(max_examples=40, deadline=None)
@given(
    minutes=st.lists(st.integers(0, 4 * 1440), min_size=1, max_size=25),
    cron=st.sampled_from(["30 2 * * *", "0 */6 * * *", "50 * * * *"]),
    misfire=st.sampled_from(["skip", "run_once"]),
    jitter=st.sampled_from(["1s", "20min", "5h"]),
)
def test_whenever_ticks_come_each_fire_is_begun_at_most_once_and_none_is_lost(
    ticker: Make, minutes: list[int], cron: str, misfire: str, jitter: str
) -> None:
    """The fire that a tick finds newest is begun by it, if not by an earlier one, and if it is not too late."""
    one = ticker(
        f'cron: "{cron}", timezone: Europe/Berlin, misfire: {misfire}, grace: 15min, jitter: {jitter},'
        " concurrency: allow"
    )
    start = utc("2026-03-27T00:00")
    expected: list[datetime] = []
    times, since = one.schedule.times, None
    fires = times.next(start - timedelta(days=1), 8 if cron.startswith("30") else 170)
    for minute in sorted(minutes):
        now = start + timedelta(minutes=minute)
        since = since or now - timedelta(minutes=15) - times.jitter
        result = one.at(now)
        assert result.exit_code == 0
        due = [fire for fire in fires if fire > since and times.release(fire) <= now]
        newest = max(due, key=lambda fire: (times.release(fire), fire), default=None)
        if newest and newest not in expected and now - times.release(newest) <= one.schedule.latest_start:
            expected.append(newest)
    assert one.cluster.begun == [Claims(one.store, "s").job_of(fire) for fire in expected]
