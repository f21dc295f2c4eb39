"""Sources and outputs that cannot be reached, read or written, and names that clash."""

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from fleetpress.storage.store import open_store


def run(cli: Any, spec: str, *more: str) -> Any:
    return cli("run", spec, "--executor", "inline", "--json", *more)


SOURCES = {
    "no_file": ("{place}/in/nothing.pt2", ("nothing.pt2", "no such file")),
    "no_folder": ("{place}/absent", ("holds no model", "*.pt2")),
    "no_match": ("{place}/in/*.pth", ("matches no model", "*.pth")),
    "two_in_a_folder": ("{place}/two", ("holds no model", "name one file")),
    "dangling": ("{place}/in/dangling.pt2", ("link", "does not exist")),
    "two_stars": ("{place}/**/x.pt2", ("** is not supported",)),
    "a_folder": ("{place}/in/folder.pt2", ("is a folder",)),
    "good": ("{place}/absent/good.pt2", ("no such file",)),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def outcome(place: Path, write_fleet: Any, cli: Any, good: bytes) -> Any:
    (place / "in/folder.pt2").mkdir(parents=True)
    os.symlink(place / "gone.pt2", place / "in/dangling.pt2")
    files = {"two/a.pt2": good, "two/b.pt2": good, "one/same.pt2": good, "other/same.pt2": good}
    models = [
        {"name": name, "source": source.format(place=place), "recipe": "pack"}
        for name, (source, _) in SOURCES.items()
    ]
    models.append({"source": f"{place}/o*/same.pt2", "recipe": "pack"})
    return run(cli, write_fleet(place, place, files=files, models=models))


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_leads_nowhere_fails_alone(name: str, outcome: Any, place: Path) -> None:
    assert outcome.code == 3
    assert outcome.models["good"]["state"] == "published"
    model = outcome.models["good (2)" if name == "good" else name]
    assert model["state"] == "failed"
    for words in SOURCES[name][1]:
        assert words in model["reason"]


def test_two_models_of_one_name_are_both_named_and_neither_is_published(outcome: Any, place: Path) -> None:
    model = outcome.models["same"]
    assert model["state"] == "failed"
    for words in ("one/same.pt2", "other/same.pt2", "`name`"):
        assert words in model["reason"]
    assert not (place / "out/models/same").exists()


@pytest.mark.parametrize("name", ["nét à l'été", "a b+c%20d", "-rf", "#1;drop"])
def test_odd_names_are_names(name: str, tmp_path: Path, write_fleet: Any, cli: Any, good: bytes) -> None:
    models = [{"source": f"{tmp_path}/odd/*.pt2", "recipe": "pack"}]
    spec = write_fleet(tmp_path, tmp_path, files={f"odd/{name}.pt2": good}, models=models)
    outcome = run(cli, spec)
    assert outcome.code == 0
    assert outcome.models[name]["state"] == "published"
    assert cli("verify", f"{tmp_path}/out/models/{name}").code == 0


def test_an_output_that_is_a_file(tmp_path: Path, write_fleet: Any, cli: Any) -> None:
    (tmp_path / "out").write_text("a file")
    outcome = run(cli, write_fleet(tmp_path, tmp_path))
    assert outcome.code == 5
    assert "a part of its path is a file" in outcome.err


def test_artifacts_are_no_sources(tmp_path: Path, write_fleet: Any, cli: Any) -> None:
    """A pattern that reaches into the output takes the same models at every run."""
    models = [
        {"name": "grasping", "source": f"{tmp_path}/*/*/*/*/*/model.pt2", "recipe": "pack"},
        {"name": "mine", "source": f"{tmp_path}/x/out/models/good/*/model.pt2", "recipe": "pack"},
    ]
    spec = write_fleet(tmp_path, tmp_path, models=models, output=f"{tmp_path}/x/out")
    first = run(cli, spec)
    again = run(cli, spec)
    assert again.models["good"]["state"] == "unchanged"
    assert again.models.keys() == first.models.keys() == {"good", "grasping", "mine"}
    for name in ("grasping", "mine"):
        assert "matches no model" in first.models[name]["reason"]
        assert "names what the output" in again.models[name]["reason"]
        assert not (tmp_path / "x/out/models" / name).exists()


def test_an_output_inside_a_checkpoint(tmp_path: Path, write_fleet: Any, cli: Any) -> None:
    import safetensors.torch
    import torch

    files = {
        "llm/config.json": b"{}",
        "llm/model.safetensors": safetensors.torch.save({"up.weight": torch.ones(8, 8)}),
    }
    models = [{"source": f"{tmp_path}/llm", "recipe": "pack"}]
    spec = write_fleet(tmp_path, tmp_path, files=files, models=models, output=f"{tmp_path}/llm/out")
    outcome = run(cli, spec)
    assert outcome.code == 3
    assert "lies in the model's folder" in outcome.models["llm"]["reason"]


def test_two_specs_share_an_output(tmp_path: Path, write_fleet: Any, cli: Any, good: bytes) -> None:
    """The second one finds the first one's work, also under another name, and takes nothing for its own by mistake."""
    first = run(cli, write_fleet(tmp_path, tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    models = [{"name": "twin", "source": f"{tmp_path}/in/good.pt2", "data": "plain", "recipe": "pack"}]
    second = run(cli, write_fleet(tmp_path, other, models=models))
    assert first.code == second.code == 0
    assert second.models["good"]["state"] == "unchanged"
    assert second.models["twin"]["state"] == "published"
    assert cli("verify", f"{tmp_path}/out/models/twin").code == 0


def test_a_rejected_twin_is_rejected_under_its_own_name(tmp_path: Path, write_fleet: Any, cli: Any) -> None:
    strict = {"strict": {"prune": {"method": "random", "sparsity": 0.9}, "validate": {"max_drop": 0}}}
    entry = {"source": f"{tmp_path}/in/good.pt2", "data": "plain", "recipe": "strict"}
    for names in (["one"], ["two"]):
        models = [{"name": name, **entry} for name in names]
        outcome = run(cli, write_fleet(tmp_path, tmp_path, models=models, recipes=strict))
        assert outcome.code == 3
        assert outcome.models.keys() == {"good", *names}
        for name in names:
            assert outcome.models[name]["state"] == "rejected"
            assert "max_drop" in outcome.models[name]["reason"]
            assert not (tmp_path / "out/models" / name).exists()


# ---- object stores


def test_s3_without_bucket_or_key(s3_uri: str, tmp_path: Path, write_fleet: Any, cli: Any) -> None:
    models = [
        {"name": "bucketless", "source": "s3://no-such-bucket-here/x.pt2", "recipe": "pack"},
        {"name": "keyless", "source": f"{s3_uri}/in/x.pt2", "recipe": "pack"},
        {"name": "matchless", "source": f"{s3_uri}/absent/*", "recipe": "pack"},
    ]
    outcome = run(cli, write_fleet(s3_uri, tmp_path, models=models))
    assert outcome.code == 3
    assert outcome.models["good"]["state"] == "published"
    assert "no bucket 'no-such-bucket-here'" in outcome.models["bucketless"]["reason"]
    assert "no such object" in outcome.models["keyless"]["reason"]
    assert "matches no model" in outcome.models["matchless"]["reason"]
    assert not [info for info in open_store(s3_uri).list("out/models/") if "/good/" not in info.key]


def test_an_output_bucket_that_is_missing(s3_uri: str, tmp_path: Path, write_fleet: Any, cli: Any) -> None:
    outcome = run(cli, write_fleet(s3_uri, tmp_path, output="s3://no-such-bucket-here/out"))
    assert outcome.code == 5
    assert "no such bucket: create it" in outcome.err


def test_no_credentials(s3_uri: str, tmp_path: Path, write_fleet: Any, cli: Any, monkeypatch: Any) -> None:
    spec = write_fleet(s3_uri, tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    outcome = run(cli, spec)
    assert outcome.code == 5
    assert "no credentials: set AWS_PROFILE" in outcome.err


def test_wrong_credentials(
    seaweed_uri: str, tmp_path: Path, write_fleet: Any, cli: Any, monkeypatch: Any
) -> None:
    remote = write_fleet(seaweed_uri, tmp_path)
    models = [{"name": "far", "source": f"{seaweed_uri}/in/good.pt2", "recipe": "pack"}]
    (tmp_path / "local").mkdir()
    local = write_fleet(tmp_path, tmp_path / "local", models=models)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    outcome = run(cli, remote)
    assert outcome.code == 5
    assert "credentials were refused" in outcome.err
    assert "not-the-secret" not in outcome.err
    beside = run(cli, local)
    assert beside.code == 3
    assert beside.models["good"]["state"] == "published"
    assert "AWS_PROFILE or AWS_ACCESS_KEY_ID" in beside.models["far"]["reason"]  # a HEAD does not say more


def test_an_endpoint_that_is_down(
    tmp_path: Path, s3_uri: str, write_fleet: Any, cli: Any, monkeypatch: Any
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    models = [{"name": "far", "source": "s3://bucket/x.pt2", "recipe": "pack"}]
    local = write_fleet(tmp_path, tmp_path, models=models)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    beside = run(cli, local)
    assert beside.code == 3
    assert beside.models["good"]["state"] == "published"
    assert "does not answer: check AWS_ENDPOINT_URL" in beside.models["far"]["reason"]
    (tmp_path / "far").mkdir()
    outcome = run(cli, write_fleet(tmp_path, tmp_path / "far", output="s3://bucket/out"))
    assert outcome.code == 5
    assert "does not answer" in outcome.err
    assert time.monotonic() - started < 30
