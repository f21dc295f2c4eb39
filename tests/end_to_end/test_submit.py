"""Fleets as jobs of a real cluster: its head and nodes are processes of their own, and so is who submits.

One cluster for all of it (and for test_nightly.py), in the order of this file: at the end it is gone, and the bucket
alone tells of its jobs.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import torch
from torch import nn

from fleetpress.jobs import run_fleet
from fleetpress.jobs.cli import main
from fleetpress.jobs.seaweed import SeaweedFS
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.storage.s3 import S3Store
from fleetpress.storage.s3_client import new_client

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks" / "faults"), str(ROOT / "benchmarks" / "ray_matrix")]

from fault_fleet import files, published  # noqa: E402
from ray_hosts import Hosts  # noqa: E402

pytestmark = pytest.mark.long

FLEET = """\
version: 1
name: nightly.fleet
output: {output}
models:
  - {{source: "{source}/tiny.pt2", data: points, recipe: small}}
  - {{source: "{source}/lone.safetensors", recipe: packed}}
  - {{name: module, source: "{source}/net.pt", factory: "nets:Net", data: points, recipe: packed}}
  - {{name: lost, source: "{source}/lost.pt2", data: points, recipe: small}}
data:
  points: {{train: "{source}/train-*.npz", eval: "{source}/eval.npz", loss: cross_entropy}}
recipes:
  small: {{prune: {{method: magnitude, sparsity: 0.25}}, quantize: {{scheme: W8A16}}, validate: {{max_drop: 1.0}}}}
  packed: {{quantize: {{scheme: W8A16_ASYM}}, validate: {{max_drop: 1.0}}}}
  endless: {{train: {{epochs: 100000, batch_size: 2}}}}
"""
NETS = """\
from torch import nn
from nets.parts import Head


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = Head()

    def forward(self, x):
        return self.head(x)
"""
PARTS = """\
from torch import nn


class Head(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)
"""
COMMAND = "from fleetpress.jobs.cli import main; raise SystemExit(main())"
PLANTED = "planted-secret-of-the-client"
PATIENCE_SECONDS = 120


@dataclass(frozen=True)
class Place:
    """A cluster with its bucket, and a folder of the one who submits."""

    hosts: Hosts
    uri: str
    folder: Path
    variables: dict[str, str]

    def spec(self, name: str, text: str = FLEET) -> str:
        """A spec as a file, with an output of its own; gives its path."""
        path = self.folder / f"{name}.yaml"
        path.write_text(text.format(source=f"{self.uri}/in", output=self.output(name)))
        return str(path)

    def output(self, name: str) -> str:
        return f"{self.uri}/out/{name}"

    def submit(self, *arguments: str) -> subprocess.Popen[str]:
        """`fleetpress submit` where nothing is set but the token, and secrets that must not travel."""
        command = [sys.executable, "-c", COMMAND, "submit", *arguments, "--address", self.hosts.jobs_address]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env={
                "RAY_AUTH_TOKEN_PATH": self.hosts.environment["RAY_AUTH_TOKEN_PATH"],
                "HOME": str(self.folder),
                "AWS_SECRET_ACCESS_KEY": PLANTED,
                "AWS_ENDPOINT_URL": f"http://user:{PLANTED}@127.0.0.1:9",
            },
        )


@pytest.fixture(scope="module")
def place(
    job_cluster: Callable[[], Hosts],
    seaweedfs: SeaweedFS,
    seaweed_bucket: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Place:
    wanted = {key: data for key, data in files().items() if not key.startswith("language/")}
    torch.manual_seed(0)
    weights = io.BytesIO()
    torch.save({f"head.{name}": value for name, value in nn.Linear(6, 3).state_dict().items()}, weights)
    endpoint, access_key, secret_key = seaweedfs
    store = S3Store(
        f"{seaweed_bucket}/submitted",
        new_client(endpoint=endpoint, access_key=access_key, secret_key=secret_key),
    )
    for key, data in {**wanted, "net.pt": weights.getvalue()}.items():
        store.put(f"in/{key}", data)
    folder = tmp_path_factory.mktemp("submit")
    code = folder / "code" / "nets"
    code.mkdir(parents=True)
    (code / "__init__.py").write_text(NETS)
    (code / "parts.py").write_text(PARTS)
    return Place(job_cluster(), store.uri, folder, seaweedfs.environment)


@pytest.fixture
def here(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The same, and this process acting as someone who may read the bucket."""
    for name, value in place.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", place.hosts.environment["RAY_AUTH_TOKEN_PATH"])
    return place


