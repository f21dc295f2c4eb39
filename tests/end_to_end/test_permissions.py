"""The policy in docs/iam-policy.json is enough for all that fleetpress does, and nothing in it is too much.

moto enforces actions and resources. What it does not know is enforced by a relay before it: the condition on the
prefix of a list, and that nobody may ask for a bucket as a whole (AWS: HeadBucket is a list without a prefix).
"""

import copy
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest

from fleetpress.jobs.schedule.claims import Claims
from fleetpress.jobs.schedule.file import parse_schedules
from fleetpress.jobs.schedule.records import JobState
from fleetpress.jobs.schedule.tick import Tick, tick
from fleetpress.storage.errors import AccessDenied
from fleetpress.storage.store import open_store

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks" / "faults"))  # the relay and the small fleet of the fault matrix

from fault_fleet import MODELS, SPEC, files, published  # noqa: E402
from fault_relay import FaultRelay, Refuse, Rule  # noqa: E402
from forked_runs import Outcome, Runner, shared_runner  # noqa: E402

POLICY = json.loads((ROOT / "docs" / "iam-policy.json").read_text())
PLACES = {
    "SOURCE_BUCKET/SOURCE_PREFIX": "sources/team/in",
    "DATA_BUCKET/DATA_PREFIX": "samples/team/points",
    "OUTPUT_BUCKET/OUTPUT_PREFIX": "results/team/out",
}
ADMINISTRATOR = {
    "aws_access_key_id": "admin",
    "aws_secret_access_key": "admin-secret",
    "region_name": "us-east-1",
}
SERVE = """\
import sys
from moto import backends
from moto.server import ThreadedMotoServer
modules = tuple(backends.list_of_moto_modules())
backends.list_of_moto_modules = lambda: iter(modules)  # for every request it would look through its own folders
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%s" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
WITHOUT_CONDITIONS = Refuse(403, "AccessDenied")


def filled(policy: Any) -> Any:
    """The policy with buckets and prefixes in the place of its placeholders."""
    text = json.dumps(policy)
    for placeholder, place in PLACES.items():
        for word, value in zip(placeholder.split("/"), place.split("/", 1), strict=True):
            text = text.replace(word, value)
    return json.loads(text)


def without(sid: str, action: str) -> Any:
    """The policy without one action of one statement."""
    policy = copy.deepcopy(POLICY)
    (statement,) = (one for one in policy["Statement"] if one["Sid"] == sid)
    statement["Action"].remove(action)
    policy["Statement"] = [one for one in policy["Statement"] if one["Action"]]
    return policy


def conditions(policy: Any) -> list[Rule]:
    """What moto leaves out: lists outside of the prefixes that the policy names, and questions for a whole bucket."""
    rules = [Rule(name="bucket", method="HEAD", target=r"^/[^/?]+$", fault=WITHOUT_CONDITIONS, times=0)]
    for statement in filled(policy)["Statement"]:
        if "Condition" in statement:
            (prefix,) = statement["Condition"]["StringLike"]["s3:prefix"]
            (bucket,) = (arn.removeprefix("arn:aws:s3:::") for arn in statement["Resource"])
            inside = re.escape(prefix.removesuffix("*")).replace("/", "%2F")
            target = rf"^/{bucket}\?(?=.*list-type=2)(?!.*prefix={inside})"
            rules.append(
                Rule(name=f"list {bucket}", method="GET", target=target, fault=WITHOUT_CONDITIONS, times=0)
            )
    return rules


class Enforcing:
    """A server on which one user may do what a policy says, and nothing else."""

    def __init__(self, moto: str, relay: FaultRelay, runner: Runner, folder: Path) -> None:
        self.relay, self._moto, self._runner, self._folder = relay, moto, runner, folder
        s3 = boto3.client("s3", endpoint_url=moto, **ADMINISTRATOR)
        for bucket in ("sources", "samples", "results", "private"):
            s3.create_bucket(Bucket=bucket)
        for key, data in files().items():
            data_bucket = ("samples", "team/points") if key.endswith(".npz") else ("sources", "team/in")
            s3.put_object(Bucket=data_bucket[0], Key=f"{data_bucket[1]}/{key}", Body=data)
        s3.put_object(Bucket="sources", Key="other/secret", Body=b"secret")
        self._iam = boto3.client("iam", endpoint_url=moto, **ADMINISTRATOR)
        self._iam.create_user(UserName="press")
        key = self._iam.create_access_key(UserName="press")["AccessKey"]
        self.environment = {
            "AWS_ENDPOINT_URL": relay.endpoint,
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def allow(self, policy: Any) -> list[Rule]:
        """From here on the user may do this; gives the relay's rules."""
        self._enforce("inf")
        plain = filled(policy)
        for statement in plain["Statement"]:
            statement.pop("Condition", None)  # moto takes any for one that does not hold
        self._iam.put_user_policy(UserName="press", PolicyName="fleetpress", PolicyDocument=json.dumps(plain))
        self._enforce("0")
        self.relay.rules = conditions(policy)
        return list(self.relay.rules)

    def run(self, output: str, *options: str) -> Outcome:
        """`fleetpress run` of the small fleet."""
        text = SPEC.replace("{source}/train", "s3://samples/team/points/train")
        text = text.replace("{source}/eval", "s3://samples/team/points/eval")
        spec = self._folder / "spec.yaml"
        spec.write_text(text.format(source="s3://sources/team/in", output=output))
        return self._runner.run(
            ["run", str(spec), "--executor", "inline", "--json", *options], self.environment
        )

    def command(self, *arguments: str) -> Outcome:
        """Any other verb."""
        return self._runner.run(arguments, self.environment)

    def _enforce(self, after_requests: str) -> None:
        asked = urllib.request.Request(
            f"{self._moto}/moto-api/reset-auth", after_requests.encode(), {"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(asked).close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Enforcing]:
    folder = tmp_path_factory.mktemp("permissions")
    with subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        moto = process.stdout.readline().strip()
        with FaultRelay(moto) as relay:
            yield Enforcing(moto, relay, shared_runner(), folder)
        process.kill()


@pytest.fixture
def as_user(server: Enforcing, monkeypatch: pytest.MonkeyPatch) -> Enforcing:
    """The server, and this process acting as the user with the whole policy."""
    server.allow(POLICY)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture(scope="module")
def finished(server: Enforcing) -> str:
    """An output with a fleet in it, made by a user with exactly the policy."""
    rules = server.allow(POLICY)
    output = "s3://results/team/out/whole"
    done = server.run(output, "--job", "job-1")  # as the driver of a submitted job does
    assert (done.code, done.reason) == (0, "")
    assert {rule.name: rule.hits for rule in rules if rule.name != "bucket"} == {
        "list sources": 0, "list samples": 0, "list results": 0
    }  # fmt: skip
    return output


def test_the_policy_is_enough_for_a_run_and_for_all_that_looks_at_it(
    finished: str, as_user: Enforcing
) -> None:
    found = published(finished)
    assert sorted(found.artifacts) == sorted(MODELS)
    assert not found.doubled()
    again = as_user.run(finished)
    assert {model["state"] for model in again.models.values()} == {"unchanged"}
    for words in (
        ["status", finished],
        ["list", finished],
        ["report", finished],
        ["list", finished, "--jobs"],
    ):
        assert as_user.command(*words, "--json").code == 0
    for verb in ("status", "logs", "cancel"):
        assert as_user.command(verb, finished, "job-1", "--json").code == 0
    for model, how in (("tiny", []), ("language", ["--deep"])):
        done = as_user.command("verify", f"{finished}/models/{model}", *how, "--json")
        assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(
    ("sid", "action", "message"),
    [
        ("ListSources", "s3:ListBucket", "cannot list s3://sources/team/in/"),
        ("ReadSources", "s3:GetObject", r"cannot look up s3://sources/team/in/tiny\.pt2 "),
        ("ListData", "s3:ListBucket", "cannot list s3://samples/team/points/"),
        ("ReadData", "s3:GetObject", r"cannot look up s3://samples/team/points/eval\.npz "),
        ("ListOutput", "s3:ListBucket", "cannot list s3://results/team/out/[a-z0-9]*/"),
        ("WorkInOutput", "s3:GetObject", "cannot (look up|read) s3://results/team/out/[a-z0-9]*/"),
        ("WorkInOutput", "s3:PutObject", r"cannot write s3://results/team/out/.*/summary\.json "),
    ],
    ids=lambda value: value if isinstance(value, str) and not value.startswith("cannot") else "",
)
def test_every_action_is_needed_and_its_lack_is_named(
    server: Enforcing, sid: str, action: str, message: str
) -> None:
    server.allow(without(sid, action))
    done = server.run(f"s3://results/team/out/{sid.lower()}{action[3:].lower()}")
    assert done.code in (3, 5)
    assert re.search(rf"{message}.* access denied: check", done.reason), done.reason
    assert "Traceback" not in done.err
    assert "internal error" not in done.reason


def test_without_the_right_to_delete_a_run_succeeds_and_says_what_stays_behind(server: Enforcing) -> None:
    server.allow(without("WorkInOutput", "s3:DeleteObject"))
    done = server.run("s3://results/team/out/kept")
    assert done.code == 0
    assert "cannot delete s3://results/team/out/kept/fleetpress-probe-" in done.err
    assert "two runs at once would both do all the work" in done.err
    assert "sign of life stays behind" in done.err


def test_resume_asks_for_uploads_that_are_under_way(server: Enforcing) -> None:
    output = "s3://results/team/out/resumed"
    rules = server.allow(POLICY)
    cut = Rule(name="end", method="PUT", target=r"\.crumbs$", fault=Refuse(403, "ExpiredToken"))
    server.relay.rules = [cut, *rules]
    assert server.run(output).code == 3
    assert cut.hits
    server.allow(without("WorkInOutput", "s3:ListMultipartUploadParts"))
    refused = server.run(output)
    assert refused.code == 5
    assert re.search("cannot look up s3://results/team/out/resumed/models/language/", refused.reason)
    server.allow(POLICY)
    assert server.run(output).code == 0


def test_what_was_left_over_can_be_found_and_removed(as_user: Enforcing) -> None:
    store = open_store("s3://results/team/out/left")
    store.create_upload("models/big")
    as_user.allow(without("FindLeftUploads", "s3:ListBucketMultipartUploads"))
    with pytest.raises(AccessDenied, match="s3://results/team/out/left"):
        store.list_unfinished()
    as_user.allow(without("WorkInOutput", "s3:AbortMultipartUpload"))
    (found,) = store.list_unfinished()
    with pytest.raises(AccessDenied, match="s3://results/team/out/left/models/big "):
        store.discard(found)
    as_user.allow(POLICY)
    store.discard(found)
    assert not store.list_unfinished()


def test_work_of_a_run_that_died_is_taken_over(finished: str, as_user: Enforcing) -> None:
    """What two runs at once ask of the server: claims, lists of claims, signs of life."""
    output = "s3://results/team/out/taken"
    store = open_store(output)
    for digests in published(finished).artifacts.values():
        store.put(f"leases/{next(iter(digests))}/000001", json.dumps({"run": "dead"}).encode())
    assert as_user.run(output).code == 0


class Played:
    """A launcher whose jobs have ended as soon as one looks."""

    def launch(self, _spec: str, _job_id: str) -> None:
        pass

    def state(self, _job_id: str) -> JobState:
        return "succeeded"

    def stop(self, _job_id: str) -> None:
        pass


def ticked(output: str, minute: int) -> list[str]:
    """What a tick does in an output whose schedule fires at 02:30."""
    text = f'version: 1\noutput: {output}\nschedules: [{{name: s, spec: a.yaml, cron: "30 2 * * *"}}]\n'
    now = datetime(2026, 3, 1, 2, minute, tzinfo=UTC)
    how = Tick(now=now, by="press", launcher_of=lambda *_: Played())
    return [f"{row.action} {row.reason}".strip() for row in tick(parse_schedules(text, "s.yaml"), how).rows]


def test_the_policy_is_enough_for_schedules(as_user: Enforcing) -> None:
    output = "s3://results/team/out/scheduled"
    assert ticked(output, 30) == ["begun"]
    assert ticked(output, 31)[0] == "ended succeeded"
    claims = Claims(open_store(output), "s")
    now = datetime(2026, 3, 1, 3, 0, tzinfo=UTC)
    assert claims.pause(by="press", now=now).paused
    assert not claims.resume(by="press", now=now).paused
    latest = claims.latest(now)
    assert latest is not None
    assert latest.state == "succeeded"


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("s3:GetObject", "failed cannot read s3://results/team/out/[a-z0-9]*/schedules/s/control.json "),
        ("s3:PutObject", "failed cannot write s3://results/team/out/[a-z0-9]*/schedules/s/since-"),
    ],
)
def test_schedules_name_the_right_they_lack(as_user: Enforcing, action: str, message: str) -> None:
    as_user.allow(without("WorkInOutput", action))
    (row,) = ticked(f"s3://results/team/out/lacks{action[3:].lower()}", 30)
    assert re.match(f"{message}.* access denied: check", row), row


