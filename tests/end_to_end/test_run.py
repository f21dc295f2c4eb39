"""The whole road: fetch, collect, prune, fine-tune, quantize, validate, publish; everywhere the same bytes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.artifacts import dequantize, published, verify
from fleetpress.jobs.cli import main
from fleetpress.jobs.preview.fleet import preview
from fleetpress.jobs.runs.results import FleetResult, read_result
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.storage.store import ObjectStore, open_store

Write = Callable[..., Spec]
Sets = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def states(result: FleetResult) -> dict[str, str]:
    return {model.name: model.state for model in result.models}


def artifact_bytes(output: str) -> dict[str, bytes]:
    """Every published model file; metrics hold measured latencies and are left out."""
    store = open_store(output)
    return {info.key: store.get(info.key) for info in store.list("models/") if info.key.endswith("model.pt2")}


@pytest.fixture(scope="session")
def inline_run(
    tmp_path_factory: pytest.TempPathFactory, trained_fleet: dict[str, bytes], spec_text: str
) -> FleetResult:
    place = tmp_path_factory.mktemp("inline")
    for key, data in trained_fleet.items():
        open_store(str(place)).put(key, data)
    return run_fleet(parse_spec(spec_text.format(place=place), "spec.yaml"), executor="inline")


def test_whole_fleet_is_published_smaller_and_nearly_as_good(inline_run: FleetResult) -> None:
    assert states(inline_run) == {"cnn": "published", "mlp": "published"}
    assert inline_run.exit_code == 0
    for model in inline_run.models:
        assert model.before is not None
        assert model.after is not None
        assert model.after["value"] >= model.before["value"] - 0.05
        assert model.before["value"] > 0.9
        for measure in ("parameters", "macs", "bytes"):
            assert model.after[measure] < model.before[measure]


def test_metrics_name_removed_units_bits_and_errors(inline_run: FleetResult) -> None:
    store = open_store(inline_run.output)
    for model in inline_run.models:
        metrics = json.loads(store.get(f"models/{model.name}/{model.digest}/metrics.json"))
        pruned = [layer for layer in metrics["layers"] if layer["removed_units"]]
        assert pruned
        assert all(0.2 < layer["sparsity"] <= 0.3 for layer in pruned)
        quantized = [layer for layer in metrics["layers"] if layer["num_bits"] == 4]
        assert {layer["name"] for layer in quantized} == {layer["name"] for layer in metrics["layers"]}
        assert all(layer["sqnr_db"] > 10 for layer in quantized)
        assert metrics["bits_per_weight"] < 8


def test_load_artifact_gives_the_measured_accuracy(inline_run: FleetResult, digits: Sets) -> None:
    _, test_set = digits
    for model in inline_run.models:
        assert model.after is not None
        module = load_artifact(f"{inline_run.output}/models/{model.name}")
        assert isinstance(module, torch.nn.Module)
        with torch.no_grad():
            right = (module(test_set["inputs"]).argmax(1) == test_set["targets"]).double().mean()
        assert float(right) == pytest.approx(model.after["value"], abs=1e-12)


def test_verify_proves_and_finds_damage(inline_run: FleetResult, tmp_path: Path) -> None:
    model = inline_run.models[0]
    assert verify(f"{inline_run.output}/models/{model.name}") == []
    source = open_store(f"{inline_run.output}/models/{model.name}/{model.digest}")
    copy = open_store(str(tmp_path / "copy"))
    for info in source.list():
        data = source.get(info.key)
        copy.put(info.key, data[:-1] + bytes([data[-1] ^ 1]) if info.key == "model.pt2" else data)
    assert verify(str(tmp_path / "copy")) == ["model.pt2: its sha256 is not the manifest's"]


def test_dequantized_program_computes_the_same(inline_run: FleetResult, tmp_path: Path, digits: Sets) -> None:
    name = inline_run.models[0].name
    assert dequantize(f"{inline_run.output}/models/{name}", str(tmp_path / "plain")) == ["model.pt2"]
    plain = torch.export.load(str(tmp_path / "plain" / "model.pt2")).module()
    packed = load_artifact(f"{inline_run.output}/models/{name}")
    images = digits[1]["inputs"][:20]
    assert torch.equal(plain(images), packed(images))  # type: ignore[operator]


@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_s3_and_ray_give_the_same_bytes(
    executor: str, inline_run: FleetResult, fleet_at: Write, s3_uri: str, request: pytest.FixtureRequest
) -> None:
    if executor == "ray":
        request.getfixturevalue("ray_cluster")
    result = run_fleet(fleet_at(f"{s3_uri}/fleet"), executor=executor)  # type: ignore[arg-type]
    assert states(result) == {"cnn": "published", "mlp": "published"}
    assert artifact_bytes(result.output) == artifact_bytes(inline_run.output)


class Counting:
    """A store that counts the bytes of what it gives out by key."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.read: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def get(self, key: str, *, etag: str | None = None, most_bytes: int | None = None) -> bytes:
        self.read.append(key)
        return self._store.get(key, etag=etag, most_bytes=most_bytes)

    def get_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        self.read.append(key)
        return self._store.get_range(key, start, length, etag=etag)


