"""What each storage format keeps of a weight, and what layers on integer kernels gain: `python benchmarks/formats.py`.

Times are the least processor time of many calls on one thread, so that other work on the machine changes little.
"""

import io
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fleetpress.compression.layers import layers
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors
from fleetpress.compression.quantization import QUANTIZERS, QuantizedWeight, quantize_weight
from fleetpress.compression.quantization.packed_program import pack_program
from fleetpress.compression.scheme import SCHEMES, QuantScheme, resolve
from fleetpress.storage.programs import save_program

SHAPE = (1536, 384)
FORMATS: dict[str, tuple[QuantScheme, str]] = {
    "W8A16": (SCHEMES["W8A16"], "round_to_nearest"),
    "FP8": (SCHEMES["FP8"], "round_to_nearest"),
    "k_means, 4 bits": (resolve(num_bits=4, learned=True), "k_means"),
    "NF4": (SCHEMES["NF4"], "round_to_nearest"),
    "MXFP4": (SCHEMES["MXFP4"], "round_to_nearest"),
    "MXFP4, smallest_error": (SCHEMES["MXFP4"], "smallest_error"),
    "W4A16": (SCHEMES["W4A16"], "round_to_nearest"),
    "k_means, 3 bits": (resolve(num_bits=3, learned=True), "k_means"),
    "k_means, 2 bits": (resolve(num_bits=2, learned=True), "k_means"),
    "W2A16, smallest_error": (SCHEMES["W2A16"], "smallest_error"),
    "TERNARY": (SCHEMES["TERNARY"], "round_to_nearest"),
    "BINARY": (SCHEMES["BINARY"], "round_to_nearest"),
}
LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(384, 384), (1, 128, 384)),
    (nn.Linear(384, 1536), (1, 128, 384)),
    (nn.Linear(1536, 384), (1, 128, 1536)),
    (nn.Linear(384, 1536), (8, 128, 384)),
    (nn.Conv2d(64, 64, 3, padding=1), (1, 64, 56, 56)),
    (nn.Conv2d(256, 256, 3, padding=1), (1, 256, 14, 14)),
    (nn.Conv2d(128, 128, 3, stride=2, padding=1), (1, 128, 28, 28)),
]


def least_ms(call: Callable[[Tensor], object], inputs: Tensor, calls: int = 60) -> float:
    """The least processor time of so many calls, in milliseconds."""
    call(inputs)
    found = []
    for _ in range(calls):
        start = time.process_time()
        call(inputs)
        found.append(time.process_time() - start)
    return min(found) * 1e3


def published(
    layer: nn.Module, inputs: Tensor, scheme: QuantScheme, method: str
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], QuantizedWeight]:
    """The layer as a program, as it is and as it is published, and its weight."""
    program = torch.export.export(layer.eval(), (inputs,))
    (found,) = layers(program)
    (name,) = found.weights
    observed = calibrate(program, {"input": inputs}, len(inputs)).weights[name]
    weight = quantize_weight(
        name, tensors(program)[name], found.axis, scheme, QUANTIZERS[method], statistics=observed
    )
    data = save_program(pack_program(program, {name: weight}))
    return program.module(), torch.export.load(io.BytesIO(data)).module(), weight


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"normal weights {SHAPE}; a call of the published layer unpacks them and multiplies 128 inputs")
    print("| format | bits a weight | signal to noise | a call |\n|---|---|---|---|")
    inputs = torch.randn(1, 128, SHAPE[1])
    with torch.no_grad():
        for name, (scheme, method) in FORMATS.items():
            layer = nn.Linear(SHAPE[1], SHAPE[0])
            layer.weight.normal_(std=0.05)
            _, packed, weight = published(layer, inputs, scheme, method)
            bits = 8 * weight.stored_bytes() / weight.codes.numel()
            noise = weight.sqnr_db(layer.weight)
            print(f"| {name} | {bits:.2f} | {noise:.1f} dB | {least_ms(packed, inputs):.2f} ms |")
        print("\n| layer, inputs | float32 | W8A8 | ratio | cosine |\n|---|---|---|---|---|")
        for layer, shape in LAYERS:
            inputs = torch.randn(shape)
            plain, packed, _ = published(layer, inputs, SCHEMES["W8A8"], "round_to_nearest")
            close = torch.cosine_similarity(plain(inputs).flatten(), packed(inputs).flatten(), dim=0)
            before, after = least_ms(plain, inputs), least_ms(packed, inputs)
            print(
                f"| {str(layer).replace(', bias=True', '')}, {shape} | {before:.2f} ms | {after:.2f} ms "
                f"| {before / after:.1f}x | {float(close):.5f} |"
            )


if __name__ == "__main__":
    main()
