"""The README cannot drift: its tables are made from the code, its commands and programs are run."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import readme_tables

from fleetpress.jobs.cli import main
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.storage.store import open_store

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which `fleetpress demo` was run."""
    place = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["demo", "--executor", "inline"]) == 0
        yield place


def models(output: Path) -> dict[str, bytes]:
    store = open_store(str(output))
    return {info.key: store.get(info.key) for info in store.list("models/") if info.key.endswith("model.pt2")}


@pytest.mark.parametrize("name", ["verbs", "methods", "rooms"])
def test_generated_part_is_what_the_code_says(name: str) -> None:
    assert readme_tables.part(TEXT, name) == readme_tables.PARTS[name](), "run: python tests/readme_tables.py"


def test_result_table_is_the_demo_s(demo: Path) -> None:
    shown = dict(re.findall(r"^(\w+) +published +(.+)$", readme_tables.part(TEXT, "demo"), re.MULTILINE))
    assert main(["status", str(demo / "fleetpress-demo/output"), "--json"]) == 0
    summary = json.loads(
        (sorted((demo / "fleetpress-demo/output/runs").iterdir())[-1] / "summary.json").read_text()
    )
    published = {
        model["name"]: model for model in summary["models"] if model["state"] in ("published", "unchanged")
    }
    assert shown.keys() == published.keys()
    for name, model in published.items():
        before, after = re.findall(r"0\.\d{4}", shown[name])
        # Another processor rounds differently on the way; what is deleted and stored does not depend on that.
        assert float(before) == pytest.approx(model["before"]["value"], abs=0.02)
        assert float(after) == pytest.approx(model["after"]["value"], abs=0.02)
        ratio = float(re.findall(r"([\d.]+)x", shown[name])[0])
        assert ratio == pytest.approx(model["compression_ratio"], rel=0.05)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("fleetpress ")]


def test_there_are_commands_and_programs_to_run() -> None:
    assert len(COMMANDS) >= 7
    assert len(blocks("python")) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_readme(command: str, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)[1:]
    if words[0] == "run":
        words += ["--executor", "inline"]
    # The demo's broken model is part of its fleet: 3 says so.
    assert main(words) == (3 if words[0] in ("plan", "run") else 0)
    assert "Traceback" not in capsys.readouterr().err


def test_programs_of_the_readme(demo: Path) -> None:
    """In a process that has imported nothing of ours; each begins with names of its own."""
    (demo / "models").mkdir(exist_ok=True)
    code = "\n".join(f"exec({program!r}, {{}})" for program in blocks("python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=demo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_spec_of_the_readme_is_valid() -> None:
    (text,) = blocks("yaml")
    assert parse_spec(text, "README.md").name == "nightly"


@pytest.mark.long
def test_demo_through_s3_and_ray_publishes_the_same_bytes(
    demo: Path, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its nets are those of the first demo: to train them again would give the same and take long.

    That a command starts a cluster of its own: end_to_end/test_secrets.py.
    """

    def put_again(uri: str) -> None:
        store = open_store(uri)
        for folder in ("models", "data"):
            for file in (demo / "fleetpress-demo" / folder).iterdir():
                store.put(f"{folder}/{file.name}", file.read_bytes())

    monkeypatch.setattr("fleetpress.jobs.demo._make_fleet", put_again)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--s3"]) == 0
    through_s3 = models(tmp_path / "fleetpress-demo" / "s3-output")
    assert len(through_s3) == 3
    assert through_s3 == models(demo / "fleetpress-demo" / "output")