def test_second_run_is_unchanged_and_reads_no_model(
    fleet_at: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = fleet_at(tmp_path)
    first = run_fleet(spec, executor="inline")
    from fleetpress.storage import store as stores

    counting: list[Counting] = []
    original = stores._new_store

    def counted(place: str) -> Counting:
        counting.append(Counting(original(place)))
        return counting[-1]

    monkeypatch.setattr(stores, "_new_store", counted)
    monkeypatch.setattr(stores, "_stores", {})
    second = run_fleet(spec, executor="inline")
    assert states(second) == {"cnn": "unchanged", "mlp": "unchanged"}
    assert [model.digest for model in second.models] == [model.digest for model in first.models]
    read = [key for store in counting for key in store.read]
    assert read
    assert not [key for key in read if key.endswith((".pt2", ".npz", ".safetensors"))]


def test_interrupted_run_resumes_at_the_task_that_was_not_finished(
    fleet_at: Write, tmp_path: Path, inline_run: FleetResult
) -> None:
    spec = fleet_at(tmp_path)
    done: list[str] = []

    def stop(event: object, result: FleetResult) -> None:
        if event.kind == "finished":  # type: ignore[attr-defined]
            done.append(event.task)  # type: ignore[attr-defined]
            if len(done) == 4:
                raise KeyboardInterrupt

    first = run_fleet(spec, executor="inline", listener=stop)
    assert first.state == "interrupted"
    assert first.exit_code == 130
    again: list[str] = []
    second = run_fleet(
        spec,
        executor="inline",
        listener=lambda event, result: again.append(event.task or "") if event.kind == "finished" else None,
    )
    assert states(second) == {"cnn": "published", "mlp": "published"}
    assert not set(done) & set(again)
    assert artifact_bytes(second.output) == artifact_bytes(inline_run.output)


def test_second_recipe_reuses_the_statistics(fleet_at: Write, tmp_path: Path, spec_text: str) -> None:
    run_fleet(fleet_at(tmp_path), executor="inline")
    ran: list[str] = []
    other = fleet_at(tmp_path, spec_text.replace("sparsity: 0.3", "sparsity: 0.4"))
    run_fleet(other, executor="inline", listener=lambda event, result: ran.append(event.task or ""))
    assert any("prune" in task for task in ran)
    assert not any("collect" in task for task in ran)


@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_models_that_share_steps_do_them_once(
    executor: str, fleet_at: Write, tmp_path: Path, spec_text: str, request: pytest.FixtureRequest
) -> None:
    if executor == "ray":
        request.getfixturevalue("ray_cluster")
    entry = '{{name: mlp-{0}, source: "{place}/models/mlp.pt2", data: digits, recipe: small}}'
    source = '{{source: "{place}/models/*.pt2", data: digits, recipe: small}}'
    assert source in spec_text
    twins = "\n  - ".join(entry.replace("{0}", name) for name in ("a", "b", "c"))
    ran: list[str] = []
    result = run_fleet(
        fleet_at(tmp_path, spec_text.replace(source, twins)),
        executor=executor,  # type: ignore[arg-type]
        listener=lambda event, result: ran.append(event.task or "") if event.seconds else None,
    )
    assert set(states(result).values()) == {"published"}
    assert len(result.models) == 3
    kinds = [task.split("/")[1] for task in ran]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "collect": 1, "prune": 1, "finetune": 1, "quantize": 1, "publish": 3
    }  # fmt: skip


