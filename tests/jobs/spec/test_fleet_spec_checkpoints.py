"""Steps that only checkpoints have: zeroed weights, FP8, casts, layouts; what they mean, and the mistakes in them."""

import subprocess
import sys

import pytest

from fleetpress.jobs.errors import SpecError
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.jobs.spec.recipe import (
    PruneStep,
    QuantizeStep,
    Recipe,
)


def spec(steps: str) -> str:
    return (
        "version: 1\nname: nightly\noutput: out\nmodels: [{source: llm, recipe: r}]\n"
        f"recipes:\n  r: {{{steps}}}\n"
    )


def recipe(steps: str) -> Recipe:
    return parse_spec(spec(steps), "spec.yaml").recipes["r"]


def test_methods_that_zero() -> None:
    steps = recipe("prune: {method: Magnitude_N_M, pattern: 2:4, ignore: lm_head}")
    assert steps.prune == PruneStep(method="magnitude_n_m", pattern="2:4", ignore=("lm_head",))
    assert steps.collect is None
    steps = recipe("prune: {method: magnitude_unstructured, sparsity: 0.5, scope: layer}")
    assert steps.prune == PruneStep(method="magnitude_unstructured", sparsity=0.5)
    assert steps.canonical()["prune"] == {
        "method": "magnitude_unstructured",
        "sparsity": 0.5,
        "scope": "layer",
    }


def test_floats_casts_and_layouts() -> None:
    assert recipe("quantize: {scheme: fp8, strategy: tensor}").quantize == QuantizeStep(
        scheme="FP8", strategy="tensor"
    )
    assert recipe("quantize: {scheme: FP8, num_bits: 8, symmetric: true, group_size: null}").quantize
    assert recipe("quantize: {scheme: fp16}").canonical()["quantize"] == {
        "scheme": "FP16",
        "method": "round_to_nearest",
    }
    for bits in ("scheme: W8A16", "num_bits: 8, symmetric: false"):
        step = recipe(f"quantize: {{{bits}, format: int-quantized}}").quantize
        assert step is not None
        assert step.format == "int-quantized"
    assert recipe("quantize: {scheme: W4A16, format: pack-quantized}").canonical()["quantize"] == {
        "scheme": "W4A16",
        "method": "round_to_nearest",
        "format": "pack-quantized",
    }


def test_options_that_came_later_are_left_out_when_they_are_not_given() -> None:
    """Digests are made of canonical forms: what was published stays unchanged."""
    assert recipe("prune: {method: magnitude, sparsity: 0.5}, quantize: {scheme: W4A16}").canonical() == {
        "prune": {"method": "magnitude", "sparsity": 0.5, "scope": "layer"},
        "quantize": {"scheme": "W4A16", "method": "round_to_nearest"},
        "validate": {"max_drop": 0.01},
    }


