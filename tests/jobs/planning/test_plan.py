"""Plans: which tasks in which order, and digests that cover what can change a result and nothing else."""

from dataclasses import replace
from typing import Any

import pytest

from fleetpress.jobs.planning import plan_builder as planning
from fleetpress.jobs.planning.fleet import (
    Data,
    Model,
    Shard,
)
from fleetpress.jobs.planning.plan import (
    ModelPlan,
    artifact_digest,
    plan_program,
)
from fleetpress.jobs.planning.plan_builder import shard_names
from fleetpress.jobs.spec.recipe import Recipe
from fleetpress.storage.sources import ModelSource, SourceFile

RECIPE = {
    "train": {"epochs": 1},
    "prune": {"method": "gradient_stability", "sparsity": 0.5},
    "finetune": {"epochs": 1},
    "quantize": {"scheme": "W4A16"},
}


def model(
    recipe: dict[str, Any] | None = None, *, place: str = "/a", etag: str = "e", loss: str | None = "mse"
) -> Model:
    shards = tuple(
        Shard(root=place, file=SourceFile(path=f"train-{i}.npz", etag=f"d{i}", bytes=100)) for i in range(3)
    )
    held_out = Shard(root=place, file=SourceFile(path="test.npz", etag="t", bytes=50))
    return Model(
        name="net",
        source=ModelSource(
            name="net",
            kind="program",
            uri=f"{place}/net.pt2",
            root=place,
            files=(SourceFile(path="net.pt2", etag=etag, bytes=1000),),
        ),
        recipe=Recipe.model_validate(recipe or RECIPE),
        data=Data(name="data", train=shards, eval=(held_out,), loss=loss, metric=None),
    )


def planned(of: Model, **changes: Any) -> ModelPlan:
    options = {
        "output": "/out",
        "run": "r",
        "seed": 0,
        "workers": 1,
        "memory_bytes": 1 << 30,
        "gradients": True,
    }
    return plan_program(of, **{**options, **changes})


def digests(plan: ModelPlan) -> list[str]:
    return [task.digest for task in plan.tasks]


def test_tasks_are_a_chain_in_the_order_of_the_recipe() -> None:
    tasks = planned(model()).tasks
    assert [task.kind for task in tasks] == ["train", "prune", "finetune", "quantize", "publish"]
    assert [task.needs for task in tasks] == [(), *((task.id,) for task in tasks[:-1])]


def test_statistics_are_collected_apart_when_training_gives_none() -> None:
    assert "collect" in [task.kind for task in planned(model(loss=None)).tasks]
    assert "collect" not in [task.kind for task in planned(model()).tasks]
    assert "collect" not in [task.kind for task in planned(model(loss=None), gradients=False).tasks]


def test_digests_do_not_know_places_runs_and_outputs() -> None:
    there = planned(model(place="s3://bucket/x"), output="s3://other/out", run="later", memory_bytes=1 << 20)
    assert digests(there) == digests(planned(model()))


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        (model(etag="other"), []),
        (model({**RECIPE, "prune": {"method": "gradient_stability", "sparsity": 0.4}}), ["train"]),
        (model({**RECIPE, "prune": {"sparsity": 0.5, "structure": "head"}}), ["train"]),
        (model({**RECIPE, "prune": {"sparsity": 0.5, "structure": "recurrent"}}), []),
        (model({**RECIPE, "quantize": {"scheme": "W8A16"}}), ["train", "prune", "finetune"]),
        (model({**RECIPE, "validate": {"max_drop": 0.5}}), ["train", "prune", "finetune", "quantize"]),
    ],
    ids=["source", "sparsity", "structure", "hidden-units", "scheme", "max_drop"],
)
def test_a_change_is_a_change_from_its_step_on(changed: Model, same: list[str]) -> None:
    before, after = planned(model()).tasks, planned(changed).tasks
    assert [old.kind for old, new in zip(before, after, strict=True) if old.digest == new.digest] == same


def test_seed_and_training_workers_are_part_of_what_they_change() -> None:
    base = digests(planned(model()))
    assert not set(base) & set(digests(planned(model(), seed=1)))
    assert not set(base) & set(digests(planned(model(), workers=2)))
    untrained = model({"quantize": {"scheme": "W4A16"}})
    assert digests(planned(untrained)) == digests(planned(untrained, workers=2))


def test_the_last_task_is_named_by_the_artifact() -> None:
    plan = planned(model())
    assert plan.tasks[-1].digest == plan.digest == artifact_digest(model(), seed=0, workers=1)


