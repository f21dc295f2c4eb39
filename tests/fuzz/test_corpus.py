"""Every kept case of bad input is refused with one clear line, in bounded time and memory, and no pickle is run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fuzz_replay import kept
from fuzz_targets import TARGETS, Verdict, uri, verdict

from fleetpress.storage.errors import StorageError
from fleetpress.storage.sources import find_models

pytestmark = pytest.mark.long

REPLAY = Path(__file__).with_name("fuzz_replay.py")
MEGABYTES = 800  # of data, above what Python, torch and pyarrow take
SECONDS = 15  # of processor time, for one case
MARK = "fleetpress-mark"
CASES = kept()


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], str, Path]:
    """What became of each case, in one process; the case it died at, if it did; and the folder it ran in."""
    folder = tmp_path_factory.mktemp("replay")
    done = subprocess.run(
        [sys.executable, str(REPLAY), str(MEGABYTES), str(SECONDS)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    died = f"{lines[-1:]}: {done.stderr[-2000:]}" if done.returncode else ""
    return {line["case"]: line for line in lines if "failure" in line}, died, folder


def test_there_are_enough_cases_of_every_target() -> None:
    assert len(CASES) >= 100
    assert {case.split("/")[0] for case in CASES} == set(TARGETS)


def test_every_case_ends_as_its_name_says(replayed: tuple[dict[str, dict[str, Any]], str, Path]) -> None:
    """`accepted` in a name: nothing in it is wrong for its reader. All others are refused."""
    found, died, _ = replayed
    assert not died
    assert set(found) == set(CASES)
    wrong = [
        f"{case}: {told['failure'] or ('refused: ' + told['message'] if told['refused'] else 'accepted')}"
        for case, told in found.items()
        if told["failure"] or told["refused"] == ("accepted" in case)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_pickle_was_run(replayed: tuple[dict[str, dict[str, Any]], str, Path]) -> None:
    found, _, folder = replayed
    assert any("mark" in case for case in found)
    assert not os.listdir(folder)


def test_the_judge_tells_a_bug_from_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("uri", b"").refused
    assert verdict("uri", b"s3://bucket/key") == Verdict()
    for raised in (KeyError("x"), RecursionError(), MemoryError(), AssertionError(), StorageError(" ")):

        def fail(_: bytes, error: Exception = raised) -> None:
            raise error

        monkeypatch.setitem(TARGETS, "uri", fail)
        assert verdict("uri", b"").failure
    monkeypatch.setitem(TARGETS, "uri", uri)


def test_devices_pipes_and_loops_are_no_objects(tmp_path: Path) -> None:
    """None is opened, which would wait for ever or never end."""
    (tmp_path / "device.pt2").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.pt2").symlink_to(tmp_path / "loop.pt2")
    (tmp_path / "outside.npz").symlink_to("/etc/passwd")
    (tmp_path / "circle").symlink_to(tmp_path, target_is_directory=True)
    for name in ("device.pt2", "pipe.safetensors", "loop.pt2"):
        with pytest.raises(StorageError, match=name):
            find_models(str(tmp_path / name))
    with pytest.raises(StorageError):
        find_models(str(tmp_path))
