"""What weights with zeros take: codes of all weights, or a mask and the codes that are not zero, beside their entropy.

    python benchmarks/sparse_storage.py

LeNet-5 (61,706 parameters) and a layer of 1024 x 1024, with normally distributed weights, the smallest of every layer
zeroed, W4A16, round to nearest. The first table is about the codes of LeNet-5: packed, and packed and deflated as in a
file; the entropy is that of the codes of each layer, which no code of single weights goes below. The others are about
whole files, with one form for all layers or the one that fleetpress chooses, and about one call on one sample:
milliseconds of CPU, median of 30, of a program that unpacks its weights at every call, and of one that was folded, as
`load_artifact` gives it.
"""

import statistics
import sys
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fleetpress.compression.layers import layers
from fleetpress.compression.program import tensors, with_tensors
from fleetpress.compression.quantization import QUANTIZERS, QuantizedWeight, quantize_layer
from fleetpress.compression.quantization.packed_program import pack_program, unpack_program
from fleetpress.compression.quantization.sparse_weight import SparseWeight, sparse_form
from fleetpress.compression.quantization.weight import pack_codes
from fleetpress.compression.scheme import SCHEMES
from fleetpress.compression.sparsity.zero_layers import zero_layers
from fleetpress.storage.programs import load_program, module_to_program, save_program

sys.path.insert(0, str(Path(__file__).parent))
from markdown_table import table

IMAGE = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
ROW = torch.randn(1, 1024, generator=torch.Generator().manual_seed(2))
CALLS = 30
SHARES = (0.0, 0.5, 0.8, 0.9, 0.95)
Weights = Mapping[str, QuantizedWeight]


def lenet() -> ExportedProgram:
    """LeNet-5 as LeCun et al. 1998 have it, with max pooling and ReLU."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )
    return drawn(net, IMAGE)


def drawn(net: nn.Sequential, sample: Tensor) -> ExportedProgram:
    """The net with normally distributed weights, as a program."""
    for module in net:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=0.05)
    return module_to_program(net, [sample])


def deflated(streams: Iterable[Tensor]) -> int:
    """Bytes of streams in a file: each DEFLATE-compressed where that is smaller."""
    datas = [stream.numpy().tobytes() for stream in streams]
    return sum(min(len(data), len(zlib.compress(data, 9))) for data in datas)


def entropy_bytes(weight: QuantizedWeight) -> float:
    """Of its codes, taken as independent draws."""
    counts = torch.bincount(weight.codes.flatten().int()).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum() * counts.sum() / 8)


def call_ms(program: ExportedProgram, sample: Tensor) -> float:
    """CPU time of one call on one thread."""
    module = program.module()
    times = []
    with torch.no_grad():
        for _ in range(CALLS):
            begin = time.process_time()
            module(sample)
            times.append(time.process_time() - begin)
    return 1000 * statistics.median(times)


def zeroed(program: ExportedProgram, share: float) -> ExportedProgram:
    """The program without the smallest weights of every layer."""
    if not share:
        return program
    options = {"method": "magnitude_unstructured", "sparsity": share}
    weights = zero_layers(layers(program), tensors(program), options).weights
    return with_tensors(program, {name: weight.values for name, weight in weights.items()})


def quantized(program: ExportedProgram) -> Weights:
    """All weights to 4 bits."""
    found: dict[str, QuantizedWeight] = {}
    for layer in layers(program):
        found |= quantize_layer(layer, tensors(program), SCHEMES["W4A16"], QUANTIZERS["round_to_nearest"])
    return found


def codes_row(share: float) -> list[str]:
    """Bytes of LeNet-5's codes."""
    dense = quantized(zeroed(lenet(), share))
    plain = [pack_codes(weight.codes, weight.scheme) for weight in dense.values()]
    sparse = [SparseWeight(**vars(weight)) for weight in dense.values()]
    parts = [part for weight in sparse for part in (weight.mask, weight.packed)]
    bound = round(sum(map(entropy_bytes, dense.values())))
    sizes = sum(map(len, plain)), deflated(plain), sum(map(len, parts)), deflated(parts), bound
    return [f"{share:.0%}", *(f"{size:,}" for size in sizes)]


def files_row(program: ExportedProgram, share: float, sample: Tensor) -> list[str]:
    """Bytes of files with one form for all weights, and with those that are chosen; times of calls."""
    program = zeroed(program, share)
    dense = quantized(program)
    sparse = {name: SparseWeight(**vars(weight)) for name, weight in dense.items()}
    chosen = {name: sparse_form(weight) for name, weight in dense.items()}
    datas = [save_program(pack_program(program, form)) for form in (dense, sparse, chosen)]
    masks = sum(isinstance(weight, SparseWeight) for weight in chosen.values())
    first, last = load_program(datas[0]), load_program(datas[-1])
    times = [call_ms(item, sample) for item in (first, last, unpack_program(last))]
    return [f"{share:.0%}", *(f"{len(data):,}" for data in datas), str(masks), *(f"{ms:.2f}" for ms in times)]


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    print("Bytes of the codes of LeNet-5\n")
    table(["zeros", "packed", "deflated", "mask and codes", "deflated", "entropy"], map(codes_row, SHARES))
    torch.manual_seed(0)
    matrix = drawn(nn.Sequential(nn.Linear(1024, 1024)), ROW)
    head = ["zeros", "dense", "all sparse", "chosen", "masks", "dense ms", "chosen ms", "folded ms"]
    for name, program, sample in (("LeNet-5", lenet(), IMAGE), ("1024 x 1024", matrix, ROW)):
        print(f"\nBytes of files and milliseconds of a call, {name}\n")
        table(head, [files_row(program, share, sample) for share in SHARES])


if __name__ == "__main__":
    main()
