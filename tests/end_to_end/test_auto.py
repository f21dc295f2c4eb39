"""`auto` from a spec to a published model: nothing is told but the goal."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fleetpress.jobs import load_artifact, run_fleet
from fleetpress.jobs.auto.ladder import ladder
from fleetpress.jobs.auto.measured import Goal, Measured
from fleetpress.jobs.handover import Payload
from fleetpress.jobs.preview.fleet import preview
from fleetpress.jobs.programs.publishing import publish
from fleetpress.jobs.runs.events import Event
from fleetpress.jobs.runs.results import FleetResult
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.jobs.tasks import StepResult

_SPEC = """
version: 1
name: chosen
output: {folder}/output
models: [{{name: net, source: {folder}/net.pt2, data: digits, recipe: best}}]
data: {{digits: {{train: {folder}/train.npz, eval: {folder}/eval.npz, loss: cross_entropy, metric: accuracy}}}}
recipes: {{best: {{auto: {auto}{more}}}}}
resources: {{memory_per_task: 4GiB}}
"""
SMALLEST = "{goal: smallest, max_drop: 2%, trials: 4, epochs: 2, folds: 2}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small net, trained, and its data."""
    place = tmp_path_factory.mktemp("auto")
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name, width in (("net", 96), ("other", 48)):
        net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 10)
        )
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(60):
            loss = nn.functional.cross_entropy(net(x[:1200]), y[:1200])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        program = torch.export.export(net.eval(), (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, place / f"{name}.pt2")
    np.savez(place / "train.npz", inputs=x[:1200].numpy(), targets=y[:1200].numpy())
    np.savez(place / "eval.npz", inputs=x[1200:].numpy(), targets=y[1200:].numpy())
    return place


def _run(folder: Path, auto: str, more: str = "") -> FleetResult:
    spec = parse_spec(_SPEC.format(folder=folder, auto=auto, more=more), "spec.yaml")
    return run_fleet(spec, executor="inline")


def _metrics(folder: Path, result: FleetResult) -> dict[str, Any]:
    digest = result.models[0].digest
    return dict(json.loads((folder / f"output/models/net/{digest}/metrics.json").read_text()))


def test_the_smallest_model_within_the_drop(folder: Path) -> None:
    result = _run(folder, SMALLEST)
    assert [(model.state, model.reason) for model in result.models] == [("published", None)]
    metrics = _metrics(folder, result)
    drop = metrics["after"]["drop"]
    assert drop["drop"] + drop["standard_error"] <= 0.02 * metrics["before"]["value"]
    search = metrics["search"]
    chosen = [trial for trial in search["trials"] if trial.get("is_chosen")]
    good = [trial for trial in search["trials"] if trial.get("is_good")]
    assert len(chosen) == 1
    if not search["backed_off"]:
        assert chosen[0]["bytes"] == min(trial["bytes"] for trial in good)
    assert {trial["family"] for trial in search["trials"]} == {"quantize", "zero", "joint", "delete"}
    assert metrics["after"]["bytes"] < metrics["before"]["bytes"] / 4
    module = load_artifact(f"{folder}/output/models/net")
    assert module(torch.zeros(1, 64)).shape == (1, 10)
    again = _run(folder, SMALLEST)
    assert [model.state for model in again.models] == ["unchanged"]


def test_the_last_rung_is_8_bits_in_every_layer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fleetpress.jobs.auto.publishing.ladder", lambda trials, goal: []
    )  # none of them passes
    result = _run(folder, "{max_drop: 2%, trials: 1, epochs: 0, folds: 2}")
    assert [(model.state, model.reason) for model in result.models] == [("published", None)]
    metrics = _metrics(folder, result)
    assert [(layer["num_bits"], layer["kind"]) for layer in metrics["layers"]] == [(8, "Linear")] * 3
    assert not any(trial.get("is_chosen") for trial in metrics["search"]["trials"])
    (page,) = (folder / f"output/runs/{result.run}").glob("report.html")
    assert "quantize to 8 bits" in page.read_text()


