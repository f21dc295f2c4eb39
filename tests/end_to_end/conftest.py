"""A small fleet on real data: scikit-learn's digits, a perceptron and a convolutional net with batch normalization."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fleetpress.compression.program import with_tensors
from fleetpress.compression.training import TrainOptions, train
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.seaweed import SeaweedFS
from fleetpress.jobs.spec.fleet_spec import Spec, parse_spec
from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import open_store

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "ray_matrix"))

from ray_hosts import Hosts

SPEC = """\
version: 1
name: fleet
output: {place}/output
models:
  - {{source: "{place}/models/*.pt2", data: digits, recipe: small}}
data:
  digits: {{train: "{place}/data/train-*.npz", eval: "{place}/data/test.npz", loss: cross_entropy, metric: accuracy}}
recipes:
  small:
    collect: {{batch_size: 64}}
    prune: {{method: gradient_stability, sparsity: 0.3}}
    finetune: {{epochs: 2, batch_size: 64, lr: 2.0e-3}}
    quantize: {{scheme: W4A16}}
    validate: {{max_drop: 0.05}}
"""


class Cnn(nn.Module):
    """Two convolutions with batch normalization and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(16 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.norm1(self.conv1(images))), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.head(self.dropout(x.flatten(1)))


def _digits() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    raw = load_digits()
    images = torch.from_numpy(raw.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    parts = order[:1200], order[1200:]
    train_set, test_set = ({"inputs": images[rows], "targets": labels[rows]} for rows in parts)
    return train_set, test_set


@pytest.fixture(scope="session")
def digits() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train and test set: images [N, 1, 8, 8] and labels [N]."""
    return _digits()


@pytest.fixture(scope="session")
def trained_fleet(digits: tuple[dict[str, Tensor], dict[str, Tensor]]) -> dict[str, bytes]:
    """Files of a small fleet by key: two trained programs and three data shards."""
    train_set, test_set = digits
    torch.manual_seed(0)
    nets = {"mlp": nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)), "cnn": Cnn()}
    files = {
        "data/train-0.npz": npz_bytes({name: value[:700] for name, value in train_set.items()}),
        "data/train-1.npz": npz_bytes({name: value[700:] for name, value in train_set.items()}),
        "data/test.npz": npz_bytes(test_set),
    }
    for name, net in nets.items():
        program = module_to_program(net, [train_set["inputs"][:2]])
        result = train(program, train_set, TrainOptions(epochs=6, lr=3e-3), loss="cross_entropy", seed=0)
        files[f"models/{name}.pt2"] = save_program(with_tensors(program, result.values), compress=False)
    return files


@pytest.fixture(scope="session")
def spec_text() -> str:
    """The spec of the fleet; `{place}` is where its files are."""
    return SPEC


@pytest.fixture
def fleet_at(trained_fleet: dict[str, bytes]) -> Callable[..., Spec]:
    """Writes the fleet below a uri, and gives the spec that compresses it."""

    def write(place: str | Path, text: str = SPEC) -> Spec:
        store = open_store(str(place))
        for key, data in trained_fleet.items():
            store.put(key, data)
        return parse_spec(text.format(place=place), "spec.yaml")

    return write


@pytest.fixture(scope="session")
def job_cluster(seaweedfs: SeaweedFS) -> Iterator[Callable[[], Hosts]]:
    """A cluster with a job server, a head and two nodes, which knows SeaweedFS; another one once its head is gone.

    It takes long to start, so a node that a test has killed is missed by those after it.
    """
    with ExitStack() as stack:
        started: list[Hosts] = []

        def living() -> Hosts:
            if not started or not started[-1].has_head:
                hosts = Hosts(nodes=2, takes_jobs=True, variables=seaweedfs.environment)
                started.append(stack.enter_context(hosts))
            return started[-1]

        yield living
