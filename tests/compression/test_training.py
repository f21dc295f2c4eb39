"""Training learns, repeats itself, shares batches between ranks, and says when it went wrong."""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fleetpress.compression.collectives import Collective
from fleetpress.compression.errors import DataMismatchError, MethodError, TrainingDivergedError
from fleetpress.compression.evaluation import evaluate
from fleetpress.compression.gradual import GradualOptions
from fleetpress.compression.program import aliases, tensors, with_tensors
from fleetpress.compression.quantization import QUANTIZERS
from fleetpress.compression.quantization.aware import AwareWeight
from fleetpress.compression.scheme import QuantScheme, resolve
from fleetpress.compression.statistics import GradientStatistics
from fleetpress.compression.training import OPTIMIZERS, TrainOptions, TrainResult, collect, train

DYNAMIC = ({0: Dim.DYNAMIC},)


class ConvNet(nn.Module):
    """Digits from 8 x 8 images, with batch norm."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 12, 3)
        self.norm = nn.BatchNorm2d(12)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(12 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of [samples, 1, 8, 8]."""
        x = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.head(self.dropout(x))  # type: ignore[no-any-return]


@functools.cache
def digits() -> dict[str, Tensor]:
    """scikit-learn's digits in a seeded order, pixels from 0 to 1."""
    inputs, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(inputs, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return {"inputs": images[order], "targets": torch.tensor(targets)[order]}


def part(start: int, stop: int) -> dict[str, Tensor]:
    """Some of the digits."""
    return {name: array[start:stop] for name, array in digits().items()}


@functools.cache
def program(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> ExportedProgram:
    """The untrained network."""
    torch.manual_seed(0)
    example = torch.zeros(4, 1, 8, 8, dtype=dtype)
    return torch.export.export(ConvNet(dropout).to(dtype).eval(), (example,), dynamic_shapes=DYNAMIC)


def test_a_small_network_learns_digits() -> None:
    seen: list[tuple[int, int]] = []
    result = train(
        program(0.1),
        part(0, 1400),
        TrainOptions(epochs=4, lr=3e-3),
        loss="cross_entropy",
        seed=0,
        collect=True,
        progress=lambda done, total, _: seen.append((done, total)),
    )
    trained = with_tensors(program(0.1), result.values)
    assert evaluate(trained, part(1400, 1797), "accuracy") > 0.95
    assert evaluate(program(0.1), part(1400, 1797), "accuracy") < 0.5, "the program itself was trained"
    assert result.losses[-1] < result.losses[0] / 4
    assert seen == [(done, 88) for done in range(1, 89)]
    assert result.values["norm.num_batches_tracked"] == 88
    assert result.statistics is not None
    assert result.statistics.neurons()["conv"].batches == 88


def run(**changes: object) -> TrainResult:
    """A short training."""
    options = TrainOptions(epochs=2, batch_size=32, optimizer="adamw", lr=1e-3)
    arguments: dict[str, object] = {
        "loss": "cross_entropy",
        "seed": 0,
        "options": options,
        "arrays": part(0, 100),
    }
    arguments |= {"program": program(), **changes}
    result: TrainResult = functools.partial(train, **arguments)()  # type: ignore[arg-type]
    return result


def test_the_seed_decides_everything() -> None:
    torch.manual_seed(1)
    one = run(program=program(0.5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two, other = run(program=program(0.5)), run(program=program(0.5), seed=1)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state moved"
    assert one.losses == two.losses != other.losses
    assert all(torch.equal(value, two.values[name]) for name, value in one.values.items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(optimizer: str) -> None:
    options = TrainOptions(epochs=6, batch_size=32, optimizer=optimizer, momentum=0.9, weight_decay=1e-4)
    losses = run(options=options).losses
    assert losses[-1] < losses[0]


class Threads:
    """Ranks that are threads of this process and meet at a barrier."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._parts: list[list[Tensor]] = [[] for _ in range(size)]

    def add(self, rank: int, mine: list[Tensor]) -> list[Tensor]:
        """Sums in the order of the ranks."""
        self._parts[rank] = [tensor.detach().clone() for tensor in mine]
        self._barrier.wait()
        sums = [functools.reduce(torch.add, column) for column in zip(*self._parts, strict=True)]
        self._barrier.wait()
        return sums


class Rank:
    """One of them."""

    def __init__(self, threads: Threads, rank: int) -> None:
        self.rank, self.size, self._threads = rank, threads.size, threads

    def sum_(self, tensors: list[Tensor]) -> None:
        """In place."""
        with torch.no_grad():
            for tensor, total in zip(tensors, self._threads.add(self.rank, tensors), strict=True):
                tensor.copy_(total)

    def differentiable_sum(self, tensor: Tensor) -> Tensor:
        """With a gradient."""
        result: Tensor = _Sum.apply(tensor, lambda value: self._threads.add(self.rank, [value])[0])  # type: ignore[no-untyped-call]
        return result


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, tensor: Tensor, add: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.add = add  # type: ignore[attr-defined]
        return add(tensor)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.add(grads[0]), None  # type: ignore[attr-defined]


def on_ranks(size: int, task: Callable[[Collective], TrainResult]) -> list[TrainResult]:
    """The task on every rank at once."""
    threads = Threads(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(task, [Rank(threads, rank) for rank in range(size)]))


@pytest.mark.parametrize("samples", [96, 97, 98], ids=["whole_batches", "one_left_over", "two_left_over"])
def test_two_and_three_ranks_train_the_same_weights_as_one(samples: int) -> None:
    options = TrainOptions(epochs=2, batch_size=32, optimizer="sgd", lr=0.05, momentum=0.9)
    task = functools.partial(run, options=options, arrays=part(0, samples), collect=True)
    alone = task()
    assert alone.statistics is not None
    for size in (2, 3):
        ranks = on_ranks(size, lambda collective: task(collective=collective))
        for name, value in alone.values.items():
            assert all(torch.equal(rank.values[name], ranks[0].values[name]) for rank in ranks)
            torch.testing.assert_close(ranks[0].values[name], value, rtol=1e-4, atol=1e-5)
        assert ranks[0].losses == pytest.approx(alone.losses, rel=1e-5)
        assert ranks[0].statistics is not None
        assert ranks[0].statistics.batches == alone.statistics.batches
        got, wanted = ranks[0].statistics.neurons()["head"], alone.statistics.neurons()["head"]
        torch.testing.assert_close(got.variance, wanted.variance, rtol=1e-3, atol=1e-9)


def test_ignored_labels_weigh_the_same_on_any_number_of_ranks() -> None:
    arrays = part(0, 64)
    arrays["targets"] = torch.where(torch.arange(64) < 40, -100, arrays["targets"])
    task = functools.partial(
        run, arrays=arrays, options=TrainOptions(epochs=1, batch_size=64, optimizer="sgd")
    )
    alone, ranks = task(), on_ranks(2, lambda collective: task(collective=collective))
    torch.testing.assert_close(
        ranks[0].values["head.weight"], alone.values["head.weight"], rtol=1e-5, atol=1e-6
    )


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


def test_tied_weights_learn_as_one_and_stay_tied() -> None:
    tokens = (torch.arange(5)[:, None] + torch.arange(8)) % 11
    torch.manual_seed(0)
    model = torch.export.export(Tied(), (tokens[:2],), dynamic_shapes=DYNAMIC)
    options = TrainOptions(epochs=30, batch_size=5, lr=0.1)
    result = run(
        program=model, arrays={"inputs": tokens, "targets": tokens}, loss="causal_lm", options=options
    )
    assert result.losses[-1] < result.losses[0] / 2
    trained = with_tensors(model, result.values)
    assert aliases(tensors(trained)) == aliases(tensors(model)) != {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_train_and_keep_their_dtype(dtype: torch.dtype) -> None:
    result = run(program=program(dtype=dtype), collect=True)
    assert result.values["conv.weight"].dtype is dtype
    assert result.losses[1] < result.losses[0]
    assert collect(program(dtype=dtype), part(0, 64), 32, loss="cross_entropy", seed=0).batches == 2


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_static_batch_that_matters_is_used_and_told() -> None:
    class Four(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.reshape(4, 64))  # type: ignore[no-any-return]

    model = torch.export.export(Four(), (torch.zeros(4, 1, 8, 8),))
    result = run(program=model, arrays=part(0, 10), collect=True)
    assert result.batch_size == 4
    assert result.statistics is not None
    assert result.statistics.batches == 4
    assert collect(model, part(0, 10), 64, loss="cross_entropy", seed=0).batches == 2
    with pytest.raises(MethodError, match="exactly 4, which 2 workers cannot share"):
        on_ranks(2, lambda collective: run(program=model, arrays=part(0, 10), collective=collective))
    with pytest.raises(DataMismatchError, match="there are 3 samples"):
        run(program=model, arrays=part(0, 3))


def test_a_loss_that_is_not_finite_stops_with_a_remedy() -> None:
    broken = part(0, 96)
    broken["inputs"] = broken["inputs"].clone()
    broken["inputs"][50] = float("nan")
    with pytest.raises(
        TrainingDivergedError, match=r"loss became nan in epoch 1, batch \d, with lr 0.001; lower lr"
    ):
        run(arrays=broken)
    with pytest.raises(TrainingDivergedError, match=r"epoch .* lr 1e"):
        run(options=TrainOptions(epochs=3, batch_size=32, optimizer="sgd", lr=1e30))
    with pytest.raises(TrainingDivergedError, match="batch 2 is nan while collecting"):
        collect(program(), broken, 32, loss="cross_entropy", seed=0)


def test_labels_out_of_range_are_told_before_any_step() -> None:
    with pytest.raises(DataMismatchError, match="1 to 10, but the program gives scores for 10 classes"):
        run(arrays={"inputs": torch.zeros(2, 1, 8, 8), "targets": torch.tensor([1, 10])})


def test_distillation_brings_a_disturbed_program_back() -> None:
    noise = torch.Generator().manual_seed(0)
    well = TrainOptions(epochs=6, batch_size=32, lr=3e-3)
    teacher = with_tensors(program(), run(arrays=part(0, 400), options=well).values)
    disturbed = {
        name: value + 0.1 * torch.randn(value.shape, generator=noise)
        for name, value in tensors(teacher).items()
        if name.startswith(("conv", "head"))
    }
    student, arrays = with_tensors(teacher, disturbed), {"inputs": part(0, 200)["inputs"]}
    options = TrainOptions(epochs=8, batch_size=32, lr=3e-3)
    result = run(program=student, teacher=teacher, loss="distillation", arrays=arrays, options=options)
    before, after = (
        evaluate(one, {"inputs": part(200, 400)["inputs"]}, "cosine", reference=teacher)
        for one in (student, with_tensors(student, result.values))
    )
    assert after > before
    assert after > 0.95


def test_distillation_says_what_it_needs() -> None:
    with pytest.raises(MethodError, match="give it as the teacher"):
        run(loss="distillation")
    with pytest.raises(MethodError, match="collect them at fixed weights"):
        run(loss="distillation", teacher=program(), collect=True)


@pytest.mark.parametrize("loss", ["cross_entropy", "distillation"])
def test_chunks_collected_apart_merge_to_the_whole(loss: str) -> None:
    whole = collect(program(), part(0, 150), 32, loss=loss, seed=5)
    first = collect(program(), part(0, 64), 32, loss=loss, seed=5)
    second = collect(program(), part(64, 150), 32, loss=loss, seed=5, first_batch=2)
    merged: GradientStatistics = first.merge(second)
    assert merged.batches == whole.batches == 5
    for name, value in whole.to_tensors().items():
        torch.testing.assert_close(merged.to_tensors()[name], value, rtol=1e-12, atol=1e-12)
    assert all((neurons.variance > 0).any() for neurons in whole.neurons().values())
    other = collect(program(), part(0, 150), 32, loss=loss, seed=6)
    same = torch.equal(other.layers["head"].squares, whole.layers["head"].squares)
    assert same is (loss == "cross_entropy"), "only drawn targets depend on the seed"


def test_collecting_changes_no_program() -> None:
    before = {name: value.clone() for name, value in tensors(program()).items()}
    collect(program(), part(0, 64), 32, loss="cross_entropy", seed=0)
    assert all(torch.equal(value, before[name]) for name, value in tensors(program()).items())
    assert all(value.grad is None for value in tensors(program()).values())


TENSOR = QuantScheme(num_bits=3, strategy="tensor")
CODED = AwareWeight(axis=0, scheme=TENSOR, method=QUANTIZERS["smallest_error"])
SHARED = AwareWeight(axis=0, scheme=resolve(num_bits=3, learned=True), method=QUANTIZERS["k_means"])


def test_ranks_agree_on_zeros_scales_codebooks_and_distilled_weights() -> None:
    options = TrainOptions(
        epochs=2, batch_size=32, optimizer="sgd", lr=0.05, schedule="cosine", distill=0.5, momentum=0.9
    )
    task = functools.partial(
        run,
        options=options,
        arrays=part(0, 97),
        teacher=program(0.1),
        gradual=GradualOptions(weights=("conv.weight", "head.weight"), sparsity=0.8, interval=2),
        quantized={"conv.weight": CODED, "head.weight": SHARED},
    )
    alone, ranks = task(), on_ranks(2, lambda collective: task(collective=collective))
    assert all(torch.equal(mask, ranks[1].masks[name]) for name, mask in ranks[0].masks.items())
    assert all(torch.equal(value, ranks[1].values[name]) for name, value in ranks[0].values.items())
    assert ranks[0].losses == pytest.approx(alone.losses, rel=1e-3)
    for name in ("conv.weight", "head.weight"):
        torch.testing.assert_close(ranks[0].scales[name].scale, alone.scales[name].scale, rtol=1e-2, atol=0)
        assert int((~alone.masks[name]).sum()) == int(0.8 * alone.masks[name].numel())
        assert (alone.values[name][~alone.masks[name]] == 0).all()
        assert len(alone.values[name].unique()) <= 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_out_as_its_codes(dtype: torch.dtype) -> None:
    result = run(
        program=program(0.0, dtype),
        arrays={**part(0, 100), "inputs": part(0, 100)["inputs"].to(dtype)},
        quantized={"head.weight": CODED},
    )
    value, scale = result.values["head.weight"], result.scales["head.weight"].scale
    codes = (value.float() / scale.float()).round()
    assert value.dtype == scale.dtype == dtype
    assert torch.equal(value, (codes * scale.float()).to(dtype))
    assert codes.abs().max() <= 4


def test_tied_weights_are_coded_as_one() -> None:
    tokens = (torch.arange(5)[:, None] + torch.arange(8)) % 11
    exported = torch.export.export(Tied().eval(), (tokens,), dynamic_shapes=DYNAMIC)
    name = next(iter(aliases(tensors(exported)).values()))
    result = train(
        exported,
        {"inputs": tokens, "targets": tokens},
        TrainOptions(epochs=3, batch_size=5, lr=0.1),
        loss="causal_lm",
        seed=0,
        quantized={name: CODED},
    )
    assert torch.equal(result.values["head.weight"], result.values["embedding.weight"])
    assert len(result.values["head.weight"].unique()) <= 8


def test_distillation_follows_its_teacher() -> None:
    teacher = with_tensors(program(), run(options=TrainOptions(epochs=6, batch_size=32, lr=3e-3)).values)
    arrays = part(0, 200)
    arrays["targets"] = (arrays["targets"] + 1) % 10  # only the teacher is right
    options = TrainOptions(epochs=6, batch_size=32, lr=3e-3, distill=1.0)
    pupil = with_tensors(program(), run(options=options, arrays=arrays, teacher=teacher).values)
    assert evaluate(pupil, part(200, 400), "agreement", reference=teacher) > 0.85


def test_distillation_needs_a_teacher_and_a_loss_beside_it() -> None:
    with pytest.raises(MethodError, match="give the teacher"):
        run(options=TrainOptions(distill=0.5))
    with pytest.raises(MethodError, match="distillation alone"):
        run(options=TrainOptions(distill=0.5), loss="distillation", teacher=program())
