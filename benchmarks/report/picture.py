"""The picture of a report in docs/: two nights of a small fleet on a cluster of three nodes and a real S3 server.

    python benchmarks/report/picture.py [FILE.png] [--page FILE.html]

Between the nights a model is added, one recipe is changed for the worse, one for the better, and a file is cut short;
in the second night a worker is killed. The page that fleetpress writes is then opened in Chromium (browser.py) and
photographed. Takes some minutes; every number in the picture was measured.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "ray_matrix"))

from browser import Browser
from ray_hosts import Hosts

from fleetpress.compression.program import with_tensors
from fleetpress.compression.training import TrainOptions, train
from fleetpress.jobs.demo import npz_bytes, read_digits
from fleetpress.jobs.demo_models import EPOCHS, NETS
from fleetpress.jobs.seaweed import start_seaweedfs
from fleetpress.storage.programs import module_to_program, save_program
from fleetpress.storage.store import open_store

ROOT = Path(__file__).parents[2]
MOST_BYTES = 300_000
SITES = ("berlin", "oslo", "porto")
SPEC = """\
version: 1
name: nightly
output: s3://fleet/compressed
models:
{models}
data:
  digits:
    train: s3://fleet/data/train-*.npz
    eval: s3://fleet/data/test.npz
    loss: cross_entropy
    metric: accuracy
recipes:
  small:
    prune: {{method: gradient_stability, sparsity: 0.5}}
    finetune: {{epochs: 10, lr: 3.0e-3}}
    quantize: {{scheme: W4A16}}
    validate: {{max_drop: 0.02}}
  light:
    quantize: {{scheme: W8A16}}
    validate: {{max_drop: 0.01}}
  strict:
    prune: {{method: gradient_stability, sparsity: 0.3}}
    finetune: {{epochs: 10, lr: 3.0e-3}}
    quantize: {{scheme: W4A16, method: smallest_error}}
    validate: {{max_drop: 0.01}}
  reckless:
    prune: {{method: magnitude, sparsity: 0.4}}
    quantize: {{scheme: W4A16}}
    validate: {{max_drop: 0.02}}
"""
FIRST = {
    "berlin-cnn": "small",
    "berlin-mlp": "small",
    "berlin-resnet": "small",
    "oslo-cnn": "light",
    "oslo-mlp": "light",
    "oslo-resnet": "small",
    "porto-mlp": "strict",
}
SECOND = {
    **FIRST,
    "oslo-mlp": "reckless",
    "oslo-cnn": "strict",
    "porto-cnn": "small",
    "porto-resnet": "small",
}


def make_fleet() -> None:
    """Train the nets of every site, and store them with their data."""
    store = open_store("s3://fleet")
    train_set, test_set = read_digits()
    store.put("data/train-0.npz", npz_bytes({name: value[:700] for name, value in train_set.items()}))
    store.put("data/train-1.npz", npz_bytes({name: value[700:] for name, value in train_set.items()}))
    store.put("data/test.npz", npz_bytes(test_set))
    torch.set_num_threads(1)
    for seed, site in enumerate(SITES):
        for name, make in NETS.items():
            print(f"training {site}-{name}", file=sys.stderr)
            torch.manual_seed(seed)
            program = module_to_program(make(), [train_set["inputs"][:2]])
            options = TrainOptions(epochs=EPOCHS[name], batch_size=64, optimizer="adamw", lr=2e-3)
            values = train(program, train_set, options, loss="cross_entropy", seed=seed).values
            data = save_program(with_tensors(program, values), compress=False)
            store.put(f"models/{site}-{name}.pt2", data)
    store.put("models/porto-resnet.pt2", data[: len(data) // 2])


def run_night(recipes: dict[str, str], folder: Path, hosts: Hosts, *, kill: str | None = None) -> None:
    """One run of the fleet on the cluster; a worker that does a task of kind `kill` is killed."""
    rows = (
        f"  - {{name: {name}, source: s3://fleet/models/{name}.pt2, data: digits, recipe: {recipe}}}"
        for name, recipe in recipes.items()
    )
    spec = folder / "nightly.yaml"
    spec.write_text(SPEC.format(models="\n".join(rows)))
    command = [
        str(Path(sys.executable).with_name("fleetpress")),
        "run",
        str(spec),
        "--address",
        hosts.address,
    ]
    with subprocess.Popen(command, env=hosts.environment, stdout=sys.stderr) as run:
        if kill:
            print(f"killed: {hosts.kill_worker(kill)}", file=sys.stderr)
    if run.returncode not in (0, 3):
        raise SystemExit(f"fleetpress run ended with {run.returncode}")


def main() -> None:
    """Make fleet, nights and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", nargs="?", type=Path, default=ROOT / "docs" / "report.png")
    parser.add_argument("--page", type=Path, help="keep the page here, too")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="fleetpress-picture-") as name,
        start_seaweedfs(Path(name, "s3")) as server,
    ):
        folder = Path(name)
        os.environ.update(server.environment)
        server.create_bucket("fleet")
        make_fleet()
        with Hosts(nodes=3) as hosts:
            run_night(FIRST, folder, hosts)
            run_night(SECOND, folder, hosts, kill="finetune")
        store = open_store("s3://fleet/compressed")
        latest = max(key for key in store.sizes("runs/") if key.endswith("/report.html"))
        page = arguments.page or folder / "report.html"
        page.write_bytes(store.get(latest))
        with Browser() as browser:
            shown = browser.open(page, width=1280)
            bottom = shown.run("document.getElementById('accuracy').getBoundingClientRect().bottom + scrollY")
            picture = shown.picture(height=round(bottom) + 28)
    arguments.picture.write_bytes(picture)
    print(f"{arguments.picture}: {len(picture):,} bytes")
    if len(picture) > MOST_BYTES:
        raise SystemExit(f"more than {MOST_BYTES:,} bytes: make it smaller")


if __name__ == "__main__":
    main()
