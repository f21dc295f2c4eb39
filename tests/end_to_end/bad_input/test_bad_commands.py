"""Mistakes on the command line, damaged outputs, and a run that is stopped: what is told, and the exit code."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fleetpress.storage.store import open_store

_CLI = "import sys; from fleetpress.jobs.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def output(place: Path, write_fleet: Any, cli: Any) -> str:
    """An output with one run and one published model."""
    assert cli("run", write_fleet(place, place), "--executor", "inline").code == 0
    return f"{place}/out"


@pytest.mark.parametrize(
    "mistake",
    [
        ([], "VERB"),
        (["squeeze"], "invalid choice: 'squeeze'"),
        (["run"], "SPEC"),
        (["run", "spec.yaml", "--executor", "spark"], "'spark'"),
        (["run", "absent.yaml"], "absent.yaml: cannot be read"),
        (["run", "."], "cannot be read: Is a directory"),
        (["plan", "absent.yaml"], "absent.yaml: cannot be read"),
        (["status", "{empty}"], "holds no runs; give the `output` of a spec"),
        (["status", "{absent}"], "holds no runs"),
        (["status", "ftp://x/y"], "no place to read or write"),
        (["report", "{empty}"], "holds no runs"),
        (["status", "{output}", "20200101"], "holds no run '20200101'; the latest are: 2"),
        (["report", "{output}", "nothing"], "holds no run 'nothing'"),
        (["report", "{output}", "--html", "{absent}/page.html"], "page.html: cannot be written"),
        (["verify", "{empty}"], "is no artifact"),
        (["verify", "{output}"], "give <output>/models/<name>"),
        (["verify", "{output}/models/godo"], "is no artifact"),
        (["dequantize", "{empty}", "{absent}"], "is no artifact"),
        (["methods", "magnitud"], "magnitude"),
    ],
    ids=lambda mistake: "_".join(mistake[0]),
)
def test_a_mistake_is_told_with_its_remedy(
    mistake: tuple[list[str], str], output: str, tmp_path: Path, cli: Any
) -> None:
    words, says = mistake
    places = {"output": output, "empty": str(tmp_path), "absent": str(tmp_path / "absent")}
    outcome = cli(*(word.format(**places) for word in words))
    assert outcome.code == 2
    assert says in outcome.err
    assert outcome.out == ""


def test_dequantize_to_a_place_that_takes_no_files(output: str, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "file").write_text("")
    outcome = cli("dequantize", f"{output}/models/good", f"{tmp_path}/file")
    assert outcome.code == 5
    assert "a part of its path is a file" in outcome.err


DAMAGES = {
    "summary": ("runs/*/summary.json", b"{", ["status"], 2, "is no run summary"),
    "summary_of_another_form": (
        "runs/*/summary.json",
        b'{"models": [{}]}',
        ["status"],
        2,
        "is no run summary",
    ),
    "pointer": ("models/good/latest.json", b"[]", ["list"], 2, "latest.json"),
    "pointer_without_digest": ("models/good/latest.json", b"{}", ["list"], 2, "latest.json"),
    "manifest": (
        "models/good/*/manifest.json",
        b"\xff",
        ["verify", "models/good"],
        2,
        "manifest.json is not JSON",
    ),
    "manifest_of_another_form": (
        "models/good/*/manifest.json",
        b"{}",
        ["verify", "models/good"],
        2,
        "list of files",
    ),
    "metrics_listed": ("models/good/*/metrics.json", b"{", ["list"], 2, "metrics.json"),
    "metrics": ("models/good/*/metrics.json", b"{}", ["verify", "models/good"], 3, ""),
    "model": ("models/good/*/model.pt2", b"", ["verify", "models/good"], 3, ""),
    "model_dequantized": ("models/good/*/model.pt2", b"", ["dequantize", "models/good", "plain"], 2, "empty"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_in_the_output_is_named(name: str, output: str, tmp_path: Path, cli: Any) -> None:
    pattern, content, (verb, *rest), code, says = DAMAGES[name]
    copy = open_store(str(tmp_path))
    source = open_store(output)
    for info in source.list():
        copy.put(info.key, content if Path(info.key).match(pattern) else source.get(info.key))
    first = str(tmp_path / rest[0]) if rest else str(tmp_path)
    outcome = cli(verb, first, *(str(tmp_path / word) for word in rest[1:]))
    assert outcome.code == code
    assert says in outcome.err


def test_a_damaged_published_model_is_told_at_the_next_run(
    tmp_path: Path, write_fleet: Any, cli: Any
) -> None:
    spec = write_fleet(tmp_path, tmp_path)
    cli("run", spec, "--executor", "inline")
    (metrics,) = (tmp_path / "out/models/good").glob("*/metrics.json")
    metrics.write_bytes(b"{")
    shutil.rmtree(tmp_path / "out/runs")  # else the numbers are those that the run before has written down
    outcome = cli("run", spec, "--executor", "inline", "--json")
    assert outcome.code == 4
    assert "metrics.json is damaged; delete" in outcome.models["good"]["reason"]


def test_a_model_that_changes_after_the_plan(tmp_path: Path, write_fleet: Any, good: bytes) -> None:
    from fleetpress.jobs import run_fleet
    from fleetpress.jobs.spec.fleet_spec import load_spec

    models = [{"source": f"{tmp_path}/in/moving.pt2", "recipe": "pack"}]
    spec = load_spec(write_fleet(tmp_path, tmp_path, files={"in/moving.pt2": good + b"1"}, models=models))

    def replace_it(event: Any, result: Any) -> None:
        if event.kind == "started" and event.model == "good":
            open_store(str(tmp_path)).put("in/moving.pt2", good + b"2")

    result = run_fleet(spec, executor="inline", listener=replace_it)
    states = {model.name: (model.state, model.reason or "") for model in result.models}
    assert states["good"][0] == "published"
    assert states["moving"][0] == "failed"
    assert "has changed since this run planned with it: run again" in states["moving"][1]
    assert not (tmp_path / "out/models/moving").exists()


@pytest.mark.parametrize("kind", ["silent", "closed"])
def test_a_wrong_cluster_address(kind: str, tmp_path: Path, write_fleet: Any, cli: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if kind == "closed":
            server.close()
        started = time.monotonic()
        outcome = cli("run", write_fleet(tmp_path, tmp_path), "--address", address)
    assert outcome.code == 5
    assert "--address" in outcome.err
    assert time.monotonic() - started < 30
    status = cli("status", f"{tmp_path}/out", "--json")
    assert json.loads(status.out)["state"] == "interrupted"  # and not running for ever


def test_ctrl_c_keeps_what_is_done_and_the_next_run_resumes(
    tmp_path: Path, write_fleet: Any, cli: Any
) -> None:
    slow = {"slow": {"train": {"epochs": 100_000, "batch_size": 1}, "validate": {"max_drop": 1}}}
    entry = {"name": "slow", "source": f"{tmp_path}/in/good.pt2", "data": "plain"}
    spec = write_fleet(tmp_path, tmp_path, models=[{**entry, "recipe": "slow"}], recipes=slow)
    process = subprocess.Popen(
        [sys.executable, "-c", _CLI, "run", spec, "--executor", "inline"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    told = []
    try:
        for line in process.stderr:
            told.append(line)
            if "slow train started" in line:
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    err = "".join(told)
    assert "Traceback" not in err
    assert f"interrupted; what is done is kept. Resume with: fleetpress run {spec}" in err
    assert json.loads(cli("status", f"{tmp_path}/out", "--json").out)["state"] == "interrupted"
    left = open_store(f"{tmp_path}/out").sizes()
    assert [key for key in left if "alive" in key or key.startswith("leases/")] == []
    shorter = {"slow": {"train": {"epochs": 1}, "validate": {"max_drop": 1}}}
    again = cli(
        "run",
        write_fleet(tmp_path, tmp_path, models=[{**entry, "recipe": "slow"}], recipes=shorter),
        "--executor",
        "inline",
        "--json",
    )
    assert again.code == 0
    assert again.models["good"]["state"] == "unchanged"
    assert again.models["slow"]["state"] == "published"
