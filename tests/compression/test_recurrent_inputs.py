"""What recurrent weights read, against cells that take one step after the other."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from fleetpress.compression.calibration import CalibrationStatistics
from fleetpress.compression.evaluation import Runner
from fleetpress.compression.layers import layers
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors, with_tensors
from fleetpress.compression.quantization import QUANTIZERS, quantize_layer
from fleetpress.compression.scheme import QuantScheme

INPUTS, HIDDEN, STEPS, SAMPLES = 3, 4, 5, 6
CELLS = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}


class _Net(nn.Module):
    """A recurrent layer over a sequence, with what it gives at every step."""

    def __init__(self, kind: type[nn.RNNBase], **options: bool) -> None:
        super().__init__()
        self.rnn = kind(INPUTS, HIDDEN, num_layers=2, batch_first=True, **options)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.rnn(inputs)[0]


def _exported(kind: type[nn.RNNBase], **options: bool) -> tuple[ExportedProgram, nn.RNNBase, Tensor]:
    torch.manual_seed(0)
    net = _Net(kind, **options).eval()
    x = torch.randn(SAMPLES, STEPS, INPUTS)
    return export(net, (x[:2],), dynamic_shapes=({0: Dim("batch")},)), net.rnn, x


def _step_by_step(rnn: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """Rows that every weight reads, by its name."""
    found, sequence = {}, x.detach()
    for layer in range(rnn.num_layers):
        outputs = []
        for direction in ("", "_reverse") if rnn.bidirectional else ("",):
            end = f"_l{layer}{direction}"
            cell = CELLS[type(rnn)](sequence.shape[-1], HIDDEN, bias=rnn.bias)
            cell.load_state_dict({name: getattr(rnn, name + end).detach() for name in cell.state_dict()})
            state = torch.zeros(len(x), HIDDEN)
            both = (state, state.clone())
            read, given = [], [torch.empty(0)] * STEPS
            for step in reversed(range(STEPS)) if direction else range(STEPS):
                read.append(state)
                if isinstance(rnn, nn.LSTM):
                    both = cell(sequence[:, step], both)
                    state = both[0]
                else:
                    state = cell(sequence[:, step], state)
                given[step] = state
            found[f"weight_ih{end}"] = sequence.flatten(0, 1)
            found[f"weight_hh{end}"] = torch.cat(read)
            outputs.append(torch.stack(given, dim=1))
        sequence = torch.cat(outputs, dim=-1).detach()
    return found


@pytest.mark.parametrize(
    ("kind", "bidirectional", "bias"), [(nn.LSTM, True, True), (nn.GRU, False, False), (nn.RNN, True, True)]
)
def test_they_are_those_that_cells_read_step_by_step(
    kind: type[nn.RNNBase], bidirectional: bool, bias: bool
) -> None:
    program, rnn, x = _exported(kind, bidirectional=bidirectional, bias=bias)
    found = calibrate(program, {"inputs": x}, 4, loss="distillation").weights
    wanted = _step_by_step(rnn, x)
    assert {name.removeprefix("rnn.") for name in found} == set(wanted)
    for name, rows in wanted.items():
        inputs = found[f"rnn.{name}"].inputs
        assert inputs.rows == SAMPLES * STEPS
        torch.testing.assert_close(inputs.gram[0, 0], rows.T @ rows, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs.mean[0].float(), rows.mean(0), rtol=1e-4, atol=1e-5)
    if bidirectional:
        both = [found[f"rnn.weight_ih_l1{end}"].inputs for end in ("", "_reverse")]
        assert both[0] is both[1]


def test_they_merge_and_make_gptq_better_than_rounding() -> None:
    program, _, x = _exported(nn.LSTM, bidirectional=True)
    parts = [calibrate(program, {"inputs": part}, 2) for part in x.split(2)]
    known: CalibrationStatistics = parts[0].merge(parts[1]).merge(parts[2])
    (layer,) = layers(program)
    outputs, error = Runner(program).outputs({"inputs": x}), {}
    for name in ("round_to_nearest", "gptq"):
        made = quantize_layer(
            layer, tensors(program), QuantScheme(num_bits=3), QUANTIZERS[name], known.weights
        )
        rounded = with_tensors(program, {weight: value.dequantize() for weight, value in made.items()})
        error[name] = float((Runner(rounded).outputs({"inputs": x}) - outputs).square().mean().detach())
    assert error["gptq"] < 0.8 * error["round_to_nearest"]