@pytest.mark.parametrize(
    "steps",
    [
        "quantize: {scheme: W4A16, method: round_to_nearest}",
        "prune: {method: magnitude_n_m, pattern: 2:4}, quantize: {scheme: FP8}",
        "prune: {method: magnitude_unstructured, sparsity: 0.5}, quantize: {scheme: BF16}",
    ],
)
def test_they_are_read_without_torch(steps: str) -> None:
    code = (
        "import sys\nfrom fleetpress.jobs.spec.fleet_spec import parse_spec\n"
        "from fleetpress.jobs.spec.recipe import Recipe\n"
        "recipe = parse_spec(sys.argv[1], 'spec.yaml').recipes['r']\n"
        "assert Recipe.model_validate(recipe.canonical()) == recipe\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, spec(steps)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ("prune: {method: magnitude_n_m}", "prune: does not say how much; add pattern, such as 2:4"),
        (
            "prune: {method: magnitude_n_m, pattern: 4:2}",
            "prune.pattern: '4:2' is no pattern N:M with 1 <= N < M <= 32, such as 2:4",
        ),
        (
            "prune: {method: magnitude_n_m, pattern: 2:4, sparsity: 0.5}",
            "prune.sparsity: has no meaning for magnitude_n_m, which takes pattern; delete it",
        ),
        (
            "prune: {method: magnitude_n_m, pattern: 2:4, std_threshold: 1}",
            "prune.std_threshold: has no meaning for magnitude_n_m, which takes pattern; delete it",
        ),
        (
            "prune: {method: magnitude_n_m, pattern: 2:4, scope: global}",
            "prune.scope: global has no meaning for magnitude_n_m, which looks at every tensor alone; delete it",
        ),
        (
            "prune: {method: magnitude_n_m, pattern: 2:4, structure: head}",
            "prune.structure: has no meaning for magnitude_n_m, which zeroes weights and deletes no units; delete it",
        ),
        (
            "prune: {method: magnitude_unstructured, pattern: 2:4}",
            "prune: does not say how much; add sparsity, such as 0.5",
        ),
        (
            "prune: {method: magnitude_unstructured, sparsity: 0.5, pattern: 2:4}",
            "prune.pattern: has no meaning for magnitude_unstructured, which takes sparsity; delete it",
        ),
        (
            "prune: {method: wanda}",
            "prune: does not say how much; add sparsity, such as 0.5 or pattern, such as 2:4",
        ),
        (
            "prune: {method: sparsegpt, sparsity: 0.5, pattern: 2:4}",
            "prune.pattern: excludes sparsity; keep one way to say how much to zero",
        ),
        (
            "prune: {method: wanda, sparsity: 0.5, scope: global}",
            "prune.scope: global has no meaning for wanda, which looks at every tensor alone; delete it",
        ),
        (
            "prune: {method: magnitude, pattern: 2:4}",
            "prune.pattern: has no meaning for magnitude, which deletes whole units; delete it, or take magnitude_n_m",
        ),
        (
            "prune: {method: magnitude_nm, pattern: 2:4}",
            "prune.method: unknown pruning method `magnitude_nm`; did you mean `magnitude_n_m`?",
        ),
        ("quantize: {scheme: BF61}", "quantize.scheme: unknown scheme `BF61`; did you mean `BF16`?"),
        (
            "quantize: {scheme: BF16, num_bits: 8}",
            "quantize.num_bits: has no meaning for BF16, a plain cast without codes; delete it",
        ),
        (
            "quantize: {scheme: BF16, group_size: null}",
            "quantize.group_size: has no meaning for BF16, a plain cast without codes; delete it",
        ),
        (
            "quantize: {scheme: BF16, biases: FP8}",
            "quantize.biases: has no meaning for BF16, a plain cast without codes; delete it",
        ),
        (
            "quantize: {scheme: FP16, format: pack-quantized}",
            "quantize.format: has no meaning for FP16, a plain cast without codes; delete it",
        ),
        (
            "quantize: {scheme: FP16, method: smallest_error}",
            "quantize.method: smallest_error has no meaning for FP16, a plain cast; delete it",
        ),
        (
            "quantize: {scheme: FP8, num_bits: 4}",
            "quantize.num_bits: 4 contradicts scheme FP8, which means 8; delete one of them",
        ),
        (
            "quantize: {scheme: FP8, symmetric: false}",
            "quantize.symmetric: false contradicts scheme FP8, which has no zero points; delete it",
        ),
        (
            "quantize: {scheme: FP8, group_size: 64}",
            "quantize.group_size: FP8 has one scale per channel or tensor; delete it",
        ),
        (
            "quantize: {scheme: FP8, strategy: group}",
            "quantize.strategy: FP8 has one scale per channel or tensor; delete it",
        ),
        (
            "quantize: {scheme: FP8, method: smallest_error}",
            "quantize.method: smallest_error chooses ranges of integer codes; FP8 takes round_to_nearest; delete it",
        ),
        (
            "quantize: {scheme: FP8, format: int-quantized}",
            "quantize.format: int-quantized is for integer codes; FP8 has one format; delete it",
        ),
        (
            "quantize: {scheme: W4A16, format: int-quantized}",
            "quantize.format: int-quantized holds codes of 8 bits, not of 4; delete it, or take scheme W8A16",
        ),
        (
            "quantize: {num_bits: 8, format: int_quantized}",
            "quantize.format: should be pack-quantized or int-quantized, not 'int_quantized'; "
            "did you mean `int-quantized`?",
        ),
    ],
)
def test_mistake(steps: str, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(spec(steps), "spec.yaml")
    assert f"spec.yaml:6: recipes.r.{problem}" in str(caught.value).splitlines()
