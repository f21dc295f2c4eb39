"""Train mode restored in the graph does what nn.Module.train() does; eval mode undoes a train-mode export."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from fleetpress.compression.modes import eval_module, fixed_batch, state_of, training_module
from fleetpress.compression.program import tensors, with_tensors

DYNAMIC = ({0: Dim.DYNAMIC},)


class ConvNet(nn.Module):
    """Convolution, batch norm, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of [samples, 1, 8, 8]."""
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of [samples, tokens]."""
        return self.head(self.embedding(tokens))  # type: ignore[no-any-return]


def export(
    model: nn.Module, example: Tensor, *, train: bool = False, dynamic: bool = True
) -> ExportedProgram:
    """The model's program, by default in eval mode with a dynamic batch size."""
    return torch.export.export(model.train(train), (example,), dynamic_shapes=DYNAMIC if dynamic else None)


def images(samples: int = 6) -> Tensor:
    """Seeded images."""
    return torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("exported_in_train_mode", [False, True], ids=["eval_export", "train_export"])
def test_statistics_that_never_move_are_trained_with(exported_in_train_mode: bool) -> None:
    model = ConvNet()
    model.norm.momentum = 0.0
    model.norm.running_mean = torch.tensor([1.0, -1.0, 2.0, 0.5])
    program = export(model, images(), train=exported_in_train_mode)
    with torch.no_grad():
        assert torch.equal(training_module(program)(images()), eval_module(program)(images()))


@pytest.mark.parametrize("exported_in_train_mode", [False, True], ids=["eval_export", "train_export"])
def test_a_training_step_equals_that_of_the_module_in_train_mode(exported_in_train_mode: bool) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    program = export(model, images(), train=exported_in_train_mode)
    before = {name: value.clone() for name, value in tensors(program).items()}
    module, labels = training_module(program), torch.tensor([0, 1, 2, 0, 1, 2])
    ours = torch.optim.SGD(module.parameters(), lr=0.1)
    torch.autograd.backward(functional.cross_entropy(module(images()), labels))
    ours.step()
    assert all(torch.equal(value, before[name]) for name, value in tensors(program).items()), (
        "the input changed"
    )

    model.train()
    theirs = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.autograd.backward(functional.cross_entropy(model(images()), labels))
    theirs.step()
    expected, got = model.state_dict(), state_of(module, program)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)
    assert got["norm.num_batches_tracked"] == 1
    assert not torch.equal(got["norm.running_mean"], before["norm.running_mean"])


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout(0.5), nn.Dropout1d(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5), nn.RReLU()],
    ids=lambda layer: type(layer).__name__,
)
def test_random_layers_draw_in_train_mode_only(layer: nn.Module) -> None:
    x = -torch.ones(4, 5, 7)
    for train in (False, True):
        program = export(nn.Sequential(layer, nn.Linear(7, 2)), x, train=train)
        module, still = training_module(program), eval_module(program)
        assert not torch.equal(module(x), module(x))
        assert torch.equal(still(x), still(x))


def test_recurrent_dropout_is_restored() -> None:
    lstm = nn.LSTM(3, 4, num_layers=2, dropout=0.5)
    program = export(lstm, torch.randn(5, 2, 3), dynamic=False)
    module, x = training_module(program), torch.randn(5, 2, 3)
    assert not torch.equal(module(x)[0], module(x)[0])
    torch.testing.assert_close(eval_module(program)(x)[0], lstm(x)[0])


def test_eval_mode_of_a_train_mode_export_moves_no_statistics() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    program = export(model, images(), train=True)
    module = eval_module(program)
    got = module(images())
    torch.testing.assert_close(got, model.eval()(images()))
    assert state_of(module, program)["norm.num_batches_tracked"] == 0
    assert torch.equal(state_of(module, program)["norm.running_var"], torch.ones(4))


def test_attention_dropout_of_a_train_mode_export_is_off_in_eval_mode() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)

    x = torch.randn(2, 1, 4, 8)
    module = eval_module(export(Attention(), x, train=True))
    assert torch.equal(module(x), module(x))


def test_normalization_without_running_statistics_keeps_using_those_of_the_batch() -> None:
    norm = nn.BatchNorm1d(3, track_running_stats=False)
    x = 5 + torch.randn(8, 3)
    torch.testing.assert_close(eval_module(export(norm, x))(x), norm(x))


def test_batch_norm_taken_apart_by_run_decompositions_trains_too() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    program = export(model, images()).run_decompositions()
    module = training_module(program)
    torch.testing.assert_close(module(images()), model.train()(images()))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state_of(module, program)[name], value)


def test_tied_weights_are_one_parameter_and_stay_tied() -> None:
    program = export(Tied(), torch.zeros(2, 4, dtype=torch.int64))
    module = training_module(program)
    params = dict(module.named_parameters(remove_duplicate=False))
    assert params["embedding.weight"] is params["head.weight"]
    with torch.no_grad():
        params["head.weight"].add_(1)
    values = state_of(module, program)
    assert values["embedding.weight"] is values["head.weight"]
    stored = tensors(with_tensors(program, values))
    torch.testing.assert_close(stored["embedding.weight"], stored["head.weight"])


def test_half_precision_trains_in_float32_and_comes_back() -> None:
    program = export(ConvNet().bfloat16(), images().bfloat16())
    module = training_module(program)
    assert {value.dtype for value in module.parameters()} == {torch.float32}
    assert module(images()).dtype is torch.float32
    assert state_of(module, program)["conv.weight"].dtype is torch.bfloat16


def test_a_static_batch_that_means_nothing_is_freed() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    program = export(model, images(4), dynamic=False)
    assert fixed_batch(program) is None
    torch.testing.assert_close(eval_module(program)(images(7)), model(images(7)))
    assert training_module(program)(images(5)).shape == (5, 3)


class Written(nn.Module):
    """A batch size written as a number."""

    def forward(self, x: Tensor) -> Tensor:
        """[4, 6] as rows of the batch."""
        return x.reshape(4, 2, 3).sum(1)


class Mixing(nn.Module):
    """Every sample sees the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        """[4, 6] less its mean."""
        return x - x.mean(0, keepdim=True)


class Remembering(nn.Module):
    """States for so many sequences: torch itself would write beyond them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[4, 6] as two steps of three."""
        return self.lstm(x.reshape(-1, 2, 3))[0]


@pytest.mark.parametrize(
    "model", [Written(), Mixing(), Remembering()], ids=["written_in_the_graph", "samples_mix", "states"]
)
def test_a_static_batch_that_matters_is_kept(model: nn.Module) -> None:
    program = export(model, torch.randn(4, 6), dynamic=False)
    assert fixed_batch(program) == 4
    with pytest.raises(AssertionError, match="Guard"):
        eval_module(program)(torch.randn(3, 6))