def test_an_output_that_other_nodes_do_not_see_fails_the_models_by_name(
    fleet_at: Write, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the driver's machine alone: models would be published on some node, where nobody looks."""
    monkeypatch.setattr("fleetpress.jobs.driver.run.summary_key", lambda _run: "not-there.json")
    result = run_fleet(fleet_at(tmp_path), executor="ray")
    assert {model.state for model in result.models} == {"failed"}
    for model in result.models:
        assert f"does not see the {tmp_path}/output" in (model.reason or "")
    assert not {"models", "records"} & {path.name for path in (tmp_path / "output").iterdir()}


def test_a_model_that_loses_too_much_is_rejected_with_its_numbers(
    fleet_at: Write, tmp_path: Path, spec_text: str
) -> None:
    text = spec_text.replace("finetune: {{epochs: 2, batch_size: 64, lr: 2.0e-3}}", "").replace(
        "sparsity: 0.3", "sparsity: 0.95"
    )
    result = run_fleet(fleet_at(tmp_path, text), executor="inline")
    assert set(states(result).values()) == {"rejected"}
    assert result.exit_code == 4
    for model in result.models:
        assert model.reason is not None
        assert "max_drop" in model.reason
        assert model.after is not None
    assert not artifact_bytes(result.output)
    assert states(run_fleet(fleet_at(tmp_path, text), executor="inline")) == states(result)


def test_plan_predicts_the_bytes_of_the_quantized_part(fleet_at: Write, tmp_path: Path) -> None:
    spec = fleet_at(tmp_path)
    plan = preview(spec)
    assert not plan.problems
    result = run_fleet(spec, executor="inline")
    for planned, model in zip(plan.models, result.models, strict=True):
        assert planned.name == model.name
        metrics = json.loads(
            open_store(result.output).get(f"models/{model.name}/{model.digest}/metrics.json")
        )
        assert planned.quantized_bytes == sum(
            layer["bytes_after"] for layer in metrics["layers"] if layer["num_bits"]
        )
        assert planned.header_bytes < planned.source_bytes
    assert {model.state for model in preview(spec).models} == {"unchanged"}


def test_status_and_list_read_the_output_alone(inline_run: FleetResult) -> None:
    store = open_store(inline_run.output)
    assert read_result(store).as_dict() == json.loads(store.get(f"runs/{inline_run.run}/summary.json"))
    assert [entry["name"] for entry in published(inline_run.output)] == ["cnn", "mlp"]


def test_a_run_keeps_what_its_page_tells(fleet_at: Write, tmp_path: Path, spec_text: str) -> None:
    text = "# see https://reader:secret@docs.example/fleet\n" + spec_text
    first = run_fleet(fleet_at(tmp_path, text), executor="inline")
    store = open_store(first.output)
    kept = store.get(f"runs/{first.run}/spec.yaml").decode()
    assert kept == text.format(place=tmp_path).replace("reader:secret@", "***@")
    assert {"python", "torch", "ray", "fleetpress"} <= first.versions.keys()
    assert [model.max_drop for model in first.models] == [0.05, 0.05]
    again = run_fleet(fleet_at(tmp_path, text), executor="inline")
    pages = [store.get(f"runs/{run.run}/report.html").decode() for run in (first, again)]
    assert "Since the last run" not in pages[0]
    assert f'Since the last run <span class="soft">{first.run}</span>' in pages[1]
    for page in pages:
        assert "reader:***@docs" not in page
        assert "secret" not in page
        assert "accepted drop" in page
    assert "k-finetune" in pages[0]
    # The verb makes the same page of the output alone.
    written = tmp_path / "page.html"
    assert main(["report", first.output, first.run, "--html", str(written)]) == 0
    assert written.read_text(encoding="utf-8") == pages[0]


def test_unlabelled_data_is_served_by_distillation(
    fleet_at: Write, tmp_path: Path, spec_text: str, digits: Sets
) -> None:
    spec = fleet_at(tmp_path)
    store = open_store(str(tmp_path))
    from fleetpress.jobs.demo import npz_bytes

    train_set, test_set = digits
    for key in ("data/train-0.npz", "data/train-1.npz"):
        store.delete(key)
    store.put("data/train-0.npz", npz_bytes({"inputs": train_set["inputs"]}))
    store.put("data/test.npz", npz_bytes({"inputs": test_set["inputs"]}))
    text = spec_text.replace(", loss: cross_entropy, metric: accuracy", "").replace(
        "max_drop: 0.05", "max_drop: 0.1"
    )
    spec = parse_spec(text.format(place=tmp_path), "spec.yaml")
    result = run_fleet(spec, executor="inline")
    assert states(result) == {"cnn": "published", "mlp": "published"}
    for model in result.models:
        assert model.before is not None
        assert model.before["metric"] == "agreement"
        assert model.before["value"] == 1.0
