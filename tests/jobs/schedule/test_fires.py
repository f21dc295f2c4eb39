"""When schedules fire: changes of the clocks, ends of months, leap days, jitter; what is no cron line."""

import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.jobs.schedule.fires import CronMistake, Times, five_fields, stamp, unstamp, zone_of

MOMENTS = st.integers(1_577_836_800, 2_051_222_400).map(lambda at: datetime.fromtimestamp(at, UTC))
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def times(cron: str, zone: str = "UTC", jitter: float = 0.0) -> Times:
    return Times(name="s", cron=five_fields(cron), zone=zone_of(zone), jitter=timedelta(seconds=jitter))


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def fires(cron: str, zone: str, start: str, count: int) -> list[str]:
    return [f"{fire:%Y-%m-%d %H:%M}" for fire in times(cron, zone).next(utc(start), count)]


@pytest.mark.parametrize(
    ("cron", "zone", "start", "expected"),
    [
        # Berlin goes from +01:00 to +02:00 at 01:00 UTC: 02:30 is left out, and fires as the gap ends.
        (
            "30 2 * * *",
            "Europe/Berlin",
            "2026-03-28",
            ["2026-03-28 01:30", "2026-03-29 01:00", "2026-03-30 00:30"],
        ),
        # And back at 01:00 UTC: 02:30 comes twice, and fires the first time.
        (
            "30 2 * * *",
            "Europe/Berlin",
            "2026-10-24",
            ["2026-10-24 00:30", "2026-10-25 00:30", "2026-10-26 01:30"],
        ),
        (
            "30 2 * * *",
            "America/New_York",
            "2026-03-07",
            ["2026-03-07 07:30", "2026-03-08 07:00", "2026-03-09 06:30"],
        ),
        (
            "30 1 * * *",
            "America/New_York",
            "2026-10-31",
            ["2026-10-31 05:30", "2026-11-01 05:30", "2026-11-02 06:30"],
        ),
        # What repeats all day follows real time: 23 and 25 hours.
        (
            "*/30 * * * *",
            "Europe/Berlin",
            "2026-03-29 00:30",
            ["2026-03-29 01:00", "2026-03-29 01:30", "2026-03-29 02:00"],
        ),
        (
            "*/30 * * * *",
            "Europe/Berlin",
            "2026-10-25 00:30",
            ["2026-10-25 01:00", "2026-10-25 01:30", "2026-10-25 02:00"],
        ),
        ("0 0 29 2 *", "UTC", "2026-01-01", ["2028-02-29 00:00", "2032-02-29 00:00"]),
        (
            "0 12 31 * *",
            "UTC",
            "2026-01-01",
            ["2026-01-31 12:00", "2026-03-31 12:00", "2026-05-31 12:00"],
        ),
        ("0 0 L * *", "UTC", "2028-01-31", ["2028-02-29 00:00", "2028-03-31 00:00"]),
        # As in cron: the 13th, or a Friday.
        ("0 0 13 * 5", "UTC", "2026-03-10", ["2026-03-13 00:00", "2026-03-20 00:00", "2026-03-27 00:00"]),
        ("@daily", "Asia/Kolkata", "2026-01-01", ["2026-01-01 18:30", "2026-01-02 18:30"]),
        ("0 3 * * 7", "UTC", "2026-11-30", ["2026-12-06 03:00"]),
        ("0 3 * * SUN", "UTC", "2026-11-30", ["2026-12-06 03:00"]),
    ],
)
def test_fires(cron: str, zone: str, start: str, expected: list[str]) -> None:
    assert fires(cron, zone, start, len(expected)) == expected


def test_two_times_in_one_gap_are_one_fire() -> None:
    found = fires("0,30 2,3 * * *", "Europe/Berlin", "2026-03-29 00:00", 3)
    assert found == ["2026-03-29 01:00", "2026-03-29 01:30", "2026-03-30 00:00"]


