"""What is printed into a pipe, to the letter; what a terminal gets besides."""

import io
import re
import sys
from typing import Any

import pytest

from fleetpress.jobs.doctor import Finding
from fleetpress.jobs.methods import described
from fleetpress.jobs.runs.results import FleetResult, ModelResult
from fleetpress.jobs.tables import print_findings, print_methods, print_preview, print_published, print_result


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _model(name: str, state: Any = "published", metric: str = "accuracy", **more: Any) -> ModelResult:
    before = {"metric": metric, "value": 0.9912, "parameters": 61_706, "macs": 416_520, "bytes": 252_416}
    after = {"metric": metric, "value": 0.9896, "parameters": 20_132, "macs": 120_300, "bytes": 20_733}
    return ModelResult(name=name, state=state, before=before, after=after, compression_ratio=12.1746, **more)


REASON = "accuracy went from 0.9912 to 0.9896, more than max_drop 0.001 allows; prune less or train longer"
MODELS = (
    _model("lenet5"),
    _model("a-rather-long-name-of-a-model", "rejected", reason=REASON),
    ModelResult(
        name="broken", state="failed", reason="model.pt2 is no zip archive:\n\x1b[31mexport it again"
    ),
)
RESULT = FleetResult(run="r1", state="done", name="nightly", output="out", models=MODELS, seconds=12.34)


