"""The schedule file: the mistakes people make in it, each told with its line, its path and what to write instead."""

import contextlib
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.jobs.errors import SpecError
from fleetpress.jobs.schedule.file import check_specs, load_schedules, parse_schedules

ROOT = Path(__file__).parents[3]
GOOD = """\
version: 1
output: s3://compressed/nightly
schedules:
  - name: nightly
    spec: fleet.yaml
    cron: "30 2 * * *"
    timezone: Europe/Berlin
    concurrency: forbid
    misfire: run_once
    misfire_deadline: 12h
    jitter: 10min
    deadline: 6h
    address: http://head:8265
  - name: weekly
    spec: s3://specs/weekly.yaml
    cron: "@weekly"
"""

MISTAKES = [
    ("version: 1", "version: 2", "1: version: should be 1, not 2"),
    ("output: s3://compressed/nightly\n", "", "1: output: is missing; add it"),
    (
        "output: s3://compressed/nightly",
        "output: s3:/compressed",
        "2: output: 's3:/compressed' is no place to read or write: write s3://compressed",
    ),
    ("schedules:", "schedule:", "3: schedule: unknown key; did you mean `schedules`?"),
    (
        "name: nightly",
        "name: Nightly/1",
        "4: schedules[0].name: `Nightly/1` cannot be a schedule's name; use lower-case letters, digits and `-`,"
        " a letter or digit first and last, at most 40",
    ),
    ("name: nightly", "name: ..", "4: schedules[0].name: `..` cannot be a schedule's name"),
    (
        "name: weekly",
        "name: nightly",
        "14: schedules[1].name: `nightly` is also the name of schedules[0]; rename one",
    ),
    (
        "timezone: Europe/Berlin",
        "timezone: Europe/Berlim",
        "7: schedules[0].timezone: there is no time zone `Europe/Berlim`; did you mean `Europe/Berlin`?",
    ),
    (
        "timezone: Europe/Berlin",
        "timezone: ../../etc/passwd",
        "7: schedules[0].timezone: there is no time zone `../../etc/passwd`; such as UTC or Europe/Berlin",
    ),
    (
        "timezone: Europe/Berlin",
        "time_zone: Europe/Berlin",
        "7: schedules[0].time_zone: unknown key; did you mean `timezone`?",
    ),
    (
        'cron: "30 2 * * *"',
        'cron: "30 24 * * *"',
        "6: schedules[0].cron: `30 24 * * *`: the hour is wrong; it takes 0 to 23, with `*`, `,`, `-` and `/`",
    ),
    (
        'cron: "30 2 * * *"',
        'cron: "30 2 * *"',
        "6: schedules[0].cron: `30 2 * *` has 4 fields; five are needed: minute, hour, day of month, ",
    ),
    (
        "concurrency: forbid",
        "concurrency: forbit",
        "8: schedules[0].concurrency: should be allow or forbid or replace, not 'forbit'; did you mean `forbid`?",
    ),
    (
        "misfire: run_once",
        "misfire: skip",
        "10: schedules[0].misfire_deadline: has no meaning with misfire: skip; delete it, or take run_once",
    ),
    (
        "jitter: 10min",
        "jitter: 10",
        "11: schedules[0].jitter: should be a time such as 6h, 90min or 45s, not 10",
    ),
    (
        "jitter: 10min",
        "jitter: 2d",
        "11: schedules[0].jitter: is more than a day; spread the cron lines instead",
    ),
    (
        "deadline: 6h\n",
        "dead_line: 6h\n",
        "12: schedules[0].dead_line: unknown key; did you mean `deadline`?",
    ),
    (
        "address: http://head:8265",
        "address: head",
        "13: schedules[0].address: should be http://head:8265 (Ray's Jobs API) or head:6379 (a cluster to join)",
    ),
    (
        "address: http://head:8265",
        "address: http://user:secret@head:8265",
        "13: schedules[0].address: should be http://head:8265",
    ),
    (
        "address: http://head:8265",
        "address: http://head:8265\n    executor: inline",
        "14: schedules[0].executor: inline works without a cluster; delete it, or the address",
    ),
    (
        "    address: http://head:8265\n",
        "    code: factories.py\n",
        "13: schedules[0].code: goes along to a cluster's Jobs API only",
    ),
    (
        "spec: fleet.yaml",
        "spec: specs/*.yaml",
        "5: schedules[0].spec: a schedule has one spec, not a pattern; write an entry for each",
    ),
    (
        GOOD[GOOD.index("schedules:") :],
        "schedules: []\n",
        "3: schedules: is empty; name at least one, or delete the key",
    ),
]


