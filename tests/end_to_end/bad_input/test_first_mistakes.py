"""What goes wrong on the first day: every slip is answered by one clear message that says what, where and what to do.

No traceback, the documented exit code, and nothing in the output.
"""

import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fleetpress.jobs.demo import npz_bytes
from fleetpress.storage.store import open_store

INLINE = ("--executor", "inline")


@pytest.fixture
def here(tmp_path: Path, good_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good model, its data, and a good spec `fleet.yaml`; the newcomer stands in it."""
    for key, content in good_files.items():
        open_store(str(tmp_path)).put(key, content)
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    return tmp_path


SPEC: dict[str, Any] = {
    "version": 1,
    "name": "first",
    "output": "out",
    "models": [{"source": "in/good.pt2", "data": "plain", "recipe": "pack"}],
    "data": {"plain": {"train": "data/train.npz", "eval": "data/test.npz"}},
    "recipes": {"pack": {"quantize": {"scheme": "W8A16"}, "validate": {"max_drop": 0.5}}},
}


def wrote(**parts: Any) -> str:
    """A spec with other parts, written to `fleet.yaml`."""
    Path("fleet.yaml").write_text(yaml.safe_dump(SPEC | parts, sort_keys=False))
    return "fleet.yaml"


def source(uri: str) -> dict[str, Any]:
    """The part of a spec that names another source."""
    return {"models": [{"source": uri, "data": "plain", "recipe": "pack"}]}


def check(outcome: Any, code: int, *says: str) -> None:
    """The exit code, the words, and nothing in the output of a spec that could not even begin."""
    told = outcome.out + outcome.err
    assert outcome.code == code, told
    for words in says:
        assert words in told
    assert "Traceback" not in told
    if code in (2, 5):
        assert not Path("out").exists()


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
def test_slips_on_the_command_line(slip: str, here: Path, cli: Any) -> None:
    words, says = TYPED[slip]
    outcome = cli(*words)
    check(outcome, 2, says)
    assert sum("error:" in line for line in outcome.err.splitlines()) <= 1


def test_the_verb_s_own_usage_is_shown(here: Path, cli: Any) -> None:
    assert cli("run", "fleet.yaml", "--adress", "x").err.startswith("usage: fleetpress run ")


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
def test_files_that_are_no_spec(slip: str, here: Path, cli: Any) -> None:
    name, text, says = FILES[slip]
    if text is not None:
        Path(name).write_text(text)
    check(cli("plan", name), 2, f"fleetpress: {name}", says)


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
    "one_slash": ({"output": "s3:/bucket/out"}, ("write s3://bucket/prefix",)),
    "upper_case": ({"output": "S3://bucket/out"}, ("write s3://bucket/out",)),
    "hadoop": ({"output": "s3a://bucket/out"}, ("write s3://bucket/out",)),
    "arn": ({"output": "arn:aws:s3:::bucket/out"}, ("write s3://bucket/out",)),
    "web_address": ({"output": "https://bucket.s3.eu-west-1.amazonaws.com/out"}, ("write s3://bucket/out",)),
    "home": ({"output": "~/out"}, ("`~` is not expanded here; write the whole path",)),
    "memory": ({"resources": {"memory_per_task": "4 gigs"}}, ("unknown unit `gigs`; did you mean 4GiB?",)),
}


@pytest.mark.parametrize("slip", WORDS)
def test_words_of_the_spec(slip: str, here: Path, cli: Any) -> None:
    parts, says = WORDS[slip]
    check(cli("run", wrote(**parts), *INLINE), 2, *says)


# ---- places

PLACES = {
    "a_bucket_without_s3": ("my-bucket/in/*.pt2", "a bucket is written s3://my-bucket/in/*.pt2"),
    "folder": ("inn/*.pt2", "did you mean `in/*.pt2`?"),
    "file": ("in/god.pt2", "no such file; did you mean `in/good.pt2`?"),
    "no_model": ("data", "looked for *.pt2"),
}


@pytest.mark.parametrize("slip", PLACES)
def test_places_where_nothing_is(slip: str, here: Path, cli: Any) -> None:
    uri, says = PLACES[slip]
    check(cli("plan", wrote(**source(uri))), 4, says)


def test_an_output_that_is_misspelt(here: Path, cli: Any) -> None:
    assert cli("run", "fleet.yaml", *INLINE).code == 0
    outcome = cli("status", "outt")
    assert (outcome.code, outcome.out) == (2, "")
    assert "holds no runs" in outcome.err
    assert "did you mean `out`?" in outcome.err
    assert "a bucket is written s3://my-bucket/out" in cli("status", "my-bucket/out").err
    assert "did you mean `out`?" in cli("list", "outt").err
    assert "did you mean `out/models/good`?" in cli("verify", "out/models/godo").err
    assert cli("verify", "out/models/good").code == 0


def test_an_output_that_is_a_model(here: Path, cli: Any) -> None:
    """`plan` sees it, and `run` overwrites nothing."""
    before = (here / "in/good.pt2").read_bytes()
    check(cli("plan", wrote(output="in/good.pt2")), 5, "in/good.pt2 cannot be created: a part of its path is")
    outcome = cli("run", wrote(output="in/good.pt2"), *INLINE)
    check(outcome, 5, "a part of its path is a file")
    assert (here / "in/good.pt2").read_bytes() == before


def test_an_output_that_takes_no_files(here: Path, cli: Any) -> None:
    check(cli("run", wrote(output="/proc/out"), *INLINE), 5, "cannot be created: its folder cannot be made")


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
def test_models_that_are_none(name: str, here: Path, cli: Any) -> None:
    make, says = MODELS[name]
    Path("in", name).write_bytes(make())
    for verb in (["plan"], ["run", *INLINE]):
        outcome = cli(verb[0], wrote(**source(f"in/{name}")), *verb[1:])
        check(outcome, 4, f"in/{name}", says)
    assert not list(Path("out").glob("models/*")) + list(Path("out").glob("records/*"))


def test_a_factory_without_leave_and_one_that_is_misspelt(here: Path, cli: Any) -> None:
    Path("in/weights.pt").write_bytes(saved({}))
    model = {"source": "in/weights.pt", "recipe": "pack", "inputs": {"input": {"shape": ["batch", 4]}}}
    spec = wrote(models=[{**model, "factory": "no_such_nets:build"}])
    check(
        cli("run", spec, *INLINE), 4, "its factory 'no_such_nets:build' is code; run again with --allow-code"
    )
    outcome = cli("run", spec, "--allow-code", *INLINE)
    check(outcome, 4, "No module named 'no_such_nets'", "put its folder on PYTHONPATH")


def test_data_with_other_names(here: Path, cli: Any, samples: dict[str, Any]) -> None:
    for name, rows in (("odd-train", slice(0, 48)), ("odd-test", slice(48, 64))):
        arrays = {"images": samples["inputs"][rows], "labels": samples["targets"][rows]}
        Path(f"data/{name}.npz").write_bytes(npz_bytes(arrays))
    data = {"plain": {"train": "data/odd-train.npz", "eval": "data/odd-test.npz"}}
    outcome = cli("run", wrote(data=data), *INLINE)
    check(outcome, 4, "is not among the arrays ['images', 'labels']; name the arrays 'inputs'")


def test_a_metric_that_does_not_fit(here: Path, cli: Any) -> None:
    data = {"plain": {"eval": "data/test.npz", "metric": "perplexity"}}
    check(cli("run", wrote(data=data), *INLINE), 4, "perplexity needs outputs (samples, tokens, vocabulary)")


def test_data_that_is_misspelt(here: Path, cli: Any) -> None:
    data = {"plain": {"eval": "data/tset.npz"}}
    check(cli("plan", wrote(data=data)), 4, "it is named as data; did you mean `data/test.npz`?")


# ---- the cluster

ADDRESSES = {
    "http://127.0.0.1:8265": "is the address of a web page",
    "127.0.0.1": "is no address of a Ray cluster; give host:port, ray://host:port or auto",
    "127.0.0.1:6379/": "is no address of a Ray cluster",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_that_are_none(address: str, here: Path, cli: Any, monkeypatch: Any) -> None:
    check(cli("run", "fleet.yaml", "--address", address), 2, address, ADDRESSES[address])
    monkeypatch.setenv("RAY_ADDRESS", address)
    check(cli("run", "fleet.yaml"), 2, ADDRESSES[address], "" if "8265" not in address else "RAY_ADDRESS")


def test_a_cluster_s_address_where_its_dashboard_s_is_wanted(here: Path, cli: Any) -> None:
    spec = wrote(
        output=str(here / "out"), models=[{"source": str(here / "in/*.pt2"), "recipe": "pack"}], data={}
    )
    check(cli("submit", spec, "--address", "ray://head:10001"), 2, "give its dashboard's, http://host:8265")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    outcome = cli("submit", spec, "--address", f"127.0.0.1:{port}")
    check(
        outcome,
        5,
        f"no Ray job server answers at http://127.0.0.1:{port}",
        "the dashboard's, http://host:8265",
    )


def test_a_task_larger_than_every_machine(here: Path, cli: Any, ray_cluster: None) -> None:
    outcome = cli("run", wrote(resources={"memory_per_task": "4TiB"}))
    check(outcome, 4, "4096.0 GiB of memory each, which the cluster can never give", "lower resources.memory")
    assert not Path("out/models").exists()


# ---- S3

ENVIRONMENTS: dict[str, tuple[dict[str, str | None], str]] = {
    "no_scheme": (
        {"AWS_ENDPOINT_URL": "localhost:9000"},
        "is no valid address: expected http(s)://host:port",
    ),
    "https_for_http": ({"AWS_ENDPOINT_URL": "https{rest}"}, "write http:// in AWS_ENDPOINT_URL"),
    "bucket_in_the_address": (
        {"AWS_ENDPOINT_URL": "{endpoint}/models"},
        "a bucket's name belongs into the uri",
    ),
    "half_of_the_key": ({"AWS_SECRET_ACCESS_KEY": None}, "no credentials: set AWS_PROFILE"),
    "profile": ({"AWS_PROFILE": "nobody"}, "AWS_PROFILE or the AWS configuration file names something"),
    "region": ({"AWS_DEFAULT_REGION": "eu west"}, "names no region: write one such as eu-central-1"),
}


@pytest.mark.parametrize("slip", ENVIRONMENTS)
def test_an_environment_that_leads_elsewhere(
    slip: str, here: Path, cli: Any, s3_uri: str, monkeypatch: Any
) -> None:
    variables, says = ENVIRONMENTS[slip]
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            endpoint = os.environ["AWS_ENDPOINT_URL"]
            rest = endpoint.removeprefix("http")
            monkeypatch.setenv(name, value.format(endpoint=endpoint, rest=rest))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    spec = wrote(**source(f"{s3_uri}/in/*.pt2"))
    check(cli("plan", spec), 5, says)


def test_no_region_at_all_is_no_mistake(here: Path, cli: Any, s3_uri: str, monkeypatch: Any) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    open_store(s3_uri).put("in/good.pt2", (here / "in/good.pt2").read_bytes())
    assert cli("plan", wrote(**source(f"{s3_uri}/in/*.pt2"))).code == 0


def test_misspelt_buckets(here: Path, cli: Any, s3_uri: str) -> None:
    """`plan` finds out, too, and says by its exit code that it is the storage."""
    spec = wrote(**source("s3://no-such-bucket-here/in/*.pt2"))
    check(
        cli("plan", spec), 5, "s3://no-such-bucket-here/in/", "there is no such bucket: create it, or correct"
    )
    check(
        cli("plan", wrote(output="s3://no-such-bucket-here/out")),
        5,
        "there is no bucket 'no-such-bucket-here'",
    )
    check(cli("status", "s3://no-such-bucket-here/out"), 5, "there is no such bucket")
    models = [*SPEC["models"], {"source": "s3://no-such-bucket-here/x.pt2", "recipe": "pack"}]
    check(cli("plan", wrote(models=models)), 3, "no bucket 'no-such-bucket-here'")


class _Odd(BaseHTTPRequestHandler):
    """Something else than S3: the class attribute says what it answers."""

    reply = (200, "text/html", b"<!doctype html><p>Sign in</p>")

    def _answer(self) -> None:
        status, kind, body = self.reply
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def odd_server(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A server that is no S3, at AWS_ENDPOINT_URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Odd) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield server
        server.shutdown()
        thread.join()


def test_the_port_of_a_web_page(odd_server: Any, here: Path, cli: Any) -> None:
    spec = wrote(**source("s3://models/in/*.pt2"))
    check(cli("plan", spec), 5, "what answers there is no S3 server", "AWS_ENDPOINT_URL")


EXPIRED = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The token</Message></Error>"


def test_an_expired_token(odd_server: Any, here: Path, cli: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(_Odd, "reply", (400, "application/xml", EXPIRED))
    monkeypatch.setenv("AWS_SESSION_TOKEN", "old-token")
    outcome = cli("run", wrote(output="s3://models/out"), *INLINE)
    check(outcome, 5, "the credentials have expired: renew them (AWS_SESSION_TOKEN, or sign in again)")
    assert "old-token" not in outcome.err
    spec = wrote(**source("s3://models/in/good.pt2"))  # a HEAD says less
    check(cli("plan", spec), 5, "they are wrong or have expired")


def _certificate(path: Path) -> Path:
    """A fresh certificate for localhost, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    begin = datetime(2020, 1, 1, tzinfo=UTC)
    builder = builder.serial_number(1).not_valid_before(begin).not_valid_after(begin + timedelta(days=36_500))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    signed = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    path.write_bytes(key.private_bytes(*form) + signed)
    return path


def test_http_for_https(odd_server: Any, here: Path, cli: Any) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(_certificate(here / "certificate.pem"))
    odd_server.socket = context.wrap_socket(odd_server.socket, server_side=True)
    check(cli("plan", wrote(**source("s3://models/in/*.pt2"))), 5, "https:// in AWS_ENDPOINT_URL")


# ---- a cron job's environment

_CRON = "import sys; from fleetpress.jobs.cli import main; sys.exit(main())"


def test_as_a_cron_job(here: Path) -> None:
    """No HOME, no PATH to speak of, another folder, nobody at the terminal."""
    spec = SPEC | {
        "output": str(here / "out"),
        "models": [{"source": str(here / "in/*.pt2"), "data": "plain", "recipe": "pack"}],
        "data": {"plain": {"eval": str(here / "data/test.npz")}},
    }
    Path("fleet.yaml").write_text(yaml.safe_dump(spec))
    (here / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _CRON, "run", str(here / "fleet.yaml"), *INLINE],
        cwd=here / "elsewhere",
        env={"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 published" in done.stdout
    assert not list((here / "elsewhere").iterdir())
