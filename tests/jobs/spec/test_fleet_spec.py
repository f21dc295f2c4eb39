"""What a spec means: defaults, spellings, canonical recipes, where it is read from."""

import json
import re
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetpress.compression.metrics import within
from fleetpress.compression.pruning import PRUNERS
from fleetpress.compression.scheme import CASTS, SCHEMES
from fleetpress.jobs.errors import FleetpressError, SpecError, UsageError
from fleetpress.jobs.spec.fleet_spec import (
    Spec,
    load_spec,
    parse_spec,
)
from fleetpress.jobs.spec.recipe import (
    CollectStep,
    FinetuneStep,
    PruneStep,
    QuantizeStep,
    Recipe,
    TrainStep,
    ValidateStep,
    recipe_yaml,
)
from fleetpress.jobs.spec.yaml_lines import read_yaml, write_yaml
from fleetpress.storage.store import open_store

EXAMPLES = sorted(
    path
    for path in (Path(__file__).parents[3] / "examples").glob("*.yaml")
    if path.name != "schedules.yaml"  # tests/jobs/schedule/test_file.py reads that one
)

FLEET = (EXAMPLES[0].parent / "fleet.yaml").read_text()

SMALLEST = """\
version: 1
name: nightly
output: out
models:
  - {source: models/a.pt2, recipe: r}
recipes:
  r: {quantize: {scheme: W4A16}}
"""


def spec_with(recipe: str) -> Spec:
    """A spec whose one model has data and the given recipe."""
    return parse_spec(
        "version: 1\nname: nightly\noutput: out\n"
        "models: [{source: a.pt2, data: d, recipe: r}]\n"
        "data: {d: {train: t.npz, eval: e.npz}}\n"
        f"recipes:\n  r:\n{indent(recipe, '    ')}\n",
        "spec.yaml",
    )


def recipe(text: str) -> Recipe:
    return spec_with(text).recipes["r"]


def test_defaults() -> None:
    spec = parse_spec(SMALLEST, "spec.yaml")
    assert (spec.seed, spec.resources.workers, spec.resources.memory_per_task_bytes) == (0, 1, 2 * 2**30)
    (model,) = spec.models
    assert (model.name, model.data, model.factory) == (None, None, None)
    assert spec.recipes[model.recipe] == Recipe(
        quantize=QuantizeStep(scheme="W4A16"), validate=ValidateStep(max_drop=0.01)
    )


def test_steps_have_defaults() -> None:
    steps = recipe("{train: {}, collect: {}, finetune: {}, prune: {method: random, sparsity: 0.5}}")
    assert steps.train == TrainStep(epochs=1, batch_size=64, optimizer="adamw", lr=1e-3)
    assert steps.finetune == FinetuneStep(epochs=1, batch_size=64, optimizer="adamw", lr=1e-3)
    assert steps.collect == CollectStep(batch_size=64)
    assert steps.prune == PruneStep(method="random", sparsity=0.5, scope="layer", targets=(), ignore=())
    pruning = recipe("{prune: {sparsity: 0.5}}").prune
    assert pruning is not None
    assert pruning.method == "gradient_stability"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(path: Path) -> None:
    assert load_spec(str(path)).models


def test_there_are_examples() -> None:
    assert {"checkpoint.yaml", "fleet.yaml", "pruning.yaml"} <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1.0e-3", 0.001), ("2E2", 200.0), (".5e-1", 0.05), ("1", 1.0), ("+0.25", 0.25)],
)
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    train = recipe(f"{{train: {{lr: {text}}}}}").train
    assert train is not None
    assert train.lr == value


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("2GiB", 2**31), ("512MiB", 2**29), ("1.5GB", 1_500_000_000), ("2 gib", 2**31), ("1073741824", 2**30)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    spec = parse_spec(f"{SMALLEST}resources: {{memory_per_task: {text}}}\n", "spec.yaml")
    assert spec.resources.memory_per_task_bytes == size_bytes


@pytest.mark.parametrize(
    ("text", "max_drop"),
    [
        ("0.02", 0.02),
        ("0", 0.0),
        ("1%", "1%"),
        ('"2.50 %"', "2.5%"),
        ("0%", "0%"),
        (".5%", "0.5%"),
        ("10%", "10%"),
        ("0.000010%", "1e-05%"),
    ],
)
def test_max_drop_is_absolute_or_a_percentage(text: str, max_drop: float | str) -> None:
    step = recipe(f"{{train: {{}}, validate: {{max_drop: {text}}}}}").validation
    assert step == ValidateStep(max_drop=max_drop)
    assert type(step.max_drop) is type(max_drop)
    assert within("mse", 1.0, 1.0, step.max_drop)


