"""The peers of layer_methods.py, in an environment of its own: one piece of work on one layer's tensors at a time.

    VENV/bin/python benchmarks/layer_methods_peer.py < LINES > LINES

Each line names the work and a safetensors file with `weight` [units, columns] and `x` [rows, columns]. For each it
prints the CPU seconds as JSON, and stores what it found as `found` in `<file>.peer`. Nothing of fleetpress is in it.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BATCH_ROWS = 1024


def statistics(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """llm-compressor's Hessian, batch by batch."""
    from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian

    layer = nn.Linear(weight.shape[1], 1, bias=False)

    def work() -> Tensor:
        hessian, samples = make_empty_hessian(layer), torch.zeros(1)
        for batch in x.split(BATCH_ROWS):
            hessian, samples = accumulate_hessian(batch, layer, hessian, samples)
        return hessian / 2

    return work


def ranges(weight: Tensor, _x: Tensor) -> Callable[[], Tensor]:
    """llm-compressor's MSE observer, in groups of 128; the scales it ends with."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.observers import Observer

    options = QuantizationArgs(
        num_bits=4, symmetric=False, strategy="group", group_size=128, observer="memoryless_mse"
    )
    observer = Observer.load_from_registry("memoryless_mse", base_name="weight", args=options)
    grouped = weight.unflatten(-1, (-1, 128)).unsqueeze(0)

    def work() -> Tensor:
        observer.update_statistics_from_observed(grouped)
        return calculate_qparams(observer.min_vals, observer.max_vals, options)[0].contiguous()

    return work


def half_quadratic(weight: Tensor, _x: Tensor) -> Callable[[], Tensor]:
    """hqq with its optimizer."""
    from hqq.core.quantize import Quantizer

    def work() -> Tensor:
        codes, facts = Quantizer.quantize(
            weight,
            nbits=4,
            channel_wise=True,
            group_size=64,
            optimize=True,
            round_zero=False,
            axis=1,
            bitpack=False,
            compute_dtype=torch.float32,
            device="cpu",
        )
        found: Tensor = Quantizer.dequantize(codes, facts)
        return found.contiguous()

    return work


def learned(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """auto_round's loop for one layer, with its wrapper, optimizer and rates."""
    from auto_round.algorithms.quantization.sign_round.sign_sgd import SignSGD
    from auto_round.wrapper import WrapperLinear

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    layer.requires_grad_(False)
    facts = {"bits": 4, "sym": False, "group_size": 128, "data_type": "int", "act_bits": 16}
    for name, value in {**facts, "scale_dtype": torch.float32, "global_name": "layer"}.items():
        setattr(layer, name, value)
    samples = x.unflatten(0, (-1, 128))

    def work() -> Tensor:
        torch.manual_seed(0)
        wrapper = WrapperLinear(layer, enable_minmax_tuning=True, enable_torch_compile=False)
        bounds = [value for name, value in wrapper.params.items() if "min" in name or "max" in name]
        optimizer = SignSGD(
            [{"params": [wrapper.value]}, {"params": bounds, "lr": 1 / 200}], lr=1 / 200, weight_decay=0
        )
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=1.0, end_factor=0.0, total_iters=200
        )
        least, best = float("inf"), weight
        for _ in range(200):
            chosen = samples[torch.randperm(len(samples))[:8]].flatten(0, 1)
            with torch.no_grad():
                wanted = layer(chosen)
            loss = nn.functional.mse_loss(wrapper(chosen), wanted)
            if loss.item() < least:
                least = loss.item()
                best = {name: value.detach().clone() for name, value in wrapper.params.items()}
            (loss * 1000).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        with torch.no_grad():
            found = wrapper._qdq_weight(best["value"], best["min_scale"], best["max_scale"])
        return (found[0] if isinstance(found, tuple) else found).detach().contiguous()

    return work


WORKS = {"statistics": statistics, "ranges": ranges, "half_quadratic": half_quadratic, "learned": learned}


def main() -> None:
    """Answer line by line."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        name, path = line.split()
        values = load_file(path)
        work = WORKS[name](values["weight"], values["x"])  # imports are not charged
        start = time.process_time()
        found = work()
        seconds = time.process_time() - start
        save_file({"found": found}, f"{path}.peer")
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