def test_between_two_rungs_one_is_made_that_was_not_tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first candidate is refused, and the next one that was tried is much larger."""
    refusals = [{"state": "failed", "reason": "more was lost than is allowed"}]

    def refuses_the_first(payload: Payload) -> StepResult:
        return StepResult(result=refusals.pop()) if refusals else publish(payload)

    monkeypatch.setattr("fleetpress.jobs.auto.publishing.publish_candidate", refuses_the_first)
    monkeypatch.setattr("fleetpress.jobs.auto.publishing.ladder", _ends)
    result = _run(folder, "{max_drop: 2%, trials: 4, epochs: 0, folds: 2}")
    assert [(model.state, model.reason) for model in result.models] == [("published", None)]
    metrics = _metrics(folder, result)
    search = metrics["search"]
    assert [item["why"] for item in search["backed_off"]] == ["more was lost than is allowed"]
    ends = sorted(trial["bytes"] for trial in search["trials"] if trial.get("is_good"))
    assert ends[0] < metrics["after"]["bytes"] < ends[-1]
    assert not any(trial.get("is_chosen") for trial in search["trials"])
    (page,) = (folder / f"output/runs/{result.run}").glob("report.html")
    assert "made for the ladder" in page.read_text()


def _ends(trials: Sequence[Measured], goal: Goal) -> list[Measured]:
    """The smallest and the largest of the rungs."""
    rungs = ladder(trials, goal)
    return [rungs[0], max(rungs, key=lambda trial: trial.costs["bytes"])]


def test_the_most_accurate_model_within_a_size(folder: Path) -> None:
    result = _run(folder, "{goal: most_accurate, size_bytes: 16000, trials: 4, epochs: 0, folds: 2}")
    assert [(model.state, model.reason) for model in result.models] == [("published", None)]
    metrics = _metrics(folder, result)
    assert metrics["after"]["bytes"] <= 16000
    assert metrics["search"]["budget"] == 16000


def test_half_of_the_operations_are_shared_out_among_the_layers(folder: Path) -> None:
    result = _run(
        folder,
        "{goal: most_accurate, macs: 0.5, trials: 4, epochs: 1, folds: 2}",
        ", validate: {max_drop: 0.1}",
    )
    assert [(model.state, model.reason) for model in result.models] == [("published", None)]
    metrics = _metrics(folder, result)
    assert metrics["after"]["macs"] <= 0.5 * metrics["before"]["macs"]
    narrow = [trial for trial in metrics["search"]["trials"] if trial["family"] == "narrow"]
    # What the solver counted is what is left.
    whole = metrics["before"]["macs"]
    assert max(trial["macs"] for trial in narrow) > 0.45 * whole
    assert all(trial["macs"] <= trial["x"] * whole + 1 for trial in narrow)


def test_as_few_operations_as_the_drop_allows(folder: Path) -> None:
    result = _run(folder, "{goal: fastest, max_drop: 3%, trials: 4, epochs: 0, folds: 2}")
    assert [(model.state, model.reason) for model in result.models] == [("published", None)]
    metrics = _metrics(folder, result)
    search, drop = metrics["search"], metrics["after"]["drop"]
    assert drop["drop"] + drop["standard_error"] <= 0.03 * metrics["before"]["value"]
    assert {trial["family"] for trial in search["trials"]} == {"narrow", "delete"}
    assert metrics["after"]["macs"] < 0.6 * metrics["before"]["macs"]
    assert metrics["after"]["bytes"] < metrics["before"]["bytes"] / 3  # 8 bits beside the operations
    assert "finetune" not in search["recipe"]


def test_a_fleet_shares_one_budget(folder: Path) -> None:
    """What is published of both nets fits into it; a second run has nothing left to do."""
    text = _SPEC.format(
        folder=folder, auto="{goal: smallest, max_drop: 10%, trials: 8, epochs: 0, folds: 2}", more=""
    )
    second = f"  - {{name: other, source: {folder}/other.pt2, data: digits, recipe: best}}\n"
    text = text.replace("models: [", "models:\n  - ").replace("recipe: best}]\n", f"recipe: best}}\n{second}")
    spec = parse_spec(text.replace("/output", "/shared") + "fleet: {total_bytes: 26000}\n", "spec.yaml")
    result = run_fleet(spec, executor="inline")
    assert [(model.state, model.reason) for model in result.models] == [("published", None)] * 2
    assert 18_000 < sum(float((model.after or {})["bytes"]) for model in result.models) <= 26_000
    assert [model.state for model in run_fleet(spec, executor="inline").models] == ["unchanged"] * 2


def test_plan_says_what_is_left_to_the_search(folder: Path) -> None:
    spec = parse_spec(_SPEC.format(folder=folder, auto="{max_drop: 2%}", more=""), "spec.yaml")
    (planned,) = preview(spec).models
    assert [(layer["prune"], layer["quantize"]) for layer in planned.layers or ()] == [
        ("by auto", "by auto"),
        ("by auto", "by auto"),
        (None, "by auto"),
    ]
    assert "not known yet" in planned.warnings[0]


def test_a_search_goes_on_where_it_was(folder: Path) -> None:
    """Without its last record nothing but the last step is done again, and the same bytes come out."""
    auto = "{max_drop: 10%, trials: 4, epochs: 0, folds: 2}"
    first = _run(folder, auto)
    digest = first.models[0].digest
    model = folder / f"output/models/net/{digest}/model.pt2"
    before = model.read_bytes()
    shutil.rmtree(model.parent)
    (folder / f"output/records/{digest}.json").unlink()
    begun: list[str] = []
    spec = parse_spec(_SPEC.format(folder=folder, auto=auto, more=""), "spec.yaml")

    def listen(event: Event, _: object) -> None:
        if event.kind == "started":
            begun.append(event.step or "")

    assert run_fleet(spec, executor="inline", listener=listen).models[0].state == "published"
    assert begun == ["publish"]
    assert model.read_bytes() == before


def test_on_ray_the_same_model_comes_out(folder: Path, ray_cluster: None) -> None:
    """Trials run side by side, in other processes; the bytes are those of one process."""
    (here,) = _run(folder, SMALLEST).models
    text = _SPEC.format(folder=folder, auto=SMALLEST, more="").replace("/output", "/on_ray")
    (there,) = run_fleet(parse_spec(text, "spec.yaml"), executor="ray").models
    assert (there.state, there.digest) == ("published", here.digest)
    one, other = (folder / name / "models" / "net" / str(here.digest) for name in ("output", "on_ray"))
    assert (one / "model.pt2").read_bytes() == (other / "model.pt2").read_bytes()
    searches = [json.loads((place / "metrics.json").read_text())["search"] for place in (one, other)]
    assert searches[0] == searches[1]