def test_chunks_and_groups_follow_the_bytes_and_not_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "CHUNK_BYTES", 200)
    monkeypatch.setattr(planning, "GROUP_BYTES", 400)
    tasks = planned(model(loss=None)).tasks
    assert [task.id for task in tasks if task.kind == "collect"] == ["net/collect[0]", "net/collect[1]"]
    assert [task.id for task in tasks if task.kind == "quantize"] == [f"net/quantize[{i}]" for i in range(3)]
    prune = next(task for task in tasks if task.kind == "prune")
    assert prune.needs == ("net/collect[0]", "net/collect[1]")


def test_more_eval_data_is_another_artifact_from_the_same_steps() -> None:
    base = model()
    assert base.data is not None
    more = replace(base, data=replace(base.data, eval=base.data.train[:1]))
    before, after = digests(planned(base)), digests(planned(more))
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]


def test_runs_of_names_stay_below_the_limit_where_they_can() -> None:
    assert shard_names({"a": 4, "b": 4, "c": 9, "d": 1}, 8) == [["a", "b"], ["c"], ["d"]]
    assert shard_names({}, 8) == [[]]


def test_a_gpu_is_part_of_what_it_computes_and_its_share_is_not() -> None:
    plain, gpu = planned(model()), planned(model(), gpus=1.0)
    assert not set(digests(plain)) & set(digests(gpu))
    assert digests(gpu) == digests(planned(model(), gpus=0.25))
    assert {task.kind: task.gpus for task in gpu.tasks} == {
        "train": 1.0,
        "prune": 0.0,
        "finetune": 1.0,
        "quantize": 0.0,
        "publish": 0.0,
    }
    assert gpu.digest == artifact_digest(model(), seed=0, workers=1, gpus=1.0)
    collected = planned(model(loss=None), gpus=0.5).tasks
    assert {task.gpus for task in collected if task.kind == "collect"} == {0.5}
    untrained = model({"quantize": {"scheme": "W4A16"}})
    assert digests(planned(untrained, gradients=False)) == digests(
        planned(untrained, gradients=False, gpus=1.0)
    )


ROUNDS = {
    **RECIPE,
    "prune": {"method": "wanda_structured", "sparsity": 0.5, "schedule": "iterative", "rounds": 3},
    "finetune": {"epochs": 4},
    "calibrate": {"samples": 8},
}


def test_rounds_repeat_the_steps_from_statistics_to_tuning() -> None:
    tasks = planned(model(ROUNDS), gradients=False).tasks
    assert [task.id.removeprefix("net/") for task in tasks] == [
        "train",
        *("observe[0]", "prune[0]", "finetune[0]"),
        *("observe[1]", "prune[1]", "finetune[1]"),
        *("observe[2]", "prune[2]", "finetune[2]"),
        *("quantize", "publish"),
    ]
    assert [task.needs for task in tasks] == [(), *((task.id,) for task in tasks[:-1])]
    assert len(set(digests(planned(model(ROUNDS), gradients=False)))) == len(tasks)
    tuning = [task for task in tasks if task.kind == "finetune"]
    assert [task.payload["options"]["epochs"] for task in tuning] == [1, 1, 2]
    assert [task.payload["seed"] for task in tuning] == [0, 1, 2]
    by_id = {task.id: task for task in tasks}
    done = [
        [by_id[f"net/prune[{index}]"].digest, by_id[f"net/finetune[{index}]"].digest] for index in range(2)
    ]
    stages = by_id["net/prune[2]"].payload["stages"]
    assert stages["rounds"] == done
    assert stages["observe"] == [by_id["net/observe[2]"].digest]
    assert "prune" not in stages
    assert by_id["net/publish"].payload["stages"]["rounds"] == done


def test_gradients_are_collected_anew_in_every_round_but_the_first_after_training() -> None:
    recipe = {**ROUNDS, "prune": {**ROUNDS["prune"], "method": "taylor"}}
    tasks = planned(model(recipe)).tasks
    collecting = [task for task in tasks if task.kind == "collect"]
    assert [task.id for task in collecting] == ["net/collect[1]", "net/collect[2]"]
    assert all(task.payload["products"] for task in tasks if task.kind in ("train", "collect"))
    several = planned(model({**recipe, "collect": {}, "train": {}}, loss=None), workers=1)
    assert next(task.id for task in several.tasks if task.kind == "collect") == "net/collect[0]"


def test_a_change_of_sparsity_keeps_what_was_observed() -> None:
    other = {**ROUNDS, "prune": {**ROUNDS["prune"], "sparsity": 0.6}}
    before, after = (planned(model(recipe), gradients=False).tasks for recipe in (ROUNDS, other))
    same = [old.id for old, new in zip(before, after, strict=True) if old.digest == new.digest]
    assert same == ["net/train", "net/observe[0]"]


def test_chunks_of_a_round_are_numbered_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "CHUNK_BYTES", 200)
    tasks = planned(model(ROUNDS), gradients=False).tasks
    labels = [task.id.removeprefix("net/") for task in tasks if task.kind == "calibrate"]
    assert labels == [f"observe[{round_}.{chunk}]" for round_ in range(3) for chunk in range(2)]


