"""The tasks that run a checkpoint: planned from names and shapes, the same ones under any memory and any gate."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fleetpress.compression.scheme import resolve as scheme
from fleetpress.compression.treatment import Treatment
from fleetpress.jobs.checkpoint.block_memory import BlockMemory, block_memory
from fleetpress.jobs.checkpoint.layout import item_at
from fleetpress.jobs.checkpoint.samples import SampleRange, chunks_of, quota_of, spans_of
from fleetpress.jobs.driver.run import plan_model
from fleetpress.jobs.errors import ModelError
from fleetpress.jobs.planning.fleet import resolve
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.jobs.tasks import Task
from fleetpress.storage.checkpoint import TensorLocation
from fleetpress.storage.safetensors_header import TensorInfo
from fleetpress.storage.sources import SourceFile


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


def test_many_chunks_are_few_tasks(place: Path) -> None:
    found = tasks(place, calibrate="samples: 100, batch_size: 1")
    for kind in ("advance[0.", "advance[1.", "score[before.", "score[after."):
        assert len([name for name in found if name.startswith(kind)]) == 8
    payloads = [found[f"advance[0.{span}]"].payload for span in range(8)]
    assert sum(len(payload["samples"]) for payload in payloads) == 100


@pytest.mark.parametrize("count", [1, 7, 8, 9, 23])
def test_spans_are_runs_of_chunks(count: int) -> None:
    chunks: list[list[SampleRange]] = [[({"path": "a"}, number, number + 1)] for number in range(count)]
    spans = spans_of(chunks)
    assert [chunk for span in spans for chunk in span] == chunks
    assert len(spans) == min(count, 8)
    assert max(map(len, spans)) - min(map(len, spans)) <= 1


def test_chunks_depend_on_the_recipe_alone() -> None:
    shards = [{"path": "a"}, {"path": "b"}, {"path": "c"}]
    assert quota_of(shards, 10) == 4
    places = [
        [(shard["path"], first, last) for shard, first, last in chunk] for chunk in chunks_of(shards, 10, 5)
    ]
    assert places == [[("a", 0, 4), ("b", 0, 1)], [("b", 1, 4), ("c", 0, 2)], [("c", 2, 4)]]


def wide(columns: int, rows: int = 64, method: str = "gptq") -> BlockMemory:
    """Of a block of one matrix."""
    info = TensorInfo(
        name="w", dtype="BF16", shape=(rows, columns), offset_bytes=0, size_bytes=2 * rows * columns
    )
    at = TensorLocation(file=SourceFile(path="f", etag="e", bytes=info.size_bytes), info=info)
    treatment = Treatment(scheme=scheme("W4A16"), method=method, calibrated=True)
    return block_memory([("b.0.down_proj.weight", at)], [item_at("b.0.down_proj.weight", at, treatment)])


def test_products_of_wide_inputs_are_accounted_for() -> None:
    before, after, blocks = wide(4096), wide(16384), wide(16385)
    whole = 4 * 16384**2
    assert after.solving - before.solving > 2 * (whole - 4 * 4096**2)  # the products, and a factor of them
    assert after.observing - before.observing < 1.7 * whole  # of the upper triangle, with copies to write it
    assert blocks.solving < after.solving / 3
    assert wide(4096, method="learned_rounding").solving > before.solving
    assert before.largest == "b.0.down_proj.weight"


def test_a_matrix_too_wide_to_solve_is_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file(
        {
            "model.embed_tokens.weight": torch.zeros(40, 32, dtype=torch.bfloat16),
            "model.layers.0.mlp.down_proj.weight": torch.zeros(32, 16384, dtype=torch.bfloat16),
        },
        tmp_path / "model" / "model.safetensors",
    )
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name in ("a.npz", "b.npz", "held-out.npz"):
        (tmp_path / name).write_bytes(name.encode())
    needed = wide(16384, 32)
    assert needed.observing < needed.solving
    with pytest.raises(ModelError, match=r"block 0 \(model.layers.0\) needs \d+ bytes of memory, weights"):
        tasks(tmp_path, memory=str(needed.observing - 1))
    with pytest.raises(ModelError, match=r"down_proj.weight needs \d+ bytes of memory to be solved"):
        tasks(tmp_path, memory=str(needed.solving - 1))
    assert "solve[0.0]" in tasks(tmp_path, memory=str(needed.solving))
