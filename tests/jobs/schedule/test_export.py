"""What other schedulers are given: the same text for the same file, and nothing that they would not take."""

import os
import re
import shlex
import shutil
import stat
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fleetpress.jobs.errors import UsageError
from fleetpress.jobs.schedule.export import export, write_files
from fleetpress.jobs.schedule.export.kuberay import plain_cron
from fleetpress.jobs.schedule.file import parse_schedules
from fleetpress.jobs.schedule.fires import Times, five_fields

FIELDS = yaml.safe_load((Path(__file__).parent / "kubernetes_fields.yaml").read_text())
KUBERNETES = ("kubernetes", "kuberay", "kuberay-cron")
SCHEDULES = """\
version: 1
output: s3://compressed/nightly
schedules:
  - {name: nightly, spec: specs/fleet.yaml, cron: "30 2 * * *", timezone: Europe/Berlin, deadline: 6h, jitter: 10min,
     misfire_deadline: 12h, address: "http://head:8265"}
  - {name: weekly, spec: specs/fleet.yaml, cron: "0 4 * * 5-7", address: "http://head:8265"}
"""
SPEC = """\
version: 1
name: fleet
output: s3://compressed/nightly
models:
  - {source: "s3://models/llm/*/", recipe: w4}
recipes:
  w4:
    quantize: {scheme: W4A16, ignore: [lm_head]}
resources: {memory_per_task: 3GiB}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A schedule file and its spec, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "fleet.yaml").write_text(SPEC)
    (tmp_path / "schedules.yaml").write_text(SCHEDULES)
    return "schedules.yaml"


def documents(file: str, target: str, **options: Any) -> list[dict[str, Any]]:
    (text,) = export(file, target, image="registry.example/fleetpress:1", **options).values()
    return list(yaml.safe_load_all(text))


def problems(document: dict[str, Any]) -> list[str]:
    """What a strict API server would say."""
    (kind,) = (one for one in FIELDS["oneOf"] if one["properties"]["kind"]["const"] == document["kind"])
    schema = {**kind, "$defs": FIELDS["$defs"]}
    return [
        f"{error.json_path}: {error.message}"
        for error in jsonschema.Draft202012Validator(schema).iter_errors(document)
    ]


@pytest.mark.parametrize("target", [*KUBERNETES, "systemd", "crontab"])
def test_the_same_file_gives_the_same_text(file: str, target: str) -> None:
    first = export(file, target, image="i", command="/opt/fleetpress")
    assert first == export(file, target, image="i", command="/opt/fleetpress")


@pytest.mark.parametrize("target", KUBERNETES)
def test_manifests_have_no_field_that_is_not_known(file: str, target: str) -> None:
    found = documents(file, target, service_account="press", namespace="models")
    for document in found:
        assert problems(document) == []
        assert document["metadata"]["namespace"] == "models"
    (config,) = (one for one in found if one["kind"] == "ConfigMap")
    assert config["data"]["schedules.yaml"] == SCHEDULES
    assert config["data"]["specs_fleet.yaml"] == SPEC
    for name, text in config["data"].items():
        if name.startswith("rayjob-"):
            assert problems(yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.concurrencyPolicy", "Forbid"),
        ("spec.jobTemplate.entryPoint", "x"),
        ("spec.jobTemplate.rayClusterSpec.headGroupSpec.template.spec.containers.0.volumeMount", []),
        ("spec.jobTemplate.submissionMode", "K8SJobMode"),
        ("spec.jobTemplate.backoffLimit", "0"),
        ("spec.timeZone", ""),
    ],
)
def test_the_schema_is_strict(file: str, path: str, value: Any) -> None:
    document = documents(file, "kuberay-cron")[1]
    *places, last = path.split(".")
    inside: Any = document
    for place in places:
        inside = inside[int(place)] if place.isdigit() else inside[place]
    inside[last] = value
    assert len(problems(document)) == 1


def test_kubernetes_ticks_every_minute(file: str) -> None:
    config, job = documents(file, "kubernetes", service_account="press")
    assert job["spec"]["schedule"] == "* * * * *"
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "press"
    assert pod["restartPolicy"] == "Never"
    assert pod["containers"][0]["command"][:3] == ["fleetpress", "schedule", "tick"]
    assert pod["containers"][0]["command"][-1] == "/etc/fleetpress/schedules.yaml"
    (volume,) = pod["volumes"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    assert {item["path"] for item in volume["configMap"]["items"]} == {"schedules.yaml", "specs/fleet.yaml"}
    assert {item["key"] for item in volume["configMap"]["items"]} == config["data"].keys()


def test_a_ray_job_claims_before_it_works(file: str) -> None:
    found = documents(file, "kuberay-cron")
    nightly, weekly = (one["spec"] for one in found if one["kind"] == "RayCronJob")
    assert nightly["jobTemplate"]["entrypoint"] == (
        "fleetpress schedule tick --foreground --only nightly /etc/fleetpress/schedules.yaml"
    )
    assert (nightly["schedule"], nightly["timeZone"]) == ("30 2 * * *", "Europe/Berlin")
    assert (weekly["schedule"], weekly["timeZone"]) == ("0 4 * * 0,5,6", "Etc/UTC")
    assert nightly["jobTemplate"]["activeDeadlineSeconds"] == 6 * 3600 + 600 + 3600
    assert "activeDeadlineSeconds" not in weekly["jobTemplate"]
    assert nightly["jobTemplate"]["shutdownAfterJobFinishes"] is True
    cluster = nightly["jobTemplate"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (0, 4)
    # Two tasks of 3 GiB at a time, and a gibibyte for Ray.
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] == "7168Mi"
    assert cluster["authOptions"] == {"mode": "token"}


def test_ray_jobs_under_cron_jobs_are_created_by_an_account_that_may_do_nothing_else(file: str) -> None:
    found = documents(file, "kuberay", workers=9)
    (role,) = (one for one in found if one["kind"] == "Role")
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    (config,) = (one for one in found if one["kind"] == "ConfigMap")
    jobs = [one for one in found if one["kind"] == "CronJob"]
    assert [one["spec"]["startingDeadlineSeconds"] for one in jobs] == [12 * 3600, 24 * 3600]
    for job, name in zip(jobs, ("nightly", "weekly"), strict=True):
        assert job["metadata"]["name"] == f"fleetpress-{name}"
        pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        assert pod["serviceAccountName"] == "fleetpress-starter"
        command = pod["containers"][0]["command"]
        assert command[:3] == ["kubectl", "create", "-f"]
        key = command[3].removeprefix("/etc/fleetpress/")
        ray_job = yaml.safe_load(config["data"][key])
        assert ray_job["metadata"]["generateName"] == f"fleetpress-{name}-"
        assert ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] == 9
        (rule,) = pod["volumes"][0]["configMap"]["items"]
        assert rule["key"] == key


@pytest.mark.parametrize(
    ("cron", "plain"),
    [
        ("0 4 * * 7", "0 4 * * 0"),
        ("0 4 * jul mon-fri", "0 4 * JUL MON-FRI"),
        ("0 4 * * 0,7", "0 4 * * 0"),
        ("*/5 1-3 1,15 * *", "*/5 1-3 1,15 * *"),
    ],
)
def test_cron_lines_are_rewritten_for_kubernetes_and_mean_the_same(cron: str, plain: str) -> None:
    schedule = _schedule(cron)
    assert plain_cron(schedule) == plain
    start = datetime(2026, 3, 1, tzinfo=UTC)
    rewritten = Times(name="s", cron=five_fields(plain), zone=UTC)
    assert rewritten.next(start, 30) == schedule.times.next(start, 30)


@pytest.mark.parametrize("cron", ["0 4 L * *", "0 4 LW * *", "0 4 * * FRI#1", "0 4 * * 5L"])
def test_what_kubernetes_cannot_say_is_refused(cron: str) -> None:
    with pytest.raises(UsageError, match="Kubernetes has no L, LW or #"):
        plain_cron(_schedule(cron))


def _schedule(cron: str) -> Any:
    text = f'version: 1\noutput: o\nschedules: [{{name: s, spec: a, cron: "{cron}"}}]\n'
    return parse_schedules(text, "s").schedules[0]


@pytest.mark.parametrize(
    ("target", "old", "new", "problem"),
    [
        ("kubernetes", ', address: "http://head:8265"', "", "nightly, weekly: without `address:"),
        ("kubernetes", "output: s3://compressed/nightly", "output: results", "schedules.yaml: output: `results`"),
        ("kuberay", "name: nightly", f"name: {'n' * 26}", "KubeRay takes names of at most 25 signs"),
        ("kuberay-cron", "specs/fleet.yaml", "/nowhere/fleet.yaml", "/nowhere/fleet.yaml: cannot be read"),
        ("systemd", "30 2 * * *", "30 2 * *", "schedules[0].cron"),
    ],
)  # fmt: skip
def test_what_would_not_work_there_is_told_now(
    file: str, target: str, old: str, new: str, problem: str
) -> None:
    Path(file).write_text(SCHEDULES.replace(old, new).replace("\n     misfire", "misfire"))
    with pytest.raises(UsageError, match=re.escape(problem)):
        export(file, target, image="i")


def test_an_image_is_asked_for_and_a_name_that_a_shell_would_split_is_refused(file: str) -> None:
    with pytest.raises(UsageError, match="--to kuberay needs --image"):
        export(file, "kuberay")
    os.rename(file, "my schedules.yaml")
    with pytest.raises(UsageError, match="goes through a shell"):
        export("my schedules.yaml", "kuberay", image="i")


def test_a_relative_source_is_refused_where_nobody_could_find_it(file: str, tmp_path: Path) -> None:
    (tmp_path / "specs" / "fleet.yaml").write_text(SPEC.replace("s3://models/llm/*/", "models/*"))
    with pytest.raises(UsageError, match=re.escape("specs/fleet.yaml: models[0].source: `models/*`")):
        export(file, "kuberay", image="i")


# ---- cron and systemd


def cron_line(text: str) -> tuple[str, str]:
    """When and what, as cron reads a line: five fields, then a command in which only `\\%` is a percent sign."""
    (line,) = (line for line in text.splitlines() if not line.startswith("#"))
    *when, command = line.split(" ", 5)
    assert not re.search(r"(?<!\\)%", command)
    return " ".join(when), command.replace("\\%", "%")


def test_a_crontab_line_that_a_shell_runs_as_it_is_meant(file: str, tmp_path: Path) -> None:
    folder = tmp_path / "it's 100% mine"
    folder.mkdir()
    os.rename(tmp_path / "specs", folder / "specs")
    os.rename(file, folder / file)
    told = tmp_path / "fleet press"
    told.write_text('#!/bin/sh\npwd\nfor word in "$@"; do echo "$word"; done\n')
    told.chmod(told.stat().st_mode | stat.S_IXUSR)
    os.chdir(folder)
    when, command = cron_line(export(file, "crontab", command=str(told))["crontab"])
    assert five_fields(when) == "* * * * *"
    done = subprocess.run(
        ["/bin/sh", "-c", command], cwd="/", capture_output=True, text=True, check=True, env={}
    )
    assert done.stdout.splitlines() == [
        str(folder),
        "schedule",
        "tick",
        "--quiet",
        str(folder / "schedules.yaml"),
    ]


def systemd_analyze(*words: str) -> subprocess.CompletedProcess[str]:
    """Debian's, which is no part of fleetpress."""
    program = shutil.which("systemd-analyze")
    assert program, "systemd-analyze is missing: apt-get install systemd"
    return subprocess.run([program, *words], capture_output=True, text=True, check=False, env={})