def test_without_the_right_to_delete_ticks_begin_each_fire_once(
    as_user: Enforcing, caplog: pytest.LogCaptureFixture
) -> None:
    as_user.allow(without("WorkInOutput", "s3:DeleteObject"))
    output = "s3://results/team/out/undeleted"
    assert ticked(output, 30) == ["begun"]
    assert ticked(output, 31)[0] == "ended succeeded"
    assert ticked(output, 32) == ["waiting next fire at 2026-03-02 02:30 UTC"]
    assert "the record of a job that has ended stays behind" in caplog.text


@pytest.mark.parametrize("place", ["s3://results/team/other", "s3://private", "s3://sources/team/in"])
def test_nothing_is_written_elsewhere(as_user: Enforcing, place: str) -> None:
    with pytest.raises(AccessDenied, match=f"cannot write {place}/key .* access denied"):
        open_store(place).put("key", b"1")
    done = as_user.run(place)
    assert done.code == 5
    assert f"cannot write {place}/runs/" in done.reason


@pytest.mark.parametrize("place", ["s3://sources/other", "s3://private"])
def test_nothing_is_read_elsewhere(as_user: Enforcing, place: str) -> None:
    with pytest.raises(AccessDenied, match=f"{place}/"):
        open_store(place).get("secret")
    with pytest.raises(AccessDenied, match=f"{place}/"):
        open_store(place).list()
