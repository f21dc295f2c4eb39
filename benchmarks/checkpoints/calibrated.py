"""Checkpoints whose layers are solved with what they read, block by block, beside llm-compressor's `oneshot`.

    python benchmarks/checkpoints/calibrated.py FOLDER [--parts quality memory] [--peer PYTHON]

FOLDER keeps models, text and results. PYTHON is the peer's interpreter
(peer_requirements.txt); without it only our side is measured. Every run is a process of its own, on one thread. Parts:

quality   Perplexity per byte of a trained model of 0.8 million parameters on 128 held-out sequences, at 4, 3 and 2 bits
          in groups of 32, symmetric; calibrated on 128 sequences of 128 bytes. Ours is measured by the run itself, the
          peer's by transformers on what it saved, and ours so once more: the numbers must be the same. CPU seconds are
          those of whole processes; ours include measuring the model twice.
memory    What a process takes at most, for random models of 4 and 16 blocks of 29 MB, with 16 sequences of 128 tokens:
          half of the weights zeroed by Wanda, then 4 bits, the same tasks as with GPTQ in less time.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import numpy as np
import torch
from language_model import random_model, trained
from markdown_table import table
from processes import Cost, measure

HERE = Path(__file__).resolve().parent
BITS = (4, 3, 2)
METHODS = ("round_to_nearest", "smallest_error", "gptq", "coordinate_descent")
GROUP, SAMPLES = 32, 128
SPEC = """\
version: 1
name: calibrated
output: {output}
models:
  - {{name: model, source: {source}, recipe: it, data: tokens}}
data:
  tokens: {{train: {folder}/{train}, {held_out}}}
recipes:
  it:
    calibrate: {{samples: {samples}, batch_size: 16}}
    quantize: {{num_bits: {bits}, symmetric: true, group_size: {group}, method: {method}}}
{more}resources: {{memory_per_task: 2GiB}}
"""
_ZEROES = '    prune: {method: wanda, pattern: "2:4"}\n'
_SINGLE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Print the tables of the parts that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("--parts", nargs="+", choices=("quality", "memory"), default=["quality", "memory"])
    parser.add_argument("--peer", type=Path)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    if "quality" in chosen.parts:
        quality(chosen.folder, chosen.peer)
    if "memory" in chosen.parts:
        memory(chosen.folder)


def quality(folder: Path, peer: Path | None) -> None:
    """Perplexity by method and bits, and what the runs cost."""
    source = trained(folder)
    known = folder / "quality.json"
    found: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    for bits in BITS:
        for method in METHODS:
            if f"{method} {bits}" not in found:
                output = folder / f"ours-{method}-{bits}"
                cost = ours(folder, source, output, bits=bits, method=method)
                metrics, artifact = published(output)
                found["before"] = metrics["before"]["value"]
                found[f"{method} {bits}"] = {
                    "perplexity": metrics["after"]["value"],
                    "error": metrics["after"]["drop"]["standard_error"],
                    "loaded": perplexity(folder, artifact),
                    "cpu": cost.cpu_seconds,
                }
                known.write_text(json.dumps(found, indent=1))
        if peer is not None and f"llm-compressor GPTQ {bits}" not in found:
            output = folder / f"peer-{bits}"
            cost = theirs(peer, folder, source, output, bits=bits)
            found[f"llm-compressor GPTQ {bits}"] = {
                "perplexity": perplexity(folder, output),
                "cpu": cost.cpu_seconds,
                "oneshot": cost.json()["oneshot"],
            }
            known.write_text(json.dumps(found, indent=1))
    print(f"perplexity before: {found['before']:.4f}\n")
    names = [*METHODS, *(["llm-compressor GPTQ"] if peer else [])]
    rows = [[f"`{name}`", *(_cell(found[f"{name} {bits}"]) for bits in BITS)] for name in names]
    table(("method", *(f"{bits} bits" for bits in BITS)), rows)
    print()
    rows = [[f"`{name}`", *(_cpu(found[f"{name} {bits}"]) for bits in BITS)] for name in names]
    table(("CPU seconds of the process", *(f"{bits} bits" for bits in BITS)), rows)


def memory(folder: Path) -> None:
    """The peak of a run as the model grows."""
    tokens = torch.randint(0, 8192, (16, 128), generator=torch.Generator().manual_seed(0))
    np.savez(folder / "random.npz", input_ids=tokens.numpy())
    rows = []
    for layers in (4, 16):
        source = random_model(folder, layers)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        output = folder / f"random-{layers}-ours"
        shutil.rmtree(output, ignore_errors=True)  # records in it are believed
        cost = ours(
            folder, source, output, bits=4, method="round_to_nearest", train="random.npz", more=_ZEROES
        )
        rows.append(
            (
                f"{layers}",
                f"{size / 1e6:.0f} MB",
                f"{cost.memory_bytes / 1e6:.0f} MB",
                f"{cost.cpu_seconds:.0f} s",
            )
        )
    table(("blocks", "model", "memory at most", "CPU"), rows)


def ours(
    folder: Path,
    source: Path,
    output: Path,
    *,
    bits: int,
    method: str,
    train: str = "train.npz",
    more: str = "    validate: {max_drop: 100000.0}\n",
) -> Cost:
    """A whole run of fleetpress, inline; `more` are steps of the recipe."""
    held_out = f"eval: {folder}/eval.npz" if "validate" in more else "metric: perplexity"
    text = SPEC.format(
        output=output,
        source=source,
        folder=folder,
        train=train,
        held_out=held_out,
        more=more,
        samples=SAMPLES,
        bits=bits,
        group=GROUP,
        method=method,
    )
    place = folder / "spec.yaml"
    place.write_text(text)
    command = [Path(sys.executable).with_name("fleetpress"), "run", place, "--executor", "inline"]
    return measure(command, _SINGLE)


def theirs(
    peer: Path,
    folder: Path,
    source: Path,
    output: Path,
    *,
    bits: int,
) -> Cost:
    """A whole run of the peer."""
    words = [source, output, folder / "train.npz", bits, GROUP, SAMPLES]
    return measure([peer, HERE / "calibrated_peer.py", *map(str, words)], _SINGLE)


def published(output: Path) -> tuple[dict[str, Any], Path]:
    """Metrics and place of the one artifact of an output."""
    pointer = json.loads((output / "models/model/latest.json").read_text())
    place = output / "models/model" / pointer["digest"]
    return json.loads((place / "metrics.json").read_text()), place


def perplexity(folder: Path, model: Path) -> float:
    """What transformers makes of a folder: exp of the mean loss of a byte, on the held-out sequences."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.load(folder / "eval.npz")["input_ids"])
    losses = []
    with torch.no_grad():
        for batch in ids.split(32):
            scores = loaded(batch).logits[:, :-1].flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(scores, batch[:, 1:].flatten(), reduction="none"))
    return math.exp(float(torch.cat(losses).double().mean()))


def _cell(entry: dict[str, Any]) -> str:
    value = entry["perplexity"]
    assert abs(entry.get("loaded", value) - value) < 1e-3 * value, entry
    return f"{value:.4f}"


def _cpu(entry: dict[str, Any]) -> str:
    return f"{entry['cpu']:.1f}" + (f", oneshot {entry['oneshot']:.1f}" if "oneshot" in entry else "")


if __name__ == "__main__":
    main()