@pytest.mark.parametrize("folder", ["plain", 'it\'s 100% "mine"'])
def test_systemd_takes_the_units(file: str, tmp_path: Path, folder: str) -> None:
    place = tmp_path / folder
    place.mkdir()
    os.rename(tmp_path / "specs", place / "specs")
    os.rename(file, place / file)
    os.chdir(place)
    units = export(file, "systemd", command="/bin/true")
    assert units.keys() == {"fleetpress-schedule.service", "fleetpress-schedule.timer"}
    paths = write_files(units, str(tmp_path / "units"))
    verified = systemd_analyze("verify", *paths)
    assert (verified.returncode, verified.stderr) == (0, "")


def test_a_unit_that_is_wrong_would_have_been_refused(file: str, tmp_path: Path) -> None:
    units = export(file, "systemd", command="/nowhere/fleetpress")
    verified = systemd_analyze("verify", *write_files(units, str(tmp_path / "units")))
    assert "/nowhere/fleetpress" in verified.stderr


def test_the_timer_fires_every_minute(file: str) -> None:
    timer = export(file, "systemd")["fleetpress-schedule.timer"]
    (calendar,) = re.findall(r"^OnCalendar=(.*)$", timer, re.MULTILINE)
    told = systemd_analyze(
        "calendar", "--iterations=3", "--base-time=2026-03-29 00:59:30 UTC", calendar
    ).stdout
    assert re.findall(r"\d\d:\d\d:\d\d", told)[-3:] == ["01:00:00", "01:01:00", "01:02:00"]


def test_a_program_that_systemd_would_not_start_is_refused(file: str) -> None:
    with pytest.raises(UsageError, match="put a link to it at a plain path"):
        export(file, "systemd", command="/opt/a b/fleetpress")


def test_the_words_of_the_service_come_out_as_they_went_in(file: str) -> None:
    os.rename(file, "a $x %y.yaml")
    service = export("a $x %y.yaml", "systemd", command="/opt/fleetpress")["fleetpress-schedule.service"]
    (line,) = re.findall(r"^ExecStart=(.*)$", service, re.MULTILINE)
    words = shlex.split(line.replace("$$", "$").replace("%%", "%"))
    assert words == ["/opt/fleetpress", "schedule", "tick", "--quiet", os.path.abspath("a $x %y.yaml")]