def test_newer_options_at_their_defaults_leave_digests_alone() -> None:
    spelled = {**RECIPE, "prune": {**RECIPE["prune"], "compensate": "none", "schedule": "one_shot"}}
    assert digests(planned(model(spelled))) == digests(planned(model()))
    assert set(model(spelled).recipe.canonical()["prune"]) == {"method", "sparsity", "scope"}


def test_compensation_observes_before_pruning_and_quantization_calibrates_afterwards() -> None:
    prune = {"method": "magnitude", "sparsity": 0.5, "compensate": "least_squares"}
    recipe = {"prune": prune, "calibrate": {}, "quantize": {"scheme": "W4A16"}}
    tasks = planned(model(recipe), gradients=False, inputs=True).tasks
    assert [task.id.removeprefix("net/") for task in tasks] == [
        "observe",
        "prune",
        "calibrate",
        "quantize",
        "publish",
    ]
    assert tasks[0].digest != tasks[2].digest


def test_gradients_and_inputs_are_collected_side_by_side() -> None:
    def plan(**collect: int) -> dict[str, Any]:
        prune = {"method": "fisher", "sparsity": 0.5, "compensate": "least_squares"}
        recipe = {"collect": collect, "prune": prune, "calibrate": {"samples": 64}}
        return {task.id.removeprefix("net/"): task for task in planned(model(recipe)).tasks}

    tasks, other = plan(batch_size=64), plan(batch_size=32)
    assert list(tasks) == ["collect", "observe", "prune", "publish"]
    assert tasks["collect"].needs == tasks["observe"].needs == ()
    assert tasks["prune"].needs == ("net/collect", "net/observe")
    assert set(tasks["prune"].payload["stages"]) == {"collect", "observe"}
    changed = [name for name in tasks if tasks[name].digest != other[name].digest]
    assert changed == ["collect", "prune", "publish"]


@pytest.mark.parametrize(
    ("quantize", "kinds"),
    [
        ({"scheme": "W4A16", "method": "gptq"}, ["calibrate", "finetune", "quantize", "publish"]),
        # What integer kernels read is quantized, too: its range is that after training.
        ({"scheme": "W8A8"}, ["finetune", "calibrate", "quantize", "publish"]),
    ],
)
def test_codes_are_calibrated_before_they_are_trained(quantize: dict[str, str], kinds: list[str]) -> None:
    recipe = {
        "finetune": {"epochs": 1, "quantization_aware": True},
        "calibrate": {"samples": 64},
        "quantize": quantize,
    }
    tasks = planned(model(recipe), gradients=False, inputs=True).tasks
    assert [task.kind for task in tasks] == kinds
    rounds = {"prune": ROUNDS["prune"], **recipe, "finetune": {"epochs": 3, "quantization_aware": True}}
    kinds_then = [task.kind for task in planned(model(rounds), gradients=False, inputs=True).tasks]
    assert kinds_then[-4:] == kinds


def test_weights_are_zeroed_after_their_inputs_were_observed() -> None:
    recipe = {
        "prune": {"method": "wanda", "pattern": "2:4"},
        "finetune": {"epochs": 1},
        "calibrate": {"samples": 64},
        "quantize": {"scheme": "W4A16"},
    }
    tasks = planned(model(recipe), gradients=False).tasks
    assert [(task.kind, task.id) for task in tasks[:2]] == [
        ("calibrate", "net/observe"),
        ("prune", "net/prune"),
    ]
    assert [task.kind for task in tasks[2:]] == ["finetune", "quantize", "publish"]
    assert tasks[1].payload["stages"] == {"observe": [tasks[0].digest]}
    free = planned(model({**recipe, "prune": {"method": "magnitude_n_m", "pattern": "2:4"}}), gradients=False)
    assert [task.kind for task in free.tasks] == ["prune", "finetune", "quantize", "publish"]


def test_moments_of_single_weights_are_collected_before_weights_are_zeroed_by_them() -> None:
    recipe = {"prune": {"method": "fisher_unstructured", "sparsity": 0.5}, "collect": {"batch_size": 1}}
    tasks = planned(model(recipe)).tasks
    assert [task.kind for task in tasks] == ["collect", "prune", "publish"]
    assert tasks[0].payload["weights"] is True
    assert "products" not in tasks[0].payload
    trained = planned(model({**recipe, "train": {}})).tasks
    assert [task.kind for task in trained] == ["train", "collect", "prune", "publish"]
    assert "weights" not in trained[0].payload
    kept = {"method": "gradient_stability_unstructured", "sparsity": 0.5}
    alone = planned(model({"train": {}, "prune": kept})).tasks
    assert [task.kind for task in alone] == ["train", "prune", "publish"]
    assert alone[0].payload["weights"] is True