def test_two_submits_at_the_same_moment_are_one_job_with_the_result_of_an_inline_run(
    here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = here.spec("fleet")
    arguments = (spec, "--allow-code", "--code", str(here.folder / "code"))
    both = [here.submit(*arguments), here.submit(*arguments)]
    ended = [process.communicate(timeout=PATIENCE_SECONDS) for process in both]
    assert [process.returncode for process in both] == [3, 3], ended
    assert sorted(err.rpartition(": ")[2].strip() for _, err in ended) == [
        "joined, it was there already", "started"
    ]  # fmt: skip
    for out, _ in ended:
        assert "3 published, 1 failed" in out
    monkeypatch.syspath_prepend(str(here.folder / "code"))
    quiet = here.output("quiet")
    text = FLEET.format(source=f"{here.uri}/in", output=quiet)
    assert run_fleet(parse_spec(text, "spec"), executor="inline", allow_code=True).exit_code == 3
    assert published(here.output("fleet")).artifacts == published(quiet).artifacts
    header = {"Authorization": f"Bearer {Path(os.environ['RAY_AUTH_TOKEN_PATH']).read_text()}"}
    told = requests.get(f"{here.hosts.jobs_address}/api/jobs/", headers=header, timeout=30)
    names = [str(job["submission_id"]) for job in told.json()]
    assert len([name for name in names if name.startswith("fleetpress-nightly.fleet-")]) == 1
    assert PLANTED not in told.text + str(ended)


def test_every_command_of_the_page_works(here: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """On the fleet that has just run, one of whose models cannot be found."""
    words = {
        "http://head:8265": here.hosts.jobs_address,
        "fleet.yaml": here.spec("fleet"),
        "s3://compressed/nightly": here.output("fleet"),
        "nets": str(here.folder / "code"),
    }
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "submit.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("fleetpress ")]
    said = []
    for line in lines:
        code = main([words.get(word, word) for word in line.split()[1:]])
        said.append(capfd.readouterr())
        waits = ("submit" in line and "--no-wait" not in line) or "logs -f" in line
        assert code == (3 if waits else 0), (line, said[-1])
    told = {line: f"{out}{err}" for line, (out, err) in zip(lines, said, strict=True)}
    job = "nightly-2026-11-30"
    assert len(lines) == 12
    assert "lone unchanged" in told[f"fleetpress logs -f {job} --address http://head:8265"]
    assert "had ended before" in told[f"fleetpress cancel {job} --address http://head:8265"]
    assert len(re.findall(r" failed +3 ", told["fleetpress list --address http://head:8265"])) == 3
    assert job in told["fleetpress list s3://compressed/nightly --jobs"]
    assert "lone unchanged" in told[f"fleetpress logs s3://compressed/nightly {job}"]
    with_code = told[lines[-1]]
    assert "tiny unchanged" in with_code
    assert "module unchanged" in with_code
    assert re.search(r"job fleetpress-nightly\.fleet-[0-9a-f]{12}-2: started", with_code)


@pytest.fixture
def endless_ends(here: Place) -> Iterator[None]:
    """However the test with the endless job went: that job would take a CPU from all tests after it."""
    yield
    main(["cancel", "endless-1", "--address", here.hosts.jobs_address])


@pytest.mark.usefixtures("endless_ends")
def test_a_job_of_a_given_id_is_followed_left_joined_cancelled_and_never_started_again(
    here: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    address = here.hosts.jobs_address
    spec = here.spec("endless", FLEET.replace("data: points, recipe: small", "data: points, recipe: endless"))
    given = [spec, "--submission-id", "endless-1", "--address", address]
    assert main(["submit", *given, "--no-wait"]) == 0
    assert capfd.readouterr().out == "endless-1\n"
    follower = here.submit(*given[:3])
    assert follower.stdout is not None
    read = threading.Timer(PATIENCE_SECONDS, follower.kill)
    read.start()
    assert any("tiny train started" in line for line in follower.stdout)
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate()
    read.cancel()
    assert follower.returncode == 130, err
    assert f"job endless-1 goes on. Follow it: fleetpress logs -f endless-1 --address {address}" in err
    assert "Traceback" not in err
    assert main(["list", "--address", address, "--json"]) == 0
    states = {job["job"]: job["state"] for job in json.loads(capfd.readouterr().out)}
    assert states.pop("endless-1") == "running"
    assert set(states.values()) <= {"failed", "succeeded"}  # those of other files, too
    assert main(["cancel", "endless-1", "--address", address]) == 0
    assert "interrupted" in capfd.readouterr().out
    assert main(["logs", "endless-1", "--address", address, "-f"]) == 130
    capfd.readouterr()
    assert main(["submit", *given]) == 130
    assert "job endless-1: had ended before: failed" in capfd.readouterr().err
    assert main(["status", here.output("endless"), "endless-1"]) == 0
    assert "interrupted" in capfd.readouterr().out


def test_who_has_not_the_token_is_told_so(
    here: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    for token, message in (("wrong", "refuses this token"), ("", "asks for a token")):
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        for verb in (["submit", here.spec("fleet")], ["status", "endless-1"], ["list"]):
            assert main([*verb, "--address", here.hosts.jobs_address]) == 5
            told = capfd.readouterr().err
            assert f"{message}; give the one that it was started with in RAY_AUTH_TOKEN" in told


def test_when_the_cluster_is_gone_the_bucket_tells(here: Place, capfd: pytest.CaptureFixture[str]) -> None:
    output = here.output("fleet")
    here.hosts.kill_head()
    started = time.monotonic()
    assert main(["submit", here.spec("fleet"), "--address", here.hosts.jobs_address]) == 5
    assert time.monotonic() - started < 30
    assert "no Ray job server answers at" in capfd.readouterr().err
    assert main(["list", output, "--jobs", "--json"]) == 0
    first, *others = json.loads(capfd.readouterr().out)
    assert {job["exit_code"] for job in (first, *others)} == {3}
    assert f"{first['job']}-2" in {job["job"] for job in others}
    assert main(["status", output, first["job"], "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["run"], told["job"]) == (first["run"], first["job"])
    assert main(["logs", output, first["job"]]) == 0
    assert "tiny published" in capfd.readouterr().out
    assert main(["logs", output, first["job"], "-f"]) == 3
    assert main(["cancel", output, first["job"]]) == 0
    assert "had ended before" in capfd.readouterr().out
