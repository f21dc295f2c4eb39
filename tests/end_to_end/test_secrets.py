"""Secrets in the environment, in endpoint addresses and in uris appear nowhere: not in what a run prints, writes or
logs, not in the arguments of its processes, and not in the session logs of the Ray cluster that it starts."""

import glob
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fleetpress.storage.s3 import S3Store
from fleetpress.storage.s3_client import new_client

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks" / "faults"))  # processes that need no time to start, and a relay

from fault_fleet import files  # noqa: E402
from fault_relay import FaultRelay, Refuse, Rule  # noqa: E402
from forked_runs import Outcome, Runner, shared_runner  # noqa: E402

NAMES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "MY_PASSWORD", "endpoint")
SPEC = """\
version: 1
name: secrets
output: {output}
models:
  - {{source: "{source}/tiny.pt2", data: points, recipe: small}}
  - {{source: "{source}/language/", recipe: packed}}
data:
  points: {{train: "{source}/train-*.npz", eval: "{source}/eval.npz"}}
recipes:
  small: {{prune: {{method: magnitude, sparsity: 0.25}}, quantize: {{scheme: W8A16}}, validate: {{max_drop: 1.0}}}}
  packed: {{quantize: {{scheme: W8A16_ASYM}}}}
"""
# A bug of ours while the store is gone: what the client said, with its address, hangs on the exception.
BUG = """\
import os
import fleetpress.jobs.steps as steps, fleetpress.storage.store as stores
from fleetpress.storage.errors import StorageError
def step(task):
    there = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = os.environ["ELSEWHERE"]
    try:
        stores.open_store("s3://nowhere/x").get("y")
    except StorageError as error:
        raise LookupError("planted bug") from error
    finally:
        os.environ["AWS_ENDPOINT_URL"] = there
import fleetpress.jobs.driver.run as run
run.run_step = step
"""
SPOTTED = "planted bug"


class Planted:
    """One distinct secret for every place; `found_in` says which of them a text holds."""

    def __init__(self) -> None:
        self.values = {name: secrets.token_hex(32) for name in NAMES}

    def found_in(self, data: str | bytes) -> list[str]:
        text = data if isinstance(data, bytes) else data.encode()
        return [name for name, value in self.values.items() if value[8:56].encode() in text]

    def environment(self, endpoint: str) -> dict[str, str]:
        """Variables with all the secrets; the endpoint is reached with a password in its address."""
        return {
            **{name: value for name, value in self.values.items() if name != "endpoint"},
            "AWS_ENDPOINT_URL": self.address(endpoint),
            "AWS_ACCESS_KEY_ID": "AKIAPLANTED",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "ELSEWHERE": self.address("http://127.0.0.1:9"),
        }

    def address(self, endpoint: str) -> str:
        place = urlsplit(endpoint)
        return f"{place.scheme}://user:{self.values['endpoint']}@{place.netloc}"


@pytest.fixture
def planted() -> Planted:
    return Planted()


@pytest.fixture
def runner() -> Runner:
    return shared_runner()


@dataclass(frozen=True)
class Place:
    """A server's address, and the bucket there with the fleet of the fault matrix."""

    endpoint: str
    bucket: str

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Everything below a prefix."""
        client = new_client(endpoint=self.endpoint, access_key="moto", secret_key="moto")
        store = S3Store(f"s3://{self.bucket}/{prefix}", client)
        return {info.key: store.get(info.key) for info in store.list()}

    def spec(self, folder: Path, output: str) -> str:
        """The fleet's spec as a file in a folder."""
        path = folder / "spec.yaml"
        path.write_text(SPEC.format(source=f"s3://{self.bucket}/in", output=output))
        return str(path)


@pytest.fixture(scope="module")
def place(moto_server: str) -> Place:
    name = f"secrets-{secrets.token_hex(4)}"
    client = new_client(endpoint=moto_server, access_key="moto", secret_key="moto")
    client.create_bucket(Bucket=name)
    for key, data in files().items():
        client.put_object(Bucket=name, Key=f"in/{key}", Body=data)
    return Place(moto_server, name)


def leaks(planted: Planted, outcome: Outcome, made: Mapping[str, bytes]) -> dict[str, list[str]]:
    """Where secrets were found."""
    texts = {"stdout": outcome.out, "stderr": outcome.err, **made}
    return {place: found for place, data in texts.items() if (found := planted.found_in(data))}


def test_a_good_run_and_the_verbs_that_look_at_it(
    runner: Runner, place: Place, planted: Planted, tmp_path: Path
) -> None:
    output = f"s3://{place.bucket}/good"
    environment = planted.environment(place.endpoint)
    spec = place.spec(tmp_path, output)
    for arguments in (["plan", spec], ["run", spec, "--executor", "inline"]):
        done = runner.run(arguments, environment)
        assert done.code == 0
        assert not leaks(planted, done, {})
    made = place.objects("good")
    assert any(key.endswith("report.html") for key in made)
    assert any(key.endswith("events.jsonl") for key in made)
    assert not leaks(planted, done, made)
    for arguments in (
        ["status", output],
        ["status", output, "--json"],
        ["report", output],
        ["list", output],
        ["doctor", output, "--json"],
        ["verify", f"{output}/models/language"],
    ):
        done = runner.run(arguments, environment)
        assert done.code == 0, (arguments, done)
        assert not leaks(planted, done, {}), arguments


