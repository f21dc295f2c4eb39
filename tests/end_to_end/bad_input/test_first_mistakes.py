"""What goes wrong on the first day: every slip is answered by one clear message that says what, where and what to do.

No traceback, the documented exit code, and nothing in the output.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fleetpress.jobs.demo import npz_bytes

INLINE = ("--executor", "inline")


# ---- the command line

TYPED = {
    "verb": (["rum", "fleet.yaml"], "did you mean `run`?"),
    "another_tool_s_verb": (["compress", "fleet.yaml"], "did you mean `run`?"),
    "help_as_a_verb": (["help"], "did you mean `--help`?"),
    "option": (["plan", "fleet.yaml", "--alow-code"], "did you mean `--allow-code`?"),
    "one_dash": (["plan", "fleet.yaml", "-json"], "did you mean `--json`?"),
    "option_s_value": (["run", "fleet.yaml", "--executor", "inlin"], "did you mean `inline`?"),
    "option_before_the_verb": (["--json", "plan", "fleet.yaml"], "options of a verb stand behind it"),
    "too_much": (["plan", "fleet.yaml", "other.yaml"], "unexpected argument 'other.yaml'"),
    "too_little": (["run"], "SPEC"),
    "nothing": ([], "`fleetpress --help` tells more"),
    "method": (["methods", "magnitud"], "did you mean `magnitude`?"),
}


@pytest.mark.parametrize("slip", TYPED)
def test_slips_on_the_command_line(slip: str, newcomer: Any) -> None:
    words, says = TYPED[slip]
    outcome = newcomer.cli(*words)
    newcomer.check(outcome, 2, says)
    assert sum("error:" in line for line in outcome.err.splitlines()) <= 1


def test_the_verb_s_own_usage_is_shown(newcomer: Any) -> None:
    assert newcomer.cli("run", "fleet.yaml", "--adress", "x").err.startswith("usage: fleetpress run ")


# ---- the spec as a file

FILES = {
    "a_folder": ("in", None, "`fleetpress init in` writes one"),
    "a_model": ("in/good.pt2", None, "is a model, not a spec; `fleetpress init in/good.pt2` writes one"),
    "misspelt": ("fleet.yml", None, "did you mean `fleet.yaml`?"),
    "empty": ("x.yaml", "", "the spec is empty; it needs version, name, output, models and recipes"),
    "tab": ("x.yaml", "version: 1\n\tname: x\n", "x.yaml:2: not valid YAML, column 1"),
    "open_quote": ("x.yaml", 'version: 1\nname: "x\n', "close the quote"),
    "no_space": ("x.yaml", "version:1\nname: x\n", "a space behind the colon of a key"),
    "item_on_the_line": ("x.yaml", "models: - a\n", "put every `- ` item on a line of its own"),
}


@pytest.mark.parametrize("slip", FILES)
def test_files_that_are_no_spec(slip: str, newcomer: Any) -> None:
    name, text, says = FILES[slip]
    if text is not None:
        Path(name).write_text(text)
    newcomer.check(newcomer.cli("plan", name), 2, f"fleetpress: {name}", says)


# ---- the spec's words

WORDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "of_a_newer_fleetpress": ({"version": 2}, ("fleet.yaml:1: version: should be 1, not 2", "install that")),
    "of_an_older_fleetpress": ({"version": 0}, ("fleet.yaml:1: version: should be 1, not 0",)),
    "quoted_version": ({"version": "1"}, ("write it without quotes",)),
    "key": ({"modles": []}, ("modles: unknown key; did you mean `models`?",)),
    "metric": (
        {"data": {"plain": {"eval": "data/test.npz", "metric": "acuracy"}}},
        ("data.plain.metric: unknown metric `acuracy`; did you mean `accuracy`?",),
    ),
    "model_as_text": ({"models": ["in/good.pt2"]}, ("write {source: in/good.pt2, recipe: NAME}",)),
    "one_slash": ({"output": "s3:/bucket/out"}, ("write s3://bucket/out",)),
    "no_colon": ({"output": "s3//bucket/out"}, ("write s3://bucket/out",)),
    "upper_case": ({"output": "S3://bucket/out"}, ("write s3://bucket/out",)),
    "hadoop": ({"output": "s3a://bucket/out"}, ("write s3://bucket/out",)),
    "arn": ({"output": "arn:aws:s3:::bucket/out"}, ("write s3://bucket/out",)),
    "web_address": ({"output": "https://bucket.s3.eu-west-1.amazonaws.com/out"}, ("write s3://bucket/out",)),
    "home": ({"output": "~/out"}, ("`~` is not expanded here; write the whole path",)),
    "memory": ({"resources": {"memory_per_task": "4 gigs"}}, ("unknown unit `gigs`; did you mean 4GiB?",)),
}


@pytest.mark.parametrize("slip", WORDS)
def test_words_of_the_spec(slip: str, newcomer: Any) -> None:
    parts, says = WORDS[slip]
    newcomer.check(newcomer.cli("run", newcomer.wrote(**parts), *INLINE), 2, *says)


# ---- places

PLACES = {
    "a_bucket_without_s3": ("my-bucket/in/*.pt2", "a bucket is written s3://my-bucket/in/*.pt2"),
    "folder": ("inn/*.pt2", "did you mean `in/*.pt2`?"),
    "file": ("in/god.pt2", "no such file; did you mean `in/good.pt2`?"),
    "no_model": ("data", "looked for *.pt2"),
}


@pytest.mark.parametrize("slip", PLACES)
def test_places_where_nothing_is(slip: str, newcomer: Any) -> None:
    uri, says = PLACES[slip]
    newcomer.check(newcomer.cli("plan", newcomer.wrote(source=uri)), 4, says)


def test_init_where_nothing_is(newcomer: Any) -> None:
    newcomer.check(newcomer.cli("init", "inn"), 2, "inn holds no models", "did you mean `in`?")
    newcomer.check(newcomer.cli("init", "s3:/bucket/models"), 2, "write s3://bucket/models")
    newcomer.check(newcomer.cli("init", "s3/bucket/models"), 2, "did you mean `s3://bucket/models`?")
    newcomer.check(newcomer.cli("init", "in", "in/good.pt2"), 2, "in/good.pt2 exists; name another file")


def test_a_demo_where_no_folder_can_be(newcomer: Any) -> None:
    newcomer.check(newcomer.cli("demo", "--folder", "in/good.pt2"), 2, "in/good.pt2: cannot be made a folder")


def test_a_folder_that_is_gone(newcomer: Any, monkeypatch: Any) -> None:
    (newcomer.place / "gone").mkdir()
    monkeypatch.chdir(newcomer.place / "gone")
    (newcomer.place / "gone").rmdir()
    newcomer.check(newcomer.cli("plan", "fleet.yaml"), 2, "the folder that you are in is gone")


def test_an_output_that_is_misspelt(newcomer: Any) -> None:
    assert newcomer.cli("run", "fleet.yaml", *INLINE).code == 0
    outcome = newcomer.cli("status", "outt")
    assert (outcome.code, outcome.out) == (2, "")
    assert "holds no runs" in outcome.err
    assert "did you mean `out`?" in outcome.err
    assert "a bucket is written s3://my-bucket/out" in newcomer.cli("status", "my-bucket/out").err
    assert "did you mean `out`?" in newcomer.cli("list", "outt").err
    assert "did you mean `out/models/good`?" in newcomer.cli("verify", "out/models/godo").err
    assert newcomer.cli("verify", "out/models/good").code == 0


def test_an_output_that_is_a_model(newcomer: Any) -> None:
    """`plan` sees it, and `run` overwrites nothing."""
    before = (newcomer.place / "in/good.pt2").read_bytes()
    newcomer.check(
        newcomer.cli("plan", newcomer.wrote(output="in/good.pt2")),
        5,
        "in/good.pt2 cannot be created: a part of its path is",
    )
    outcome = newcomer.cli("run", newcomer.wrote(output="in/good.pt2"), *INLINE)
    newcomer.check(outcome, 5, "a part of its path is a file")
    assert (newcomer.place / "in/good.pt2").read_bytes() == before


def test_an_output_that_takes_no_files(newcomer: Any) -> None:
    newcomer.check(
        newcomer.cli("run", newcomer.wrote(output="/proc/out"), *INLINE),
        5,
        "cannot be created: its folder cannot be made",
    )


# ---- models and data

MODELS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a state dict.pt2": (
        lambda: saved({"a": torch.zeros(2)}),
        "torch.save and torch.jit.save write no programs",
    ),
    "weights.pt": (
        lambda: saved({"a": torch.zeros(2)}),
        "add `factory: package.module:callable` and run with",
    ),
    "net.onnx": (lambda: b"\x08\x07onnx", "looked for *.pt2, *.safetensors, *.pt"),
}


def saved(value: Any) -> bytes:
    torch.save(value, "saved")
    return Path("saved").read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_none(name: str, newcomer: Any) -> None:
    make, says = MODELS[name]
    Path("in", name).write_bytes(make())
    for verb in (["plan"], ["run", *INLINE]):
        outcome = newcomer.cli(verb[0], newcomer.wrote(source=f"in/{name}"), *verb[1:])
        newcomer.check(outcome, 4, f"in/{name}", says)
    assert not list(Path("out").glob("models/*")) + list(Path("out").glob("records/*"))


def test_a_factory_without_leave_and_one_that_is_misspelt(newcomer: Any) -> None:
    Path("in/weights.pt").write_bytes(saved({}))
    model = {"source": "in/weights.pt", "recipe": "pack", "inputs": {"input": {"shape": ["batch", 4]}}}
    spec = newcomer.wrote(models=[{**model, "factory": "no_such_nets:build"}])
    newcomer.check(
        newcomer.cli("run", spec, *INLINE),
        4,
        "its factory 'no_such_nets:build' is code; run again with --allow-code",
    )
    outcome = newcomer.cli("run", spec, "--allow-code", *INLINE)
    newcomer.check(outcome, 4, "No module named 'no_such_nets'", "put its folder on PYTHONPATH")


def test_data_with_other_names(newcomer: Any, samples: dict[str, Any]) -> None:
    for name, rows in (("odd-train", slice(0, 48)), ("odd-test", slice(48, 64))):
        arrays = {"images": samples["inputs"][rows], "labels": samples["targets"][rows]}
        Path(f"data/{name}.npz").write_bytes(npz_bytes(arrays))
    data = {"plain": {"train": "data/odd-train.npz", "eval": "data/odd-test.npz"}}
    outcome = newcomer.cli("run", newcomer.wrote(data=data), *INLINE)
    newcomer.check(outcome, 4, "is not among the arrays ['images', 'labels']; name the arrays 'inputs'")


def test_a_metric_that_does_not_fit(newcomer: Any) -> None:
    data = {"plain": {"eval": "data/test.npz", "metric": "perplexity"}}
    newcomer.check(
        newcomer.cli("run", newcomer.wrote(data=data), *INLINE),
        4,
        "perplexity needs outputs (samples, tokens, vocabulary)",
    )


def test_data_that_is_misspelt(newcomer: Any) -> None:
    data = {"plain": {"eval": "data/tset.npz"}}
    newcomer.check(
        newcomer.cli("plan", newcomer.wrote(data=data)),
        4,
        "it is named as data; did you mean `data/test.npz`?",
    )


# ---- the cluster

ADDRESSES = {
    "http://127.0.0.1:8265": "is the address of a web page",
    "127.0.0.1": "is no address of a Ray cluster; give host:port, ray://host:port or auto",
    "127.0.0.1:6379/": "is no address of a Ray cluster",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_that_are_none(address: str, newcomer: Any, monkeypatch: Any) -> None:
    newcomer.check(newcomer.cli("run", "fleet.yaml", "--address", address), 2, address, ADDRESSES[address])
    newcomer.check(newcomer.cli("doctor", "--address", address), 5, ADDRESSES[address])
    monkeypatch.setenv("RAY_ADDRESS", address)
    newcomer.check(
        newcomer.cli("run", "fleet.yaml"),
        2,
        ADDRESSES[address],
        "" if "8265" not in address else "RAY_ADDRESS",
    )


def test_an_address_for_a_run_in_this_process(newcomer: Any, monkeypatch: Any) -> None:
    """Which would have been worked on here, whatever the cluster; an empty RAY_ADDRESS is none."""
    newcomer.check(
        newcomer.cli("run", "fleet.yaml", *INLINE, "--address", "127.0.0.1:6379"),
        2,
        "not on the cluster at 127.0.0.1:6379: leave one of the two out",
    )
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert "none given (--address or RAY_ADDRESS): a run starts one here" in newcomer.cli("doctor").out


def test_a_cluster_s_address_where_its_dashboard_s_is_wanted(newcomer: Any) -> None:
    spec = newcomer.wrote(
        output=str(newcomer.place / "out"),
        models=[{"source": str(newcomer.place / "in/*.pt2"), "recipe": "pack"}],
        data={},
    )
    newcomer.check(
        newcomer.cli("submit", spec, "--address", "ray://head:10001"),
        2,
        "give its dashboard's, http://host:8265",
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    outcome = newcomer.cli("submit", spec, "--address", f"127.0.0.1:{port}")
    newcomer.check(
        outcome,
        5,
        f"no Ray job server answers at http://127.0.0.1:{port}",
        "the dashboard's, http://host:8265",
    )


# ---- a cron job's environment

_CRON = "import sys; from fleetpress.jobs.cli import main; sys.exit(main())"


def test_as_a_cron_job(newcomer: Any) -> None:
    """No HOME, no PATH to speak of, another folder, nobody at the terminal, and letters that its log cannot hold."""
    shutil.copy(newcomer.place / "in/good.pt2", newcomer.place / "in/schön.pt2")
    spec = newcomer.spec | {
        "output": str(newcomer.place / "out"),
        "models": [{"source": str(newcomer.place / "in/*.pt2"), "data": "plain", "recipe": "pack"}],
        "data": {"plain": {"eval": str(newcomer.place / "data/test.npz")}},
    }
    Path("fleet.yaml").write_text(yaml.safe_dump(spec))
    (newcomer.place / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _CRON, "run", str(newcomer.place / "fleet.yaml"), *INLINE],
        cwd=newcomer.place / "elsewhere",
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONIOENCODING": "ascii",
            "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 published" in done.stdout
    assert "sch\\xf6n" in done.stdout
    assert not list((newcomer.place / "elsewhere").iterdir())
