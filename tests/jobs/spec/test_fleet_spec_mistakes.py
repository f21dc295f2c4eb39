"""The mistakes people make in a spec: each is told with its line, its path, what is wrong and what to write instead."""

import pytest

from fleetpress.jobs.errors import SpecError
from fleetpress.jobs.spec.fleet_spec import parse_spec

GOOD = """\
version: 1
name: nightly
output: s3://compressed/nightly
models:
  - {name: lenet5, source: s3://models/lenet5/model.pt2, data: mnist, recipe: small}
  - source: "s3://models/llm/*/"
    recipe: w4
data:
  mnist:
    train: s3://data/mnist/train-*.npz
    eval: s3://data/mnist/test.npz
    loss: cross_entropy
    metric: accuracy
recipes:
  small:
    train: {epochs: 2, batch_size: 64, optimizer: adamw, lr: 1.0e-3}
    prune: {method: gradient_stability, sparsity: 0.5, scope: layer}
    finetune: {lr: 3.0e-4}
    quantize: {scheme: W4A16}
    validate: {max_drop: 0.01}
  w4:
    quantize: {scheme: W4A16, ignore: [lm_head]}
resources: {memory_per_task: 2GiB}
seed: 0
"""

MISTAKES = [
    # the whole
    (
        "version: 1",
        "version: 2",
        "1: version: should be 1, not 2; the spec is for a newer fleetpress: install that, or write version: 1",
    ),
    ("version: 1", 'version: "1"', "1: version: should be 1, not '1'; write it without quotes"),
    ("version: 1\n", "", "1: version: is missing; add `version: 1`"),
    ("seed: 0", "sead: 0", "24: sead: unknown key; did you mean `seed`?"),
    ("seed: 0", "seed: -1", "24: seed: should be greater than or equal to 0, not -1"),
    ("seed: 0", "seed: yes", "24: seed: should be a whole number, not 'yes'"),
    ("name: nightly", "name: 7", "2: name: should be text, not 7; write it in quotes"),
    (
        "name: nightly",
        "name: a/b",
        "2: name: `a/b` cannot be a name; use letters, digits, `.`, `_` and `-`, a letter or digit first, at most 100",
    ),
    ("name: nightly", "name: nightly\nname: daily", "3: name: written twice, first on line 2; keep one"),
    (
        "s3://compressed/nightly",
        "s3://out/*",
        "3: output: the output is one place, not a pattern; delete the `*`",
    ),
    (
        "s3://compressed/nightly",
        "s3:/out",
        "3: output: 's3:/out' is no place to read or write: write s3://out",
    ),
    ("s3://compressed/nightly", "~/out", "3: output: `~` is not expanded here; write the whole path"),
    (
        "s3://compressed/nightly",
        "gs://out/x",
        "3: output: 'gs://out/x' is no place to read or write: use s3://bucket/prefix, file:///folder or a path",
    ),
    # models
    (
        "recipe: small}",
        "recipe: smal}",
        "5: models[0].recipe: there is no recipe `smal`; did you mean `small`?",
    ),
    ("recipe: w4", "recipe: xx", "7: models[1].recipe: there is no recipe `xx`; valid here: small, w4"),
    (
        "data: mnist, ",
        "data: minst, ",
        "5: models[0].data: there is no data set `minst`; did you mean `mnist`?",
    ),
    ("    recipe: w4", "    recipie: w4", "6: models[1].recipe: is missing; add it"),
    ("    recipe: w4", "    recipie: w4", "7: models[1].recipie: unknown key; did you mean `recipe`?"),
    (
        "    recipe: w4",
        "    recipe: w4\n    name: lenet5",
        "8: models[1].name: `lenet5` is also the name of models[0]; rename one",
    ),
    (
        "data: mnist, ",
        "",
        "5: models[0].data: is missing; recipe `small` needs it for train, finetune; add one of: mnist",
    ),
    (
        "    recipe: w4",
        "    recipe: w4\n  - lenet",
        "8: models[2]: should be a mapping of keys to values, not 'lenet'",
    ),
    (
        "    recipe: w4",
        "    recipe: w4\n    factory: nets.py",
        "8: models[1].factory: `nets.py` is not a factory; write package.module:callable",
    ),
    (
        "    recipe: w4",
        "    recipe: w4\n    inputs: {x: {shape: [1, 28]}}",
        "8: models[1].inputs: only a model with a factory needs inputs; delete it, or add factory",
    ),
    (
        "    recipe: w4",
        "    recipe: w4\n    factory: a:b\n    inputs: {x: {shape: [B, 28]}}",
        "9: models[1].inputs.x.shape[0]: should be a whole number from 1, or the word batch, not 'B'",
    ),
    # data
    (
        "cross_entropy",
        "crossentropy",
        "12: data.mnist.loss: unknown loss `crossentropy`; did you mean `cross_entropy`?",
    ),
    (
        "metric: accuracy",
        "metric: acuracy",
        "13: data.mnist.metric: unknown metric `acuracy`; did you mean `accuracy`?",
    ),
    (
        "    train: s3://data/mnist/train-*.npz\n",
        "",
        "9: data.mnist.train: is missing; recipe `small` needs it for train, finetune",
    ),
    (
        "    eval: s3://data/mnist/test.npz\n",
        "",
        "9: data.mnist.eval: is missing; recipe `small` needs it for validate",
    ),
    (
        "eval: s3://data/mnist/test.npz",
        "eval: [s3://data/x.npz, s3://data/mnist/train-*.npz]",
        "11: data.mnist.eval: `s3://data/mnist/train-*.npz` is also train data; "
        "evaluate on data that was not trained on",
    ),
    (
        "    loss: cross_entropy",
        "    train: x",
        "12: data.mnist.train: written twice, first on line 10; keep one",
    ),
    ("seed: 0", "seed: 0\nrecipes: {}", "25: recipes: written twice, first on line 14; keep one"),
    (
        "  mnist:\n",
        "  more: {metric: mse}\n  mnist:\n",
        "9: data.more: names no files; add train, eval or both",
    ),
    # steps
    (
        "    finetune: ",
        "    fine_tune: ",
        "18: recipes.small.fine_tune: unknown key; did you mean `finetune`?",
    ),
    (
        "finetune: {lr: 3.0e-4}",
        "finetune:",
        "18: recipes.small.finetune: is empty; write {} for the defaults, or delete the key",
    ),
    ("epochs: 2", "epochs: 0", "16: recipes.small.train.epochs: should be greater than or equal to 1, not 0"),
    (
        "epochs: 2",
        "epochs: 2.0",
        "16: recipes.small.train.epochs: should be a whole number, not 2.0; write 2",
    ),
    (
        "batch_size: 64",
        "batchsize: 64",
        "16: recipes.small.train.batchsize: unknown key; did you mean `batch_size`?",
    ),
    ("adamw", "admw", "16: recipes.small.train.optimizer: unknown optimizer `admw`; did you mean `adamw`?"),
    ("lr: 1.0e-3", "lr: -1", "16: recipes.small.train.lr: should be greater than 0, not -1"),
    (
        "lr: 1.0e-3",
        'lr: "1e-3"',
        "16: recipes.small.train.lr: should be a number, not '1e-3'; write it without quotes",
    ),
    ("lr: 1.0e-3", "lr: .inf", "16: recipes.small.train.lr: should be a finite number, not inf"),
    (
        "epochs: 2",
        "momentum: 0.9",
        "16: recipes.small.train.momentum: has no meaning for adamw; delete it, or take optimizer: sgd",
    ),
    (
        "    quantize: {scheme: W4A16, ignore: [lm_head]}",
        "    validate: {}",
        "21: recipes.w4: changes nothing; add at least one of train, auto, prune, finetune, quantize",
    ),
    # prune
    (
        "gradient_stability",
        "gradient_stabilty",
        "17: recipes.small.prune.method: unknown pruning method `gradient_stabilty`; "
        "did you mean `gradient_stability`?",
    ),
    (
        "sparsity: 0.5",
        "sparcity: 0.5",
        "17: recipes.small.prune.sparcity: unknown key; did you mean `sparsity`?",
    ),
    ("sparsity: 0.5", "sparsity: 50", "17: recipes.small.prune.sparsity: should be less than 1, not 50"),
    (
        "sparsity: 0.5",
        "sparsity: 50%",
        "17: recipes.small.prune.sparsity: should be a number, not '50%'; write 0.5 for 50%",
    ),
    ("sparsity: 0.5", "sparsity: true", "17: recipes.small.prune.sparsity: should be a number, not true"),
    (
        "sparsity: 0.5, ",
        "",
        "17: recipes.small.prune: does not say how much; add sparsity, or mean_threshold and std_threshold",
    ),
    (
        "sparsity: 0.5",
        "sparsity: 0.5, std_threshold: 1",
        "17: recipes.small.prune.sparsity: excludes std_threshold; keep one way to say how much to prune",
    ),
    (
        "sparsity: 0.5",
        "mean_threshold: 1e-3",
        "17: recipes.small.prune.mean_threshold: needs std_threshold beside it; a unit goes when both are small",
    ),
    (
        "gradient_stability, sparsity: 0.5",
        "magnitude, mean_threshold: 1",
        "17: recipes.small.prune.mean_threshold: is about gradients, which magnitude does not use; give sparsity",
    ),
    (
        "sparsity: 0.5",
        "mean_threshold: 0",
        "17: recipes.small.prune.mean_threshold: should be greater than 0, not 0",
    ),
    (
        "scope: layer",
        "scope: layers",
        "17: recipes.small.prune.scope: should be layer or global, not 'layers'; did you mean `layer`?",
    ),
    # quantize
    (
        "quantize: {scheme: W4A16}",
        "quantize: {scheme: W4A61}",
        "19: recipes.small.quantize.scheme: unknown scheme `W4A61`; did you mean `W4A16`?",
    ),
    (
        "quantize: {scheme: W4A16}",
        "quantize: {}",
        "19: recipes.small.quantize: does not say how many bits; add a scheme such as W4A16, or num_bits",
    ),
    (
        "quantize: {scheme: W4A16}",
        "quantize: {scheme: W4A16, num_bits: 3}",
        "19: recipes.small.quantize.num_bits: 3 contradicts scheme W4A16, which means 4; delete one of them",
    ),
    (
        "quantize: {scheme: W4A16}",
        "quantize: {scheme: W4A16, symmetric: false}",
        "19: recipes.small.quantize.symmetric: false contradicts scheme W4A16; take the scheme with _ASYM, "
        "or num_bits without scheme",
    ),
    (
        "quantize: {scheme: W4A16}",
        "quantize: {num_bits: 9}",
        "19: recipes.small.quantize.num_bits: should be less than or equal to 8, not 9",
    ),
    (
        "quantize: {scheme: W4A16}",
        "quantize: {num_bits: 4, group_size: 32, strategy: channel}",
        "19: recipes.small.quantize.group_size: excludes strategy channel; delete one of them",
    ),
    (
        "quantize: {scheme: W4A16}",
        "quantize: {num_bits: 4, strategy: group, group_size: null}",
        "19: recipes.small.quantize.group_size: null means one scale per channel, not strategy group; "
        "delete one of them",
    ),
    (
        "quantize: {scheme: W4A16}",
        "quantize: {num_bits: 4, symmetric: yes}",
        "19: recipes.small.quantize.symmetric: should be true or false, not 'yes'; write true",
    ),
    (
        "[lm_head]",
        "[lm_head, 're:layers.(']",
        "22: recipes.w4.quantize.ignore[1]: `re:layers.(` is not a regular expression: missing ), unterminated "
        "subpattern at position 7",
    ),
    (
        "[lm_head]",
        "'*.mlp.*'",
        "22: recipes.w4.quantize.ignore: `*.mlp.*` is neither a name nor a kind; "
        "for a pattern write `re:.*\\.mlp\\..*`",
    ),
    ("[lm_head]", "[3]", "22: recipes.w4.quantize.ignore[0]: should be text, not 3; write it in quotes"),
    ("[lm_head]", "{lm_head: true}", "22: recipes.w4.quantize.ignore: should be a list, not a mapping"),
    # validate, resources
    (
        "max_drop: 0.01",
        "max_drop: -1%",
        "20: recipes.small.validate.max_drop: should be a number from 0 (absolute) or a percentage such as 1% "
        "(relative), not '-1%'",
    ),
    ("2GiB", "2Gi", "23: resources.memory_per_task: unknown unit `Gi`; did you mean 2GiB?"),
    (
        "2GiB",
        "2",
        "23: resources.memory_per_task: 2 bytes is too little to work with; at least 1MiB, such as 2GiB",
    ),
    (
        "2GiB",
        "lots",
        "23: resources.memory_per_task: should be a size such as 2GiB, 512MiB or 1.5GB, not 'lots'",
    ),
    *(
        (
            "memory_per_task: 2GiB",
            f"time_per_task: {text}",
            f"23: resources.time_per_task: should be a time such as 6h, 90min or 45s, not {told}",
        )
        for text, told in (("6", "6"), ("6 parsecs", "'6 parsecs'"), ("0h", "'0h'"), ("-1h", "'-1h'"))
    ),
    ("memory_per_task: 2GiB", "worker: 2", "23: resources.worker: unknown key; did you mean `workers`?"),
    (
        "seed: 0",
        "seed: !!python/name:os.system 0",
        "24: seed: tag `tag:yaml.org,2002:python/name:os.system` has no meaning in a spec; delete it",
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "line"), MISTAKES, ids=[line.split(";")[0] for _, _, line in MISTAKES]
)
def test_mistake(old: str, new: str, line: str) -> None:
    assert old in GOOD
    with pytest.raises(SpecError) as caught:
        parse_spec(GOOD.replace(old, new, 1), "fleet.yaml")
    assert f"fleet.yaml:{line}" in str(caught.value).splitlines()


