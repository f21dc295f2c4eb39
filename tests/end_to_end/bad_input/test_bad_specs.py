"""Specs that are wrong: everything is told at once, with line, path and remedy, and nothing is begun."""

from pathlib import Path
from typing import Any

import pytest

WRONG = """\
version: 2
name: a b
output: {place}/out
models:
  - {{source: "{place}/in/good.pt2", data: digits, recipe: smal}}
  - {{source: "{place}/in/good.pt2", data: digits, recipe: small, colour: red}}
data:
  digits: {{train: "{place}/data/train.npz", eval: "{place}/data/train.npz", loss: crossentropy}}
recipes:
  small:
    train: {{epochs: 0, batchsize: 64, lr: fast}}
    prune: {{method: gradient_stabilty, sparsity: 1.5}}
    quantise: {{scheme: W4A16}}
    validate: {{max_drop: -1}}
  nothing: {{}}
resources: {{memory_per_task: 2 parsecs}}
"""
TOLD = (
    ":1: version:",
    ":2: name: `a b` cannot be a name",
    ":5: models[0].recipe: there is no recipe `smal`; did you mean `small`?",
    ":6: models[1].colour: unknown key; valid here:",
    ":8: data.digits.eval:",
    "unknown loss `crossentropy`; did you mean `cross_entropy`?",
    ":11: recipes.small.train.epochs: should be greater than or equal to 1",
    "recipes.small.train.batchsize: unknown key; did you mean `batch_size`?",
    "recipes.small.train.lr: should be a number, not 'fast'",
    ":12: recipes.small.prune.method: unknown pruning method `gradient_stabilty`; did you mean `gradient_stability`?",
    "recipes.small.prune.sparsity: should be less than 1",
    ":13: recipes.small.quantise: unknown key; did you mean `quantize`?",
    ":14: recipes.small.validate.max_drop: should be a number from 0",
    ":15: recipes.nothing: changes nothing",
    ":16: resources.memory_per_task: unknown unit `parsecs`",
)

UNREADABLE = {
    "tabs": (b"version: 1\n\tname: x\n", (":2:", "tab")),
    "unclosed": (b"version: 1\nmodels: [\n", ("spec.yaml:", "expected")),
    "two_keys": (b"version: 1\nversion: 1\n", (":2:", "version", "twice")),
    "a_list": (b"- 1\n", ("mapping",)),
    "nothing": (b"", ("empty",)),
    "binary": (b"\x80\x81", ("not UTF-8", "save the file as UTF-8")),
    "code": (b"name: !!python/object/apply:os.system [touch ran]\n", (":1:", "python")),
    "bomb": (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", ("spec.yaml:",)),
}


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_everything_is_told_at_once(verb: str, tmp_path: Path, cli: Any) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(WRONG.format(place=tmp_path))
    outcome = cli(verb, str(spec))
    assert outcome.code == 2
    assert outcome.out == ""
    for words in TOLD:
        assert words in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_spec_is_told_with_its_line(name: str, tmp_path: Path, cli: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    content, says = UNREADABLE[name]
    (tmp_path / "spec.yaml").write_bytes(content)
    outcome = cli("run", str(tmp_path / "spec.yaml"), "--executor", "inline")
    assert outcome.code == 2
    for words in says:
        assert words in outcome.err
    assert not (tmp_path / "ran").exists()


MISSING = {
    "data": (
        {"models": [{"recipe": "train"}]},
        ("models[1].data: is missing", "needs it for train", "plain"),
    ),
    "train": (
        {"models": [{"recipe": "train", "data": "seen"}], "data": {"seen": {"eval": "x.npz"}}},
        ("data.seen.train: is missing", "needs it for train"),
    ),
    "eval": (
        {"models": [{"recipe": "pack", "data": "blind"}], "data": {"blind": {"train": "x.npz"}}},
        ("data.blind.eval: is missing", "needs it for validate"),
    ),
    "shards": (
        {"models": [{"recipe": "pack", "data": "bare"}], "data": {"bare": {"loss": "mse"}}},
        ("data.bare: names no files; add train, eval or both",),
    ),
    "gradients": (
        {"models": [{"recipe": "gradients"}]},
        ("models[1].data: is missing", "prune by gradient_stability"),
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_steps_without_their_data(name: str, tmp_path: Path, write_fleet: Any, cli: Any) -> None:
    parts, says = MISSING[name]
    models = [{"source": f"{tmp_path}/in/good.pt2", **model} for model in parts["models"]]
    outcome = cli("run", write_fleet(tmp_path, tmp_path, models=models, data=parts.get("data")))
    assert outcome.code == 2
    for words in says:
        assert words in outcome.err
    assert not (tmp_path / "out").exists()