def test_names_of_methods_are_read_in_any_case() -> None:
    steps = recipe("{prune: {method: Magnitude, sparsity: 0.5}, quantize: {scheme: w4a16_asym}}")
    assert steps.prune is not None
    assert steps.prune.method == "magnitude"
    assert steps.quantize is not None
    assert steps.quantize.scheme == "W4A16_ASYM"


def test_group_size_null_means_per_channel() -> None:
    null = recipe("{quantize: {num_bits: 4, group_size: null}}")
    assert null.quantize == QuantizeStep(num_bits=4, strategy="channel")
    assert null.canonical() == recipe("{quantize: {num_bits: 4, strategy: channel}}").canonical()
    assert null.canonical() != recipe("{quantize: {num_bits: 4}}").canonical()


def test_one_pattern_needs_no_list() -> None:
    spec = spec_with("{quantize: {num_bits: 4, targets: Linear, ignore: [lm_head, 're:.*gate']}}")
    quantize = spec.recipes["r"].quantize
    assert quantize is not None
    assert (quantize.targets, quantize.ignore) == (("Linear",), ("lm_head", "re:.*gate"))
    assert spec.data["d"].train == ("t.npz",)


def test_words_of_yaml_1_1_are_names() -> None:
    text = SMALLEST.replace("nightly", "no").replace("recipe: r", "recipe: on").replace("r: {q", "on: {q")
    spec = parse_spec(text, "spec.yaml")
    assert (spec.name, list(spec.recipes)) == ("no", ["on"])


def test_merge_keys_and_aliases() -> None:
    text = (
        SMALLEST
        + "  s:\n    <<: {quantize: &q {num_bits: 3}}\n    finetune: &t {lr: 1e-4}\n  t: {train: *t, quantize: *q}\n"
    )
    recipes = parse_spec(text, "spec.yaml").recipes
    assert recipes["s"].quantize == recipes["t"].quantize == QuantizeStep(num_bits=3)
    assert recipes["s"].finetune == FinetuneStep(lr=1e-4)
    assert recipes["t"].train == TrainStep(lr=1e-4)


def test_gradients_are_collected_once_if_nothing_else_gives_them() -> None:
    assert recipe("{prune: {method: gradient_stability, sparsity: 0.5}}").collect == CollectStep()
    assert recipe("{train: {}, prune: {method: gradient_stability, sparsity: 0.5}}").collect is None
    assert recipe("{prune: {method: magnitude, sparsity: 0.5}}").collect is None
    assert recipe("{prune: {method: magnitude_n_m, pattern: 2:4}}").collect is None


def test_two_spellings_have_one_canonical_form() -> None:
    short = recipe("{quantize: {scheme: w4a16}, train: {lr: 1}, prune: {method: random, sparsity: 5e-1}}")
    full = recipe(
        "{train: {momentum: 0, lr: 1.0, batch_size: 64, epochs: 1, optimizer: AdamW},"
        " prune: {scope: layer, sparsity: 0.5, method: random, targets: [], mean_threshold: null},"
        " quantize: {method: round_to_nearest, scheme: W4A16}, validate: {max_drop: 0.01}}"
    )
    assert short.canonical() == full.canonical()
    assert list(full.canonical()) == ["train", "prune", "quantize", "validate"]
    assert recipe("{train: {}, validate: {max_drop: 1%}}").canonical()["validate"] == {"max_drop": "1%"}
    assert recipe("{train: {}, validate: {max_drop: '1.0 %'}}").canonical()["validate"] == {"max_drop": "1%"}


