"""`fleetpress demo`: train a small fleet on real data, compress it, publish it, show what came out.

One model of the fleet is broken on purpose: the others must be published all the same.
"""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetpress.storage.store import open_store
from fleetpress.storage.uri import join

from .errors import UsageError
from .executors import ExecutorName
from .runs import log_lines
from .runs.results import (
    REPORT,
    RUNS,
    FleetResult,
)

if TYPE_CHECKING:
    from torch import Tensor

SPEC = """\
version: 1
name: demo
output: {place}/output
models:
  - {{source: "{place}/models/*.pt2", data: digits, recipe: small}}
data:
  digits:
    train: "{place}/data/train-*.npz"
    eval: {place}/data/test.npz
    loss: cross_entropy
    metric: accuracy
recipes:
  small:
    train: {{epochs: 1, batch_size: 64, optimizer: adamw, lr: 3.0e-4}}
    prune: {{method: gradient_stability, sparsity: 0.5, scope: layer}}
    finetune: {{epochs: 16, batch_size: 32, optimizer: adamw, lr: 5.0e-3, schedule: one_cycle}}
    quantize: {{scheme: W4A16}}
    validate: {{max_drop: 0.02}}
seed: 0
"""
_BROKEN = "broken"
_SEED = 0
_BUCKET = "fleet"


def run_demo(
    *, folder: str, through_s3: bool, executor: ExecutorName, address: str | None, as_json: bool = False
) -> int:
    """Make the fleet in `folder` (or a bucket of a server started here), run it, print the table; the exit code."""
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be made a folder: {error.strerror}; name another --folder"
        ) from None
    if not through_s3:
        return _run(str(place), place, executor, address, as_json)
    with _bucket(place) as uri:
        code = _run(uri, place, executor, address, as_json)
        _copy(join(uri, "output"), str(place / "s3-output"))
        _say(f"the bucket's output was copied to {place / 's3-output'}")
    return code


def _run(uri: str, folder: Path, executor: ExecutorName, address: str | None, as_json: bool) -> int:
    from .driver.run import run_fleet
    from .runs.live import Live
    from .spec.fleet_spec import parse_spec
    from .tables import print_result

    _make_fleet(uri)
    text = SPEC.format(place=uri)
    spec_file = folder / ("fleet-s3.yaml" if uri.startswith("s3://") else "fleet.yaml")
    spec_file.write_text(text, encoding="utf-8")
    with Live(title="demo") as live:
        result = run_fleet(
            parse_spec(text, str(spec_file)), executor=executor, address=address, listener=live.update
        )
    if as_json:
        print(json.dumps(result.as_dict(), indent=2, sort_keys=True))
    else:
        print_result(result)
    _say(f"{_BROKEN} is broken on purpose: the others go on all the same")
    _say(f"spec:   {spec_file}")
    _say(f"report: {join(result.output, RUNS + result.run, REPORT)}")
    _say("yours:  fleetpress init FOLDER")
    return 0 if _as_expected(result) else result.exit_code or 1


def _as_expected(result: FleetResult) -> bool:
    """The broken model fails and every other one is published: then the demo has shown what it should."""
    return all(
        (model.state == "failed") if model.name == _BROKEN else model.state in ("published", "unchanged")
        for model in result.models
    )


def _make_fleet(uri: str) -> None:
    """Train the demo's nets, and write them and their data below `uri`."""
    import torch

    from fleetpress.compression.program import with_tensors
    from fleetpress.compression.training import TrainOptions, train
    from fleetpress.storage.programs import module_to_program, save_program

    from .demo_models import EPOCHS, NETS

    store = open_store(uri)
    train_set, test_set = read_digits()
    half = len(train_set["targets"]) // 2
    shards = {
        "train-0": (train_set, slice(half)),
        "train-1": (train_set, slice(half, None)),
        "test": (test_set, slice(None)),
    }
    for name, (samples, rows) in shards.items():
        store.put(f"data/{name}.npz", npz_bytes({key: value[rows] for key, value in samples.items()}))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of several threads differ in the last digit from run to run
    try:
        for name, make in NETS.items():
            _say(f"training {name} ...")
            torch.manual_seed(_SEED)
            program = module_to_program(make(), [train_set["inputs"][:2]])
            options = TrainOptions(epochs=EPOCHS[name], batch_size=64, optimizer="adamw", lr=2e-3)
            result = train(program, train_set, options, loss="cross_entropy", seed=_SEED)
            data = save_program(with_tensors(program, result.values), compress=False)
            store.put(f"models/{name}.pt2", data)
    finally:
        torch.set_num_threads(threads)
    store.put(f"models/{_BROKEN}.pt2", data[: len(data) // 2])


def read_digits() -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
    """The 1,797 handwritten digits that ship inside scikit-learn: 1,257 to train on, 540 to test on."""
    import torch

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError("the demo's data comes with scikit-learn: pip install 'fleetpress[demo]'") from None
    raw: Any = load_digits()
    images = torch.from_numpy(raw.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SEED))
    train, test = order[:1257], order[1257:]
    return {"inputs": images[train], "targets": labels[train]}, {
        "inputs": images[test],
        "targets": labels[test],
    }


def npz_bytes(samples: "dict[str, Tensor]") -> bytes:
    """The arrays as an .npz file whose bytes depend on nothing else."""
    import numpy as np

    from fleetpress.storage.archive import write_archive

    members = {}
    for name, value in samples.items():
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, value.numpy(), allow_pickle=False)
        members[f"{name}.npy"] = buffer.getvalue()
    return write_archive(members, compress=True)


@contextmanager
def _bucket(folder: Path) -> Iterator[str]:
    """A bucket of an S3 server that runs as long as the demo; the AWS variables point to it meanwhile."""
    from .seaweed import start_seaweedfs

    with start_seaweedfs(folder / "seaweedfs") as server:
        before = {name: os.environ.get(name) for name in server.environment}
        os.environ.update(server.environment)
        try:
            yield join(server.create_bucket(_BUCKET), "demo")
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _copy(source: str, destination: str) -> None:
    target = open_store(destination)
    store = open_store(source)
    for info in store.list():
        target.put(info.key, store.get(info.key))


def _say(text: str) -> None:
    log_lines.say(text)