def test_result(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(RESULT)
    assert (
        capsys.readouterr().out
        == f"""\
nightly: done, run r1, 12.3 s
model                          state              accuracy      parameters          MACs           bytes  ratio
lenet5                         published  0.9912 -> 0.9896  61.7k -> 20.1k  417k -> 120k  252 -> 20.7 kB  12.2x
a-rather-long-name-of-a-model  rejected   0.9912 -> 0.9896  61.7k -> 20.1k  417k -> 120k  252 -> 20.7 kB  12.2x
broken                         failed                    -               -             -               -      -

rejected a-rather-long-name-of-a-model: {REASON}
failed broken: model.pt2 is no zip archive: ?[31mexport it again
1 published, 1 rejected, 1 failed; 252 kB -> 20.7 kB (12.2x)
"""
    )


def test_metrics_are_named_where_they_differ(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(
        FleetResult(
            run="r", state="done", name="n", output="o", models=(_model("a"), _model("b", metric="r2"))
        )
    )
    out = capsys.readouterr().out
    assert "accuracy 0.9912 -> 0.9896" in out
    assert "r2 0.9912 -> 0.9896" in out


def test_a_run_without_models_yet(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(FleetResult(run="r", state="running", name="n", output="o", models=()))
    assert capsys.readouterr().out == "n: running, run r, 0.0 s\nno models yet\n"


def test_a_running_fleet_has_no_total(capsys: pytest.CaptureFixture[str]) -> None:
    models = (ModelResult(name="a", state="running"), ModelResult(name="b", state="pending"))
    print_result(FleetResult(run="r", state="running", name="n", output="o", models=models))
    assert capsys.readouterr().out.splitlines()[-1] == "1 running, 1 pending"


def _on_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> str:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_result(RESULT)
    return screen.getvalue()


def test_a_terminal_of_100_columns_folds_names_not_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = re.sub(r"\x1b\[[\d;]*m", "", _on_terminal(monkeypatch, 100)).splitlines()
    table = lines[1 : lines.index("")]
    assert max(map(len, table)) <= 100
    numbers = "0.9912 -> 0.9896  61.7k -> 20.1k  417k -> 120k  252 -> 20.7 kB  12.2x"
    assert sum(numbers in line for line in table) == 2
    assert "".join(line.split("  ")[0] for line in table[2:4]) == "a-rather-long-name-of-a-model"
    assert any(REASON in line for line in lines), "reasons stay on one line"


def test_a_table_too_long_to_look_at_is_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "40")
    models = tuple(_model(f"model-{index:04}") for index in range(501))
    print_result(FleetResult(run="r", state="done", name="n", output="o", models=models))
    lines = [line for line in screen.getvalue().splitlines() if line.startswith("model-")]
    assert len(lines) == 501
    assert lines[0].endswith("252 -> 20.7 kB  12.2x")


def test_wide_characters_take_two_columns(capsys: pytest.CaptureFixture[str]) -> None:
    models = (_model("模型"), _model("abcd"))
    print_result(FleetResult(run="r", state="done", name="n", output="o", models=models))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].index("published") + 2 == lines[3].index("published")


def test_states_have_colours_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _on_terminal(monkeypatch, 200)
    assert "\x1b[32mpublished" in text
    assert "\x1b[31mfailed" in text


def test_published(capsys: pytest.CaptureFixture[str]) -> None:
    lenet = _model("lenet5")
    shared = {"run": "r1", "format": "pt2", "compression_ratio": 12.1746}
    numbers = {"before": lenet.before, "after": lenet.after, "bits_per_weight": 4.3125}
    minilm = {"before": {"metric": None, "bytes": 90_868_376}, "after": {"metric": None, "bytes": 17_011_008}}
    print_published(
        [
            {"name": "lenet5", "kind": "program", "digest": "ab12", **shared, **numbers},
            {
                "name": "minilm",
                "kind": "checkpoint",
                "digest": "cd34",
                **shared,
                **minilm,
                "bits_per_weight": None,
            },
        ]
    )
    assert (
        capsys.readouterr().out
        == """\
model   kind                           metric            bytes  ratio  bits/weight  digest
lenet5  program     accuracy 0.9912 -> 0.9896   252 -> 20.7 kB  12.2x         4.31  ab12
minilm  checkpoint                          -  90.9 -> 17.0 MB  12.2x            -  cd34
"""
    )


def test_nothing_published(capsys: pytest.CaptureFixture[str]) -> None:
    print_published([])
    assert capsys.readouterr().out == "no models are published here\n"


PREVIEW: dict[str, Any] = {
    "models": [
        {
            "name": "lenet5",
            "kind": "program",
            "state": "planned",
            "tasks": 5,
            "source_bytes": 252_416,
            "read_bytes": 12_252_416,
            "quantized_bytes": 20_000,
            "layers": [
                {
                    "name": "conv1",
                    "kind": "Conv2d",
                    "prune": "3 of 6 units",
                    "quantize": "4 bits g128",
                    "skipped": None,
                },
                {
                    "name": "fc",
                    "kind": "Linear",
                    "prune": None,
                    "quantize": None,
                    "skipped": "prune: its units are outputs",
                },
            ],
            "warnings": ["ignore 'lm_head' matches no layer"],
        },
        {
            "name": "old",
            "kind": "checkpoint",
            "state": "unchanged",
            "tasks": 0,
            "source_bytes": 1_000_000,
            "read_bytes": 0,
            "quantized_bytes": None,
            "layers": [],
        },
    ],
    "problems": [{"model": "broken", "reason": "no such file"}],
}
PREVIEW_TEXT = """\
model   kind        state      tasks  layers   source  to read  quantized
lenet5  program     planned        5  1 of 2   252 kB  12.3 MB    20.0 kB
old     checkpoint  unchanged      0       -  1.00 MB      0 B          -

lenet5
  layer  kind    prune         quantize     skipped
  conv1  Conv2d  3 of 6 units  4 bits g128  -
  fc     Linear  -             -            prune: its units are outputs
  warning: ignore 'lm_head' matches no layer

problem broken: no such file
"""


class _Preview:
    def as_dict(self) -> dict[str, Any]:
        return PREVIEW


@pytest.mark.parametrize("preview", [PREVIEW, _Preview()], ids=["mapping", "object"])
def test_preview(preview: Any, capsys: pytest.CaptureFixture[str]) -> None:
    print_preview(preview)
    assert capsys.readouterr().out == PREVIEW_TEXT


def test_preview_of_a_checkpoint_tells_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    forecast = {
        "shards": ({"path": "model.safetensors", "bytes": 5_000_000},),
        "read_bytes": 20_000_000,
        "source_ranges": 3,
        "written_bytes": 5_000_000,
        "uploads": 1,
        "memory_bytes": 190_000_000,
    }
    print_preview({"models": [{**PREVIEW["models"][0], "forecast": forecast}], "problems": []})
    told = "reads 20.0 MB in 3 ranges, writes 5.00 MB in 1 part of 1 file; 190 MB of memory a task"
    assert f"  {told}" in capsys.readouterr().out.splitlines()


def test_preview_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_preview({"models": [], "problems": []})
    assert capsys.readouterr().out == "no models\n"


def test_every_method_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    found = described()
    print_methods(found)
    lines = capsys.readouterr().out.splitlines()
    words = [line.split() for line in lines]
    for table, entries in found.items():
        assert table in lines
        for entry in entries:
            assert any(line.startswith(f"  {entry['name']} ") for line in lines), entry["name"]
    assert ["W4A16", "int", "4", "true", "group", "128", "4.125"] in words


def test_one_method_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    print_methods(described("magnitude"))
    out = capsys.readouterr().out
    assert out.startswith("magnitude (pruning)\n  needs gradients: false\n")
    assert "arXiv:1608.08710" in out
    words = [" ".join(line.split()) for line in out.splitlines()]
    assert "scope layer layer: the share of every layer; global: of all units together" in words


def test_findings(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [
        Finding(name="ray", ok=True, detail="2.50.0"),
        Finding(name="s3://b", ok=False, detail="no such bucket: " + "x" * 300),
    ]
    print_findings(findings)
    assert capsys.readouterr().out == f"ok ray: 2.50.0\nproblem s3://b: no such bucket: {'x' * 300}\n"
