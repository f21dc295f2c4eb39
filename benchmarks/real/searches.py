"""The search for bits layer by layer, beside ModelOpt's AutoQuantize: CPU seconds, and how good the choice is.

    pip install nvidia-modelopt==0.47.0
    python benchmarks/real/searches.py FOLDER [--bits 2.5 3 3.5] [--seeds 0 1 2]

A language model of characters (4 blocks of width 128) is trained for an epoch; then both choose for each of its Linear
layers between 4 and 2 bits (groups of 128), from the same 256 sequences, so that the mean is at most so many bits. One
thread, one after the other. Both choices are then carried out by the same rounding, and the perplexity of held-out text
says which was better.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bench
import criteria_nets
import torch
from char_gpt_net import CharGpt
from torch import Tensor, nn
from torch.export import ExportedProgram

from fleetpress.compression.allocation import Option, allocate
from fleetpress.compression.evaluation import evaluate
from fleetpress.compression.layers import layers
from fleetpress.compression.losses import LOSSES
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors, with_tensors
from fleetpress.compression.quantization import QUANTIZERS, quantize_layer
from fleetpress.compression.scheme import resolve
from fleetpress.compression.sensitivity import expected_increase
from fleetpress.compression.training import TrainOptions, train
from fleetpress.storage.programs import module_to_program

SCHEMES = {4: resolve("W4A16"), 2: resolve("W2A16")}
ROUNDING = QUANTIZERS["round_to_nearest"]
SEQUENCES, BATCH = 256, 32
Bits = Mapping[str, int]  # by layer


def trained(
    text: criteria_nets.Net, symbols: int, length: int, seed: int
) -> tuple[nn.Module, ExportedProgram]:
    """The net as a module and as a program, with the same weights."""
    torch.manual_seed(seed)
    net = CharGpt(symbols, length, width=128, blocks=4).eval()
    program = module_to_program(net, [text.train_data["inputs"][:2]])
    options = TrainOptions(epochs=1, batch_size=32, lr=3e-3)
    values = train(program, text.train_data, options, loss=text.loss, seed=seed).values
    net.load_state_dict(values)
    return net, with_tensors(program, values)


def ours(program: ExportedProgram, sequences: Mapping[str, Tensor], bits: float) -> Bits:
    """What the statistics of one pass and the solver say."""
    known = calibrate(program, sequences, BATCH, loss="causal_lm")
    values = tensors(program)
    chosen = [layer for layer in layers(program) if layer.kind == "Linear"]
    options = []
    for layer in chosen:
        (name,) = layer.weights
        found = []
        for num_bits, scheme in SCHEMES.items():
            made = quantize_layer(layer, values, scheme, ROUNDING)[name].dequantize()
            increase = expected_increase(made - values[name].detach(), known.weights[name], known.samples)
            found.append(Option(cost=num_bits * values[name].numel(), increase=increase))
        options.append(found)
    budget = bits * sum(values[layer.weights[0]].numel() for layer in chosen)
    picked = allocate(options, budget)
    return {layer.name: list(SCHEMES)[at] for layer, at in zip(chosen, picked, strict=True)}


def peer(net: nn.Module, sequences: Mapping[str, Tensor], bits: float) -> Bits:
    """What AutoQuantize says: gradients times quantization errors of outputs, and a linear program."""
    import modelopt.torch.quantization as mtq

    loader = list(sequences["inputs"].split(BATCH))
    rule = LOSSES["causal_lm"]
    found, _ = mtq.auto_quantize(
        net,
        constraints={"effective_bits": bits},
        quantization_formats=[_format(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, num_bits) for num_bits in SCHEMES],
        data_loader=loader,
        forward_step=lambda model, batch: model(batch),
        loss_func=rule.compute,
        num_calib_steps=len(loader),
        num_score_steps=len(loader),
    )
    return {
        name: module.weight_quantizer.num_bits if module.weight_quantizer.is_enabled else 16
        for name, module in found.named_modules()
        if isinstance(module, nn.Linear)
    }


def _format(config: Mapping[str, Any], num_bits: int) -> dict[str, Any]:
    """The peer's format of 4 bits in groups of 128, with so many bits."""
    made = copy.deepcopy(dict(config))
    for entry in made["quant_cfg"]:
        if "cfg" in entry:
            entry["cfg"]["num_bits"] = num_bits
    return made


def carried_out(program: ExportedProgram, bits: Bits) -> ExportedProgram:
    """The program with every layer rounded to its bits."""
    values = tensors(program)
    made: dict[str, Tensor] = {}
    for layer in layers(program):
        if bits.get(layer.name, 16) in SCHEMES:
            weights = quantize_layer(layer, values, SCHEMES[bits[layer.name]], ROUNDING)
            made |= {name: weight.dequantize() for name, weight in weights.items()}
    return with_tensors(program, made)


def _mean_bits(program: ExportedProgram, bits: Bits) -> float:
    sizes = {layer.name: tensors(program)[layer.weights[0]].numel() for layer in layers(program)}
    return sum(sizes[name] * count for name, count in bits.items()) / sum(sizes[name] for name in bits)


def _timed(search: Any, *args: Any) -> tuple[Bits, float]:
    start = time.process_time()
    found = search(*args)
    return found, time.process_time() - start


def rows(folder: Path, wanted: Sequence[float], seeds: Sequence[int]) -> list[list[str]]:
    """A row for each number of bits: seconds, mean bits and perplexity of both, and the ratio of the seconds."""
    text = criteria_nets.char_gpt(folder)
    symbols = int(torch.cat([text.train_data["inputs"], text.held_out["inputs"]]).max()) + 1
    length = text.train_data["inputs"].shape[1]
    sequences = {name: value[:SEQUENCES] for name, value in text.train_data.items()}
    found: dict[float, list[tuple[float, ...]]] = {bits: [] for bits in wanted}
    whole = []
    for seed in seeds:
        net, program = trained(text, symbols, length, seed)
        whole.append(evaluate(program, text.held_out, "perplexity"))
        for bits in wanted:
            mine, my_seconds = _timed(ours, program, sequences, bits)
            theirs, their_seconds = _timed(peer, copy.deepcopy(net), sequences, bits)
            found[bits].append(
                (
                    my_seconds,
                    their_seconds,
                    *(_mean_bits(program, one) for one in (mine, theirs)),
                    *(
                        evaluate(carried_out(program, one), text.held_out, "perplexity")
                        for one in (mine, theirs)
                    ),
                )
            )
            print(seed, bits, found[bits][-1], whole[-1], flush=True)
    print(f"before: perplexity {statistics.mean(whole):.4f}")
    table = []
    for bits, runs in found.items():
        mean = [statistics.mean(column) for column in zip(*runs, strict=True)]
        ratios = [run[0] / run[1] for run in runs]
        table.append(
            [
                f"{bits:g}",
                f"{mean[0]:.2f}",
                f"{mean[1]:.2f}",
                f"{statistics.median(ratios):.2f}",
                *(f"{value:.2f}" for value in mean[2:4]),
                *(f"{value:.4f}" for value in mean[4:6]),
            ]
        )
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 3.0, 3.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    head = [
        "bits at most",
        "s",
        "ModelOpt s",
        "ratio",
        "bits",
        "ModelOpt bits",
        "perplexity",
        "ModelOpt perplexity",
    ]
    bench.table("A search", head, rows(chosen.folder, chosen.bits, chosen.seeds))


if __name__ == "__main__":
    main()
