"""Pruning in rounds, with scores from inputs and compensation: every round has its records, and indices add up."""

import json
from collections.abc import Callable
from pathlib import Path

from fleetpress.compression.cost import macs
from fleetpress.compression.layers import layers
from fleetpress.compression.program import tensors
from fleetpress.compression.pruning import delete
from fleetpress.jobs import run_fleet
from fleetpress.jobs.spec.fleet_spec import Spec
from fleetpress.storage.programs import load_program
from fleetpress.storage.store import open_store

Write = Callable[..., Spec]
SPEC = """\
version: 1
name: rounds
output: {place}/output
models:
  - {{name: cnn, source: "{place}/models/cnn.pt2", data: digits, recipe: small}}
data:
  digits: {{train: "{place}/data/train-*.npz", eval: "{place}/data/test.npz", loss: cross_entropy, metric: accuracy}}
recipes:
  small:
    prune: {{method: METHOD, sparsity: 0.6, schedule: iterative, rounds: 2, compensate: COMPENSATE}}
    finetune: {{epochs: 3, batch_size: 64, lr: 2.0e-3}}
    calibrate: {{samples: 64}}
    validate: {{max_drop: 0.1}}
"""


def spec_of(method: str, compensate: str) -> str:
    return SPEC.replace("METHOD", method).replace("COMPENSATE", compensate)


def test_rounds_resume_and_tell_the_original_s_units(fleet_at: Write, tmp_path: Path) -> None:
    spec = fleet_at(tmp_path, spec_of("wanda_structured", "least_squares"))
    done: list[str] = []

    def stop(event: object, result: object) -> None:
        if event.kind == "finished":  # type: ignore[attr-defined]
            done.append(event.task)  # type: ignore[attr-defined]
            if len(done) == 4:
                raise KeyboardInterrupt

    assert run_fleet(spec, executor="inline", listener=stop).state == "interrupted"
    assert done == [f"cnn/{name}" for name in ("observe[0]", "prune[0]", "finetune[0]", "observe[1]")]
    again: list[str] = []
    result = run_fleet(
        spec,
        executor="inline",
        listener=lambda event, result: again.append(event.task or "") if event.kind == "finished" else None,
    )
    assert again == [f"cnn/{name}" for name in ("prune[1]", "finetune[1]", "publish")]
    (model,) = result.models
    assert model.state == "published", model.reason
    store = open_store(result.output)
    metrics = json.loads(store.get(f"models/cnn/{model.digest}/metrics.json"))
    by_name = {layer["name"]: layer for layer in metrics["layers"]}
    assert {name: len(layer["removed_units"]) for name, layer in by_name.items()} == {
        "conv1": 4,  # floor(0.6 * 8) in all
        "conv2": 9,
        "head": 0,
    }
    assert by_name["conv1"]["sparsity"] == 0.5
    # The original without these units has the shapes and the work of what was published.
    original = load_program(open_store(str(tmp_path)).get("models/cnn.pt2"))
    smaller = delete(original, {name: layer["removed_units"] for name, layer in by_name.items()})
    published = load_program(store.get(f"models/cnn/{model.digest}/model.pt2"))
    shapes = {name: value.shape for name, value in tensors(smaller).items()}
    assert {name: value.shape for name, value in tensors(published).items()} == shapes
    assert macs(smaller) == model.after["macs"]  # type: ignore[index]
    assert [layer.name for layer in layers(published)] == ["conv1", "conv2", "head"]


def test_a_round_records_what_it_deletes_and_corrects(fleet_at: Write, tmp_path: Path) -> None:
    result = run_fleet(fleet_at(tmp_path, spec_of("taylor", "bias")), executor="inline")
    assert [model.state for model in result.models] == ["published"], result.models[0].reason
    store = open_store(result.output)
    records = [
        json.loads(store.get(info.key)) for info in store.list("records/") if info.key.endswith(".json")
    ]
    first, second = sorted(
        (one for one in records if one["kind"] == "prune"),
        key=lambda one: len(one["result"]["removed"]["conv2"]),
    )
    # 0.6 * (1 - (1 - 1/2)^3) = 0.525 of 16 channels after the first round.
    assert len(first["result"]["removed"]["conv2"]) == 8
    assert first["result"]["removed"] == first["result"]["round_removed"]
    before, now = set(first["result"]["removed"]["conv2"]), set(second["result"]["removed"]["conv2"])
    assert before < now
    left = [unit for unit in range(16) if unit not in before]
    assert {left[index] for index in second["result"]["round_removed"]["conv2"]} == now - before
    assert second["result"]["units"] == first["result"]["units"] == {"conv1": 8, "conv2": 16, "head": 10}
    assert set(first["result"]["compensated"]) == {"conv2", "head"}
    kinds = [one["kind"] for one in records]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "collect": 2, "calibrate": 2, "prune": 2, "finetune": 2, "publish": 1
    }  # fmt: skip


def test_compensation_is_what_the_smaller_program_computes(fleet_at: Write, tmp_path: Path) -> None:
    """Without tuning: better than the same units deleted alone, and the artifact is what was measured."""
    losses = {}
    for compensate in ("none", "least_squares"):
        text = spec_of("random", compensate).replace("schedule: iterative, rounds: 2, ", "")
        text = text.replace("    finetune: {{epochs: 3, batch_size: 64, lr: 2.0e-3}}\n", "").replace(
            "0.1}}\n", "1}}\n"
        )
        result = run_fleet(fleet_at(tmp_path, text), executor="inline")
        assert result.models[0].after is not None, result.models[0].reason
        losses[compensate] = result.models[0].after["value"]
    assert losses["least_squares"] > losses["none"] + 0.2
