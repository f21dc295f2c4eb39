"""Codebooks and integer kernels in a spec: what they mean, what they need, and the mistakes in them."""

import subprocess
import sys

import pytest

from fleetpress.compression.scheme import QuantScheme, resolve
from fleetpress.jobs.errors import SpecError
from fleetpress.jobs.spec.fleet_spec import parse_spec
from fleetpress.jobs.spec.recipe import Recipe
from fleetpress.jobs.spec.schemes import scheme_label, scheme_of


def spec(quantize: str, *, data: bool = True) -> str:
    named = ", data: d" if data else ""
    return (
        f"version: 1\nname: nightly\noutput: out\nmodels: [{{source: m.pt2, recipe: r{named}}}]\n"
        f"data: {{d: {{train: x.npz}}}}\nrecipes:\n  r: {{quantize: {{{quantize}}}}}\n"
    )


def recipe(quantize: str) -> Recipe:
    return parse_spec(spec(quantize), "spec.yaml").recipes["r"]


LEARNED = {"type": "codebook", "codebook": "learned"}


@pytest.mark.parametrize(
    ("quantize", "scheme", "label"),
    [
        ("scheme: nf4", resolve("NF4"), "4 bits nf4 g64"),
        ("scheme: NF4, group_size: 16", resolve("NF4", group_size=16), "4 bits nf4 g16"),
        ("scheme: MXFP4, group_size: 32", resolve("MXFP4"), "4 bits mxfp4 g32"),
        ("scheme: BINARY, strategy: tensor", resolve("BINARY", strategy="tensor"), "1 bits binary tensor"),
        ("scheme: TERNARY", resolve("TERNARY"), "2 bits ternary channel"),
        ("scheme: FP8", resolve("FP8"), "8 bits float channel"),
        ("scheme: W8A8", QuantScheme(num_bits=8, activation_bits=8), "8 bits channel, inputs 8 bits"),
        (
            "num_bits: 1, method: K_Means",
            QuantScheme(num_bits=1, strategy="tensor", **LEARNED),  # type: ignore[arg-type]
            "1 bits learned",
        ),
        (
            "num_bits: 3, method: weighted_k_means, group_size: null",
            QuantScheme(num_bits=3, **LEARNED),  # type: ignore[arg-type]
            "3 bits learned channel",
        ),
    ],
)
def test_what_a_step_means(quantize: str, scheme: QuantScheme, label: str) -> None:
    found = recipe(quantize)
    assert Recipe.model_validate(found.canonical()) == found
    assert scheme_of(found.canonical()["quantize"]) == scheme
    assert scheme_label(scheme) == label


@pytest.mark.parametrize(
    ("quantize", "calibrates"),
    [
        ("scheme: W8A8", True),
        ("scheme: W8A16, layers: {head: {scheme: W8A8}}", True),
        ("num_bits: 4, method: weighted_k_means", True),
        ("num_bits: 4, method: k_means", False),
        ("scheme: NF4", False),
    ],
)
def test_what_reads_inputs_calibrates(quantize: str, calibrates: bool) -> None:
    assert (recipe(quantize).calibrate is not None) == calibrates
    if calibrates:
        with pytest.raises(
            SpecError, match=r"models\[0\]\.data: is missing; recipe `r` needs it for quantize by"
        ):
            parse_spec(spec(quantize, data=False), "spec.yaml")


def test_fixed_codebooks_are_read_without_torch() -> None:
    code = (
        "import sys\nfrom fleetpress.jobs.spec.fleet_spec import parse_spec\n"
        "parse_spec(sys.argv[1], 'spec.yaml')\nprint('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, spec("scheme: NF4")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("quantize", "problem"),
    [
        (
            "scheme: W4A16, method: k_means",
            "quantize.scheme: W4A16 has codes of its own, and k_means learns a codebook; give num_bits instead",
        ),
        (
            "method: k_means",
            "quantize: does not say how many bits; add a scheme such as W4A16, or num_bits",
        ),
        (
            "num_bits: 4, method: k_means, symmetric: false",
            "quantize.symmetric: false contradicts k_means: codebooks have no zero points; delete it",
        ),
        (
            "scheme: NF4, method: gptq",
            "quantize.method: gptq makes integer codes; NF4 takes round_to_nearest or smallest_error",
        ),
        (
            "scheme: NF4, num_bits: 3",
            "quantize.num_bits: 3 contradicts scheme NF4, which means 4; delete one of them",
        ),
        (
            "scheme: MXFP4, group_size: 64",
            "quantize.group_size: 64 contradicts MXFP4, whose groups are 32 weights; delete it",
        ),
        (
            "scheme: MXFP4, strategy: tensor",
            "quantize.strategy: tensor contradicts MXFP4, whose groups are 32 weights; delete it",
        ),
        (
            "scheme: TERNARY, format: int-quantized",
            "quantize.format: int-quantized is a layout of checkpoints, which hold no codebooks; delete it",
        ),
        (
            "num_bits: 1",
            "quantize.num_bits: 1 is for codebooks; take scheme BINARY, method k_means, or 2 to 8",
        ),
        (
            "num_bits: 0",
            "quantize.num_bits: should be greater than or equal to 1, not 0",
        ),
        (
            "scheme: W8A8, group_size: 64",
            "quantize.group_size: W8A8 has one scale per channel, as integer kernels take it; delete it",
        ),
        (
            "scheme: W8A8, symmetric: false",
            "quantize.symmetric: false contradicts scheme W8A8; take the scheme with _ASYM, or num_bits without scheme",
        ),
        (
            "scheme: W8A16, method: gptq, layers: {head: {scheme: NF4}}",
            "quantize.layers.head: gptq makes integer codes, not codebooks; take method round_to_nearest",
        ),
        (
            "scheme: W8A16, layers: {head: {scheme: MXFP4, group_size: 16}}",
            "quantize.layers.head: MXFP4 shares an exponent among 32 weights; leave group_size and strategy out",
        ),
    ],
)
def test_mistake(quantize: str, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(spec(quantize), "spec.yaml")
    lines = [line for line in str(caught.value).splitlines() if "recipes.r." in line]
    assert [line.partition("recipes.r.")[2] for line in lines] == [problem]


def test_an_archive_has_no_integer_kernels() -> None:
    text = spec("scheme: W8A8").replace("{quantize", "{format: archive, quantize")
    with pytest.raises(SpecError, match=r"recipes\.r\.format: archive \w+ .*integer kernels"):
        parse_spec(text, "spec.yaml")
    assert parse_spec(text.replace("W8A8", "NF4"), "spec.yaml")