def test_a_search_that_begins_in_the_fold_finds_nothing_of_before() -> None:
    begun = utc("2026-10-25 01:10")  # 02:10 for the second time
    assert times("30 2 * * *", "Europe/Berlin").next(begun, 1) == [utc("2026-10-26 01:30")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has 1 fields"),
        ("* * * *", "has 4 fields"),
        ("0 * * * * *", "has 6 fields"),
        ("60 * * * *", "the minute is wrong; it takes 0 to 59"),
        ("0 25 * * *", "the hour is wrong"),
        ("0 0 32 * *", "the day-of-month is wrong"),
        ("0 0 31 2 *", "the day-of-month is wrong"),
        ("0 0 * 13 *", "the month is wrong"),
        ("0 0 * * 8", "the day-of-week is wrong"),
        ("0 0 * * MO", "the day-of-week is wrong"),
        ("0/0 * * * *", "the minute is wrong"),
        ("@dayly", "valid words: @hourly, @daily"),
        ("0 0 */30 2 SUN#5", "never fires"),
    ],
)
def test_what_is_no_cron_line_is_told(text: str, problem: str) -> None:
    with pytest.raises(CronMistake, match=re.escape(problem)):
        five_fields(text)


def test_stamps_sort_as_time_does_and_come_back() -> None:
    moments = [utc("2026-09-30 23:59:59"), utc("2026-10-01 00:00")]
    assert [unstamp(stamp(moment)) for moment in moments] == moments
    assert sorted(map(stamp, moments)) == [stamp(moment) for moment in moments]


def test_jitter_is_the_same_for_everybody_and_spreads() -> None:
    one, other = times("*/5 * * * *", jitter=240), times("*/5 * * * *", jitter=240)
    found = one.next(LONG_AGO, 50)
    delays = [(one.release(fire) - fire).total_seconds() for fire in found]
    assert delays == [(other.release(fire) - fire).total_seconds() for fire in found]
    assert min(delays) >= 0
    assert max(delays) <= 240
    assert len(set(delays)) > 30
    assert times("@daily").release(found[0]) == found[0]


@settings(max_examples=60, deadline=None)
@given(
    now=MOMENTS,
    zone=st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"]),
    cron=st.sampled_from(
        ["30 2 * * *", "50 */3 * * *", "0 0 1 * *", "0 4 * * SUN", "15,45 1,2 * * *", "0 0 29 2 *"]
    ),
    jitter=st.sampled_from([0, 90, 3_600, 86_400]),
)
def test_the_newest_due_fire_is_that_of_all_fires(now: datetime, zone: str, cron: str, jitter: int) -> None:
    """Found by looking back in steps; compared with walking over every fire of the last days or years."""
    one = times(cron, zone, jitter)
    since = now - timedelta(days=3_000 if cron == "0 0 29 2 *" else 40 if "1 *" in cron else 9)
    walked = []
    for fire in one.after(since):
        if fire > now:
            break
        walked.append(fire)
    due = [fire for fire in walked if one.release(fire) <= now]
    expected = max(due, key=lambda fire: (one.release(fire), fire), default=None)
    assert one.newest_due(now, since=since) == expected
    waiting = [fire for fire in walked if one.release(fire) > now]
    assert one.waiting(now, since=since) == min(waiting, key=one.release, default=None)


@settings(max_examples=60, deadline=None)
@given(
    start=MOMENTS,
    zone=st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe"]),
    cron=st.sampled_from(["30 2 * * *", "*/20 * * * *", "0,30 1,2,3 * * *", "15 2 * * 0"]),
)
def test_fires_go_forward_and_do_not_depend_on_where_the_search_begins(
    start: datetime, zone: str, cron: str
) -> None:
    found = times(cron, zone).next(start, 20)
    assert all(one < other for one, other in pairwise([start, *found]))
    assert times(cron, zone).next(found[9], 10) == found[10:]
    assert times(cron, zone).next(found[9] - timedelta(seconds=1), 1) == [found[9]]


def test_every_zone_s_daily_fires_are_one_a_day() -> None:
    for zone in ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Casablanca"):
        found = times("10 2 * * *", zone).next(utc("2026-01-01"), 365)
        days = {fire.astimezone(zone_of(zone)).date() for fire in found}
        assert len(days) == 365


def test_a_fire_of_a_year_ago_is_found_in_no_time() -> None:
    assert times("0 0 29 2 *").newest_due(utc("2031-05-01"), since=LONG_AGO) == utc("2028-02-29")
    assert times("@yearly").newest_due(utc("2031-05-01"), since=LONG_AGO) == utc("2031-01-01")
    assert times("@yearly").newest_due(utc("2031-05-01"), since=utc("2031-02-01")) is None
