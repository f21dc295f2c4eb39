"""The tasks that run a checkpoint: planned from names and shapes, the same ones under any memory and any gate."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fleetpress.jobs.checkpoint.samples import chunks_of, quota_of
from fleetpress.jobs.driver.run import plan_model
from fleetpress.jobs.errors import ModelError
from fleetpress.jobs.planning.fleet import resolve
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.jobs.tasks import Task


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two blocks with a head, and files that stand for its data: a plan reads neither."""
    folder = tmp_path_factory.mktemp("planned")
    (folder / "model").mkdir()
    shapes = {"model.embed_tokens.weight": (40, 32), "lm_head.weight": (40, 32)}
    for block in range(2):
        shapes |= {f"model.layers.{block}.mlp.{name}.weight": (64, 32) for name in ("gate_proj", "up_proj")}
        shapes |= {f"model.layers.{block}.norm.weight": (32,)}
    save_file(
        {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        folder / "model" / "model.safetensors",
    )
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name in ("a.npz", "b.npz", "held-out.npz"):
        (folder / name).write_bytes(name.encode())
    return folder


def tasks(
    place: Path,
    *,
    calibrate: str = "samples: 5, batch_size: 2",
    quantize: str = "num_bits: 4, group_size: 32, method: gptq",
    data: str = "",
    gate: str = "1%",
    memory: str = "1GiB",
) -> dict[str, Task]:
    spec = parse_spec(
        f"version: 1\nname: planned\noutput: {place}/output\n"
        f"models: [{{source: {place}/model, recipe: it, data: tokens}}]\n"
        f'data: {{tokens: {{train: ["{place}/a.npz", "{place}/b.npz"], eval: "{place}/held-out.npz"{data}}}}}\n'
        f"recipes: {{it: {{calibrate: {{{calibrate}}}, quantize: {{{quantize}}}, validate: {{max_drop: {gate}}}}}}}\n"
        f"resources: {{memory_per_task: {memory}}}\n",
        "spec.yaml",
    )
    (model,) = resolve(spec).models
    planned = plan_model(model, spec, "run").tasks
    return {task.id.removeprefix("model/"): task for task in planned}


def test_each_block_is_passed_observed_and_solved(place: Path) -> None:
    found = tasks(place)
    assert list(found) == [
        *(f"advance[0.{chunk}]" for chunk in range(3)),
        "solve[0.0]",
        *(f"advance[1.{chunk}]" for chunk in range(3)),
        "solve[1.0]",
        "convert[0]",
        *(f"score[before.{chunk}]" for chunk in range(3)),
        *(f"score[after.{chunk}]" for chunk in range(3)),
        "assemble",
    ]
    needs = {name: {need.removeprefix("model/") for need in task.needs} for name, task in found.items()}
    assert needs["solve[0.0]"] == {f"advance[0.{chunk}]" for chunk in range(3)}
    assert needs["advance[1.2]"] == {"advance[0.2]", "solve[0.0]"}
    assert needs["score[after.0]"] == {"convert[0]"}
    assert needs["score[before.0]"] == set()
    assert needs["convert[0]"] == {"solve[0.0]", "solve[1.0]"}
    assert needs["assemble"] == {"convert[0]", *(name for name in found if name.startswith("score"))}


def test_digests_follow_what_changes_the_result_and_nothing_else(place: Path) -> None:
    def digests(**changed: str) -> dict[str, str]:
        return {name: task.digest for name, task in tasks(place, **changed).items()}

    before = digests()
    assert digests(memory="3GiB") == before
    looser = digests(gate="50%")
    assert {name for name in before if looser[name] != before[name]} == {"convert[0]", "assemble"}
    for changed in (
        digests(quantize="num_bits: 3, group_size: 32, method: gptq"),
        digests(calibrate="samples: 6, batch_size: 2"),
    ):
        assert not set(changed.values()) & set(before.values())


def test_a_layer_outside_of_the_blocks_is_told(place: Path) -> None:
    found = tasks(place, quantize="num_bits: 4, group_size: 32, method: gptq, targets: [lm_head, Linear]")
    methods = {fields["method"] for fields in found["convert[0]"].payload["treatments"]}
    assert methods == {"round_to_nearest", "gptq", "smallest_error"}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"memory": "300MiB"}, r"block 0 \(model.layers.0\) needs \d+ bytes of memory"),
        (
            {"data": ", metric: accuracy"},
            "measured by perplexity or token_accuracy of its own tokens, not by accuracy",
        ),
        ({"data": ", loss: cross_entropy"}, "not by cross_entropy"),
        (
            {"memory": "300MiB", "quantize": "scheme: W8A16"},
            r"(lm_head|model.embed_tokens).weight needs \d+ bytes of memory to be run on the eval data",
        ),
    ],
)
def test_what_cannot_be_run_is_told_by_the_plan(place: Path, changed: dict[str, str], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        tasks(place, **changed)


def test_chunks_depend_on_the_recipe_alone() -> None:
    shards = [{"path": "a"}, {"path": "b"}, {"path": "c"}]
    assert quota_of(shards, 10) == 4
    places = [
        [(shard["path"], first, last) for shard, first, last in chunk] for chunk in chunks_of(shards, 10, 5)
    ]
    assert places == [[("a", 0, 4), ("b", 0, 1)], [("b", 1, 4), ("c", 0, 2)], [("c", 2, 4)]]