def some(**options: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries({}, optional=options)


share = st.floats(min_value=1e-12, max_value=1, exclude_max=True)
words = st.sampled_from(
    ["Linear", "lm_head", "no", "1e5", "012", "null", "é", "a b", "re:[0-9]+: #x", "re:'\""]
)
patterns = st.lists(words, max_size=3)
trains = some(epochs=st.integers(1, 99), lr=share, weight_decay=st.floats(0, 1e9), optimizer=st.just("sgd"))
raw_recipes = st.fixed_dictionaries(
    {
        "quantize": st.fixed_dictionaries(
            {"scheme": st.sampled_from(sorted([*SCHEMES, *CASTS]))}, optional={"ignore": patterns}
        )
        | st.fixed_dictionaries(
            {"num_bits": st.integers(2, 8)},
            optional={"symmetric": st.booleans(), "group_size": st.integers(1, 512), "targets": patterns},
        )
    },
    optional={
        "train": trains,
        "finetune": trains,
        "collect": some(batch_size=st.integers(1, 512)),
        "prune": st.fixed_dictionaries(
            {"method": st.sampled_from(sorted(PRUNERS)), "sparsity": share},
            optional={
                "scope": st.sampled_from(["layer", "global"]),
                "targets": patterns,
                "structure": st.sampled_from(["head", ["recurrent", "channel"]]),
            },
        )
        | st.fixed_dictionaries(
            {"method": st.just("magnitude_n_m"), "pattern": st.sampled_from(["2:4", "1:32"])},
            optional={"ignore": patterns},
        )
        | st.fixed_dictionaries({"method": st.just("magnitude_unstructured"), "sparsity": share}),
        "validate": some(max_drop=st.floats(0, 100) | st.floats(0, 100).map(lambda share: f"{share:.4f}%")),
    },
)


@settings(max_examples=60, deadline=None)
@given(raw_recipes)
def test_a_stored_recipe_means_the_same_again(raw: dict[str, object]) -> None:
    steps = recipe(json.dumps(raw))
    stored = recipe_yaml(steps)
    assert recipe(stored) == steps
    assert yaml.safe_load(stored) == json.loads(json.dumps(steps.canonical()))


def test_spec_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ValidateStep().max_drop = 0.5


def test_spec_of_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALLEST.encode())
    assert load_spec(str(path)).name == "nightly"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "spec.yaml: cannot be read: No such file or directory; give the path of a YAML file"),
        (b"name: caf\xe9\n", "spec.yaml:1: not UTF-8 text; save the file as UTF-8"),
        (b"", "spec.yaml: the spec is empty; it needs version, name, output, models and recipes"),
    ],
    ids=["missing", "latin-1", "empty"],
)
def test_unreadable_files(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("spec.yaml").write_bytes(content)
    with pytest.raises(SpecError) as caught:
        load_spec("spec.yaml")
    assert str(caught.value) == message


def test_wrong_specs_are_wrong_usage() -> None:
    assert issubclass(SpecError, UsageError)
    assert issubclass(UsageError, FleetpressError)
    assert SpecError("x").exit_code == 2


def test_a_spec_may_lie_in_a_bucket(s3_uri: str) -> None:
    open_store(s3_uri).put("specs/nightly.yaml", SMALLEST.encode())
    assert load_spec(f"{s3_uri}/specs/nightly.yaml") == parse_spec(SMALLEST, "spec.yaml")
    with pytest.raises(SpecError, match=r"specs/daily\.yaml.*; give the path or uri of a YAML file"):
        load_spec(f"{s3_uri}/specs/daily.yaml")
    with pytest.raises(SpecError, match="bucket"):
        load_spec("s3://no_/x.yaml")


def places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inside for place in places(item, (*path, key)))]


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "re:(", "1%", "w4", "mnist", "é"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["train", "prune", "method", "quantize", "scheme", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(places(read_yaml(FLEET, "fleet.yaml").data)), junk)
def test_whatever_stands_in_a_spec_it_is_taken_or_refused_in_words(
    path: tuple[str | int, ...], value: object
) -> None:
    spec = {"spec": read_yaml(FLEET, "fleet.yaml").data}
    parent: Any = spec
    for word in ("spec", *path)[:-1]:
        parent = parent[word]
    parent[path[-1] if path else "spec"] = value
    text = write_yaml(spec["spec"])
    try:
        parse_spec(text, "fleet.yaml")
    except SpecError as error:
        lines = str(error).splitlines()
        assert all(re.match(r"fleet\.yaml(:\d+)?: \S", line) for line in lines), lines


@pytest.mark.parametrize(
    ("text", "seconds"), [("6h", 21_600), ("90min", 5400), ("1.5 h", 5400), ("2d", 172_800)]
)
def test_times(text: str, seconds: float) -> None:
    spec = parse_spec(f"{SMALLEST}resources: {{time_per_task: {text}}}\n", "spec.yaml")
    assert spec.resources.time_per_task_seconds == seconds
