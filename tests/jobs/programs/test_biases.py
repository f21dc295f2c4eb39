"""Which bias makes good which weight's rounding."""

import pytest
import torch
from torch import nn
from torch.export import export

from fleetpress.compression.layers import layers
from fleetpress.compression.observing import calibrate
from fleetpress.compression.program import tensors
from fleetpress.compression.quantization import QUANTIZERS, quantize_layer
from fleetpress.compression.scheme import QuantScheme
from fleetpress.jobs.programs.biases import Biases


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
def test_a_recurrent_layer_has_one_for_each_of_its_weights() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5, 3)
    program = export(nn.LSTM(3, 4, batch_first=True).eval(), (x,))
    known = calibrate(program, {"input": x}, 6).weights
    (layer,) = layers(program)
    biases = Biases(program)
    made = quantize_layer(layer, tensors(program), QuantScheme(num_bits=2), QUANTIZERS["gptq"], known)
    for name, weight in made.items():
        biases.correct(layer, name, weight, known[name])
    assert biases.uncorrected == {}
    values = tensors(program)
    for name, weight in made.items():
        bias = name.replace("weight", "bias")
        shift = (weight.dequantize() - values[name].detach()).double() @ known[name].inputs.mean[0]
        torch.testing.assert_close(biases.corrected[bias].double(), values[bias].detach().double() - shift)
