"""Data that is damaged, does not fit, or is not there: the models that need it fail, and say which file and array."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fleetpress.jobs.demo import npz_bytes
from fleetpress.storage.programs import module_to_program, save_program

Arrays = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Bad:
    """Files of a data set by name (train*.* and test.*), the recipe they are used for, and what the reason says."""

    files: dict[str, bytes | Callable[[Arrays], bytes]]
    says: tuple[str, ...]
    recipe: str = "pack"
    loss: str | None = None
    model: str = "good.pt2"


def arrays(**changed: Tensor | None) -> Callable[[Arrays], bytes]:
    """The good samples with some arrays replaced, or left out."""

    def make(samples: Arrays) -> bytes:
        new = {**samples, **changed}
        return npz_bytes({name: value for name, value in new.items() if value is not None})

    return make


def objects() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, inputs=np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


good = arrays()
half = arrays(inputs=ones(8, 4), targets=torch.zeros(8, dtype=torch.long))
NAN_TO_TRAIN = {"train.npz": arrays(inputs=ones(64, 4) * float("nan")), "test.npz": half}

CASES: dict[str, Bad] = {
    "wide": Bad(files={"test.npz": arrays(inputs=ones(64, 5))}, says=("'input'", "(64, 5)", "(samples, 4)")),
    "deep": Bad(files={"test.npz": arrays(inputs=ones(64, 4, 1))}, says=("(64, 4, 1)", "reshape")),
    "misnamed": Bad(
        files={"test.npz": arrays(inputs=None, pixels=ones(64, 4))},
        says=("'pixels'", "name the arrays 'inputs'"),
    ),
    "uneven": Bad(
        files={"test.npz": arrays(targets=torch.zeros(60, dtype=torch.long))},
        says=("test.npz", "'inputs': 64", "'targets': 60"),
    ),
    "labels": Bad(
        files={"test.npz": arrays(targets=torch.full((64,), 7))}, says=("from 7 to 7", "3 classes", "0 to 2")
    ),
    "train_labels": Bad(
        files={"train.npz": arrays(targets=torch.full((64,), -3)), "test.npz": half},
        says=("from -3 to -3", "0 to 2"),
        recipe="train",
    ),
    "float_labels": Bad(
        files={"test.npz": arrays(targets=ones(64))}, says=("float32", "int64"), loss="cross_entropy"
    ),
    "no_targets": Bad(
        files={"test.npz": arrays(targets=None)}, says=("'targets'", "['inputs']"), loss="cross_entropy"
    ),
    "complex": Bad(
        files={"test.npz": arrays(inputs=torch.ones(64, 4, dtype=torch.complex64))},
        says=("complex64", "float32"),
    ),
    "float_tokens": Bad(
        files={"test.npz": arrays(inputs=ones(64, 4))}, says=("float32", "int64"), model="tokens.pt2"
    ),
    "foreign_tokens": Bad(
        files={"test.npz": arrays(inputs=torch.full((64, 4), 99))},
        says=("out of range", "tokens"),
        model="tokens.pt2",
    ),
    "too_long": Bad(
        files={"test.npz": arrays(inputs=ones(64, 9, 4))},
        says=("(64, 9, 4)", "2 to 6 in dimension 1"),
        model="sequence.pt2",
    ),
    "scalar": Bad(files={"test.npz": arrays(inputs=torch.tensor(1.0))}, says=("'inputs'", "single number")),
    "no_samples": Bad(
        files={"test.npz": arrays(inputs=ones(0, 4), targets=torch.zeros(0, dtype=torch.long))},
        says=("no sample",),
    ),
    "no_bytes": Bad(files={"test.npz": b""}, says=("test.npz is empty", "again")),
    "torn_npz": Bad(
        files={"test.npz": lambda samples: good(samples)[:-40]}, says=("test.npz", "no intact .npz")
    ),
    "text_npz": Bad(files={"test.npz": b"inputs"}, says=("test.npz", "no intact .npz")),
    "torn_parquet": Bad(files={"test.parquet": b"PAR1" + bytes(40)}, says=("test.parquet",)),
    "torn_safetensors": Bad(files={"test.safetensors": b"\xff" * 40}, says=("test.safetensors", "header")),
    "objects": Bad(files={"test.npz": objects()}, says=("Python objects", "unpickled")),
    "csv": Bad(files={"test.csv": b"1,2"}, says=("test.csv", ".npz, .safetensors, .parquet")),
    "nowhere": Bad(files={}, says=("matches no data", "nowhere/test*")),
    "shards_apart": Bad(
        files={"train-0.npz": good, "train-1.npz": arrays(targets=None), "test.npz": half},
        says=("train-1.npz", "'targets'", "alike"),
        recipe="train",
    ),
    "shards_of_other_shapes": Bad(
        files={"train-0.npz": good, "train-1.npz": arrays(inputs=ones(64, 6)), "test.npz": half},
        says=("train-1.npz", "(6,)", "alike"),
        recipe="train",
    ),
    "copied": Bad(
        files={"train.npz": good, "test.npz": good},
        says=("test.npz of eval is train.npz of train", "not trained on"),
    ),
    "nan_eval": Bad(
        files={"test.npz": arrays(inputs=ones(64, 4) * float("nan"), targets=ones(64, 3))},
        says=("mse", "not a number", "eval data"),
        loss="mse",
    ),
    "nan_train": Bad(
        files=NAN_TO_TRAIN,
        says=("nan", "epoch 1, batch 1", "data"),
        recipe="train",
    ),
    "nan_collected": Bad(
        files=NAN_TO_TRAIN,
        says=("nan", "batch 1", "data"),
        recipe="gradients",
    ),
    "nan_calibrated": Bad(
        files=NAN_TO_TRAIN,
        says=("0.weight reads NaN", "in the data"),
        recipe="calibrated",
    ),
    "inf_calibrated": Bad(
        files={"train.npz": arrays(inputs=ones(64, 4) / 0), "test.npz": half},
        says=("0.weight reads NaN, infinity", "in the data"),
        recipe="calibrated",
    ),
    "no_shard_with_samples": Bad(
        files={
            "train-0.npz": arrays(inputs=ones(0, 4), targets=torch.zeros(0, dtype=torch.long)),
            "train-1.npz": arrays(inputs=ones(0, 4), targets=torch.zeros(0, dtype=torch.long)),
            "test.npz": half,
        },
        says=("no shard of the train data holds a sample", "give more"),
        recipe="calibrated",
    ),
    "no_shard_with_a_batch": Bad(
        files={"train-0.npz": half, "train-1.npz": half, "test.npz": good},
        says=("no shard of the train data", "batches that the program was exported for"),
        recipe="calibrated",
        model="batch_of_32.pt2",
    ),
    "one_shard_with_nan": Bad(
        files={"train-0.npz": good, "train-1.npz": NAN_TO_TRAIN["train.npz"], "test.npz": half},
        says=("train-1.npz: ", "0.weight reads NaN"),
        recipe="calibrated",
    ),
    "one_shard_with_nan_collected": Bad(
        files={"train-0.npz": good, "train-1.npz": NAN_TO_TRAIN["train.npz"], "test.npz": half},
        says=("train-1.npz: ", "nan", "batch 1"),
        recipe="gradients",
    ),
    "nan_searched": Bad(
        files=NAN_TO_TRAIN,
        says=("nan", "data"),
        recipe="search",
    ),
    "too_few_to_search": Bad(
        files={
            "train.npz": arrays(inputs=ones(3, 4), targets=torch.zeros(3, dtype=torch.long)),
            "test.npz": half,
        },
        says=("too few to be cut into auto's 4 folds", "number 4 holds no sample"),
        recipe="search",
    ),
    "diverges": Bad(
        files={"train.npz": good, "test.npz": half},
        says=("diverged", "lr 1e+30", "lower lr"),
        recipe="wild",
    ),
    "too_few_for_its_batch": Bad(
        files={
            "train.npz": half,
            "test.npz": arrays(inputs=ones(9, 4), targets=torch.zeros(9, dtype=torch.long)),
        },
        says=("batches of exactly 32", "8 samples"),
        recipe="train",
        model="batch_of_32.pt2",
    ),
}


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(32, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).flatten(1))


class BatchOf32(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.reshape(128).reshape(32, 4))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.places(torch.arange(x.shape[1]))).mean(1))


def other_programs() -> dict[str, bytes]:
    torch.manual_seed(0)
    tokens = module_to_program(Tokens(), [torch.zeros(2, 4, dtype=torch.long)])
    fixed = module_to_program(BatchOf32(), [torch.zeros(32, 4)])
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("places", min=2, max=6)}
    sequence = torch.export.export(Sequence().eval(), (torch.zeros(3, 4, 4),), dynamic_shapes=(axes,))
    return {
        "in/sequence.pt2": save_program(sequence),
        "in/tokens.pt2": save_program(tokens),
        "in/batch_of_32.pt2": save_program(fixed),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def outcome(place: Path, write_fleet: Any, cli: Any, samples: Arrays) -> Any:
    files, data, models = other_programs(), {}, []
    for name, case in CASES.items():
        for file, made in case.files.items():
            files[f"{name}/{file}"] = made if isinstance(made, bytes) else made(samples)
        data[name] = {"eval": f"{place}/{name}/test*"}
        if any(file.startswith("train") for file in case.files):
            data[name]["train"] = f"{place}/{name}/train*"
        if case.loss:
            data[name]["loss"] = case.loss
        models.append(
            {"name": name, "source": f"{place}/in/{case.model}", "data": name, "recipe": case.recipe}
        )
    recipes = {
        "wild": {"train": {"lr": 1.0e30, "epochs": 3}},
        "search": {"auto": {"trials": 1}},
        "calibrated": {"quantize": {"scheme": "W4A16", "method": "gptq"}},
    }
    spec = write_fleet(place, place, files=files, models=models, data=data, recipes=recipes)
    return cli("run", spec, "--executor", "inline", "--json")


def test_the_good_one_is_published(outcome: Any) -> None:
    assert outcome.models["good"]["state"] == "published"
    assert outcome.code == 3


@pytest.mark.parametrize("name", CASES)
def test_a_bad_one_fails_with_its_reason(name: str, outcome: Any, place: Path) -> None:
    model = outcome.models[name]
    assert model["state"] == "failed", model
    for words in CASES[name].says:
        assert words in model["reason"]
    assert "internal error" not in model["reason"]
    assert not (place / "out/models" / name).exists()


def test_data_pattern_of_a_spec_that_is_both_train_and_eval(
    tmp_path: Path, write_fleet: Any, cli: Any
) -> None:
    both = {"train": f"{tmp_path}/data/test.npz", "eval": f"{tmp_path}/data/*.npz"}
    models = [{"name": "bad", "source": f"{tmp_path}/in/good.pt2", "data": "both", "recipe": "train"}]
    spec = write_fleet(tmp_path, tmp_path, models=models, data={"both": both})
    outcome = cli("run", spec, "--executor", "inline", "--json")
    assert outcome.code == 3
    assert "test.npz of eval is test.npz of train" in outcome.models["bad"]["reason"]