def test_the_spec_before_the_mistakes_is_good() -> None:
    assert len(parse_spec(GOOD, "fleet.yaml").models) == 2


def test_one_mistake_is_told_once() -> None:
    for old, new, line in MISTAKES:
        if line.partition(": ")[2].count("unknown ") and "key" not in line:
            with pytest.raises(SpecError) as caught:
                parse_spec(GOOD.replace(old, new, 1), "fleet.yaml")
            assert str(caught.value) == f"fleet.yaml:{line}"


def test_all_mistakes_at_once_in_the_order_of_the_file() -> None:
    changes = [
        ("name: nightly", "nam: nightly"),
        ("recipe: w4", "recipe: w5"),
        ("loss: cross_entropy", "loss: entropy_cross"),
        ("sparsity: 0.5", "sparsity: 1.5"),
        ("gradient_stability", "stability"),
        ("{scheme: W4A16}", "{scheme: W4A16, symmetric: false}"),
        ("2GiB", "two"),
    ]
    text = GOOD
    for old, new in changes:
        text = text.replace(old, new, 1)
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "fleet.yaml")
    places = [line.split(": ")[:2] for line in str(caught.value).splitlines()]
    assert places == [
        ["fleet.yaml:1", "name"],
        ["fleet.yaml:2", "nam"],
        ["fleet.yaml:7", "models[1].recipe"],
        ["fleet.yaml:12", "data.mnist.loss"],
        ["fleet.yaml:17", "recipes.small.prune.method"],
        ["fleet.yaml:17", "recipes.small.prune.sparsity"],
        ["fleet.yaml:19", "recipes.small.quantize.symmetric"],
        ["fleet.yaml:23", "resources.memory_per_task"],
    ]


def test_a_data_set_without_train_shards_is_told_once_per_recipe() -> None:
    models = "\n".join(
        f"  - {{source: models/{index}.pt2, data: mnist, recipe: small}}" for index in range(20)
    )
    text = GOOD.replace("    train: s3://data/mnist/train-*.npz\n", "").replace(
        "data:\n", f"{models}\ndata:\n", 1
    )
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "fleet.yaml")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["- 1\n", "just words\n", "3\n"], ids=["list", "text", "number"])
def test_a_spec_is_a_mapping(text: str) -> None:
    with pytest.raises(SpecError, match=r"^fleet\.yaml:1: should be a mapping of keys to values, not "):
        parse_spec(text, "fleet.yaml")