@pytest.fixture(scope="module")
def relay(moto_server: str) -> Iterator[FaultRelay]:
    with FaultRelay(moto_server) as found:
        yield found


def unreachable() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# What the run says; a server's own text repeats what it was sent, and is repeated by nobody.
TROUBLES = {
    "no bucket": "there is no such bucket",
    "refused": "the credentials were refused",
    "expired": "the credentials have expired",
    "busy": "fewer requests",
    "unreachable": "does not answer",
    "malformed endpoint": "no valid address",
    "bug": f"internal error in prune: LookupError: {SPOTTED}",
}
REPLIES = {
    "refused": (403, "SignatureDoesNotMatch"),
    "expired": (400, "ExpiredToken"),
    "busy": (503, "SlowDown"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_run_that_fails(
    trouble: str, runner: Runner, relay: FaultRelay, place: Place, tmp_path: Path
) -> None:
    planted = Planted()
    refusals = (
        [Refuse(*REPLIES[trouble], planted.values["AWS_SECRET_ACCESS_KEY"])] if trouble in REPLIES else []
    )
    relay.rules = [Rule(name=trouble, fault=fault, skip=9, times=0) for fault in refusals]
    environment = planted.environment(unreachable() if trouble == "unreachable" else relay.endpoint)
    if trouble == "malformed endpoint":
        environment["AWS_ENDPOINT_URL"] = planted.address("http://127.0.0.1:port")
    output = "s3://no-such-bucket/x" if trouble == "no bucket" else f"s3://{place.bucket}/{trouble}"
    spec = place.spec(tmp_path, output)
    before = BUG if trouble == "bug" else ""
    done = runner.run(["run", spec, "--executor", "inline", "--json"], environment, before=before)
    assert done.code == (4 if trouble == "bug" else 5)
    assert TROUBLES[trouble] in done.err
    assert all(rule.hits for rule in relay.rules)
    made = {} if trouble == "no bucket" else place.objects(trouble)
    assert (trouble == "bug") == any(SPOTTED.encode() in data for data in made.values())
    assert not leaks(planted, done, made)


URIS = ("s3://user:{}@bucket/place", "https://user:{}@host/place", "s3://key:{}@", "file://user:{}@host/x")


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize("where", ["output", "source", "data"])
def test_a_uri_with_a_password_in_the_spec_is_refused_without_repeating_it(
    where: str, uri: str, runner: Runner, planted: Planted, tmp_path: Path
) -> None:
    text = SPEC.format(source=tmp_path / "in", output=tmp_path / "out")
    asked = {
        "output": str(tmp_path / "out"),
        "source": f"{tmp_path}/in/tiny.pt2",
        "data": f"{tmp_path}/in/train-*.npz",
    }
    spec = tmp_path / "spec.yaml"
    spec.write_text(text.replace(asked[where], uri.format(planted.values["MY_PASSWORD"])))
    assert planted.found_in(spec.read_text()) == ["MY_PASSWORD"]
    for verb in ("plan", "run"):
        done = runner.run([verb, str(spec)], {})
        assert done.code == 2
        assert done.err
        assert not leaks(planted, done, {})


@pytest.mark.parametrize("verb", ["status", "list", "report", "verify", "doctor"])
def test_a_uri_with_a_password_on_the_command_line_is_refused_without_repeating_it(
    verb: str, runner: Runner, planted: Planted
) -> None:
    for uri in URIS:
        done = runner.run([verb, uri.format(planted.values["MY_PASSWORD"])], {})
        assert done.code in (2, 5)
        assert not leaks(planted, done, {}), uri


@pytest.mark.long
def test_a_run_on_ray_leaves_no_secret_in_logs_and_process_lists(
    place: Place, planted: Planted, tmp_path: Path
) -> None:
    """Good and failing models in one run, on a cluster that the command starts itself."""
    session = Path(tempfile.mkdtemp(prefix="fp-", dir="/tmp"))  # sockets' paths must be short
    try:
        spec = Path(place.spec(tmp_path, f"s3://{place.bucket}/ray"))
        spec.write_text(
            spec.read_text().replace(
                "models:\n",
                'models:\n  - {name: lost, source: "s3://no-such-bucket/in/lost.pt2", recipe: small, data: points}\n',
            )
        )
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))
        }
        process = subprocess.Popen(
            [sys.executable, "-c", "from fleetpress.jobs.cli import main; raise SystemExit(main())",
             "run", str(spec), "--executor", "ray", "--json"],
            env=inherited | planted.environment(place.endpoint) | {"RAY_TMPDIR": str(session)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        seen: set[bytes] = set()
        with process:
            while process.poll() is None:
                seen |= command_lines()
                try:
                    out, err = process.communicate(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
        done = Outcome(code=process.returncode, out=out, err=err)
        assert {name: model["state"] for name, model in done.models.items()} == {
            "lost": "failed", "tiny": "published", "language": "published"
        }  # fmt: skip
        made = place.objects("ray")
        logs = {str(path): path.read_bytes() for path in session.rglob("*") if path.is_file()}
        assert any("raylet" in path for path in logs)
        assert any(b"raylet" in line and str(session).encode() in line for line in seen)
        assert not leaks(planted, done, made | logs)
        assert not [line for line in seen if planted.found_in(line)]
    finally:
        shutil.rmtree(session)


def command_lines() -> set[bytes]:
    """Arguments of every process of this machine."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            found.add(Path(path).read_bytes())
        except OSError:  # it has ended
            continue
    return found