def test_a_good_file_means_what_it_says() -> None:
    nightly, weekly = parse_schedules(GOOD, "s.yaml").schedules
    assert (nightly.name, nightly.timezone, nightly.concurrency) == ("nightly", "Europe/Berlin", "forbid")
    assert nightly.latest_start == timedelta(hours=12)
    assert nightly.times.jitter == timedelta(minutes=10)
    assert nightly.deadline_seconds == 6 * 3600
    assert nightly.is_submitted
    assert (weekly.cron, weekly.timezone, weekly.misfire, weekly.concurrency) == (
        "0 0 * * 0",
        "UTC",
        "run_once",
        "forbid",
    )
    assert weekly.deadline_seconds is None
    assert not weekly.is_submitted


@pytest.mark.parametrize(("old", "new", "problem"), MISTAKES, ids=[what for _, _, what in MISTAKES])
def test_a_mistake_is_told(old: str, new: str, problem: str) -> None:
    assert old in GOOD
    with pytest.raises(SpecError) as raised:
        parse_schedules(GOOD.replace(old, new, 1), "s.yaml")
    assert any(line.startswith(f"s.yaml:{problem}") for line in str(raised.value).splitlines()), raised.value


def test_all_mistakes_are_told_at_once_in_their_order() -> None:
    text = GOOD.replace("forbid", "forbit").replace("10min", "10").replace('"@weekly"', '"@weekli"')
    with pytest.raises(SpecError) as raised:
        parse_schedules(text, "s.yaml")
    assert [line.split(": ")[1] for line in str(raised.value).splitlines()] == [
        "schedules[0].concurrency",
        "schedules[0].jitter",
        "schedules[1].cron",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "s.yaml: the schedule file is empty; it needs version, output and schedules"),
        ("a: [", "s.yaml:1: not valid YAML"),
        ("[]", "s.yaml:1: should be a mapping of keys to values"),
        ("version: 1\noutput: o\nschedules: {name: a}\n", "s.yaml:3: schedules: should be a list"),
        ("version: 1\noutput: o\nschedules: [1]\n", "s.yaml:3: schedules[0]: should be a mapping"),
    ],
)
def test_what_is_no_schedule_file_is_told(text: str, problem: str) -> None:
    with pytest.raises(SpecError) as raised:
        parse_schedules(text, "s.yaml")
    assert str(raised.value).startswith(problem)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"there is no schedule `nightli`; did you mean `nightly`\?"):
        parse_schedules(GOOD, "s.yaml").named("nightli")


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["30 2 * * *", "1h", "a"]),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["version", "output", "schedules", "name", "spec", "cron", "timezone", "jitter"]), inner
        ),
        max_leaves=12,
    )
)  # fmt: skip
def test_any_values_are_schedules_or_told_of(value: object) -> None:
    """No other error than SpecError, whatever the file holds."""
    with contextlib.suppress(SpecError):
        parse_schedules(yaml.safe_dump(value, allow_unicode=True), "s.yaml")


def test_specs_are_found_beside_the_file_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "schedules.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path.parent)
    nightly, weekly = load_schedules(f"{tmp_path.name}/schedules.yaml").schedules
    assert (nightly.spec, weekly.spec) == (f"{tmp_path}/fleet.yaml", "s3://specs/weekly.yaml")


def test_a_file_in_a_bucket_has_its_specs_beside_it(s3_uri: str) -> None:
    from fleetpress.storage.store import open_store

    open_store(s3_uri).put("a/schedules.yaml", GOOD.encode())
    assert load_schedules(f"{s3_uri}/a/schedules.yaml").schedules[0].spec == f"{s3_uri}/a/fleet.yaml"


def test_the_example_is_valid_and_so_are_its_specs() -> None:
    file = load_schedules(str(ROOT / "examples" / "schedules.yaml"))
    assert check_specs(file) == []
    assert {schedule.misfire for schedule in file.schedules} == {"skip", "run_once"}


def test_problems_of_specs_are_told_too(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(GOOD.replace("s3://specs/weekly.yaml", "weekly.yaml"))
    (tmp_path / "weekly.yaml").write_text("version: 1\n")
    problems = check_specs(load_schedules(str(tmp_path / "s.yaml")))
    assert problems[0].startswith(f"{tmp_path}/fleet.yaml: cannot be read: No such file or directory")
    assert all(line.startswith(f"{tmp_path}/weekly.yaml:") for line in problems[1:])
    assert len(problems) == 5
