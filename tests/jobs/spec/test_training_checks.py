"""Options of training steps that lack what they need are told, with the key; those that say nothing change nothing."""

import pytest

from fleetpress.jobs.errors import SpecError
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.jobs.spec.recipe import Recipe

SPEC = """\
version: 1
name: n
output: out
models: [{source: net.pt2, data: d, recipe: r}]
data: {d: {train: a.npz, eval: b.npz}}
recipes:
  r:
"""


def problems(*steps: str) -> list[str]:
    """What is wrong with a recipe, without its place."""
    try:
        parse_spec(SPEC + "".join(f"    {step}\n" for step in steps), "spec.yaml")
    except SpecError as error:
        return [line.partition("recipes.r.")[2] for line in str(error).splitlines() if "recipes.r." in line]
    return []


GRADUAL = "prune: {method: magnitude_unstructured, sparsity: 0.9, schedule: gradual"


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        ([f"{GRADUAL}, scope: global, ramp: 0.7}}", "finetune: {}"], []),
        (
            [f"{GRADUAL}}}"],
            ["prune.schedule: gradual lets zeros grow during finetune, which is no step here; add finetune"],
        ),
        (
            ["prune: {method: magnitude, sparsity: 0.9, schedule: gradual}", "finetune: {}"],
            [
                "prune.schedule: gradual has no meaning for magnitude; delete it, or take magnitude_unstructured",
            ],
        ),
        (
            ["prune: {method: magnitude, sparsity: 0.9, ramp: 0.5}", "finetune: {}"],
            ["prune.ramp: says how zeros grow; delete it, or add schedule: gradual"],
        ),
        (
            ["finetune: {quantization_aware: true}"],
            [
                "finetune.quantization_aware: trains for the codes of quantize, which is no step here; "
                "add quantize, or delete it"
            ],
        ),
        (
            ["finetune: {quantization_aware: true}", "quantize: {scheme: BF16}"],
            [
                "finetune.quantization_aware: trains for integer codes or a learned codebook, which BF16 does not "
                "have; take a scheme such as W4A16, or method k_means"
            ],
        ),
        (
            ["finetune: {quantization_aware: true}", "quantize: {scheme: TERNARY}"],
            [
                "finetune.quantization_aware: trains for integer codes or a learned codebook, which TERNARY does not "
                "have; take a scheme such as W4A16, or method k_means"
            ],
        ),
        (
            [
                "finetune: {quantization_aware: true}",
                "quantize: {num_bits: 3, method: k_means, bias_correction: true}",
            ],
            [
                "finetune.quantization_aware: trains for the codes as they are, which bias_correction would change "
                "after it; delete one of them"
            ],
        ),
        (
            ["finetune: {quantization_aware: true}", "quantize: {scheme: W4A16, equalize: cross_layer}"],
            [
                "finetune.quantization_aware: trains for the codes as they are, which equalize would change "
                "after it; delete one of them"
            ],
        ),
        (
            ["train: {distill_temperature: 4.0}"],
            [
                "train.distill_temperature: softens what distill compares; delete it, or add distill, such as 0.5"
            ],
        ),
        (
            ["train: {quantization_aware: true}"],
            ["train.quantization_aware: unknown key; valid here: "],
        ),
        (["train: {distill: 1.5}"], ["train.distill: should be less than or equal to 1, not 1.5"]),
    ],
)
def test_what_is_said(steps: list[str], wanted: list[str]) -> None:
    found = problems(*steps)
    assert len(found) == len(wanted)
    assert all(line.startswith(start) for line, start in zip(found, wanted, strict=True)), found


def test_what_means_nothing_leaves_the_recipe_as_it_was() -> None:
    plain = {"train": {}, "prune": {"sparsity": 0.5}, "finetune": {}, "quantize": {"num_bits": 4}}
    spelled = {
        "train": {"schedule": "constant", "distill": 0.0},
        "prune": {"sparsity": 0.5, "schedule": "one_shot"},
        "finetune": {"quantization_aware": False, "schedule": "constant"},
        "quantize": {"num_bits": 4},
    }
    canonical = Recipe.model_validate(plain).canonical()
    assert Recipe.model_validate(spelled).canonical() == canonical
    keys = {"epochs", "batch_size", "optimizer", "lr", "weight_decay", "momentum"}
    assert set(canonical["train"]) == set(canonical["finetune"]) == keys
    assert set(canonical["prune"]) == {"method", "sparsity", "scope"}


def test_defaults_are_written_into_the_recipe() -> None:
    steps = {
        "prune": {"method": "magnitude_unstructured", "sparsity": 0.9, "schedule": "gradual"},
        "finetune": {"distill": 0.5},
    }
    canonical = Recipe.model_validate(steps).canonical()
    assert canonical["prune"]["ramp"] == 0.5
    assert canonical["prune"]["interval"] == 32
    assert canonical["finetune"]["distill_temperature"] == 2.0
    assert Recipe.model_validate(canonical).canonical() == canonical
