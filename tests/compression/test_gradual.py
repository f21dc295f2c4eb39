"""Zeros stay zero, and grow by the cubic rule to the share that was asked for, on every rank alike."""

import pytest
import torch
from torch import Tensor, nn

from fleetpress.compression.errors import MethodError
from fleetpress.compression.gradual import GradualOptions, Zeros, share_after


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": nn.Parameter(torch.randn(10, 10, generator=generator)),
        "b": nn.Parameter(10 * torch.randn(5, 20, generator=generator)),
    }


def zero_counts(params: dict[str, Tensor]) -> list[int]:
    return [int((params[name] == 0).sum()) for name in "ab"]


def test_the_share_follows_zhu_and_gupta() -> None:
    # Their equation 1 with s_i = 0, t_0 = 0: s_f + (0 - s_f) * (1 - t / n)^3.
    for step in range(11):
        assert share_after(step, 10, 0.9) == pytest.approx(0.9 - 0.9 * (1 - step / 10) ** 3)
    assert share_after(11, 10, 0.9) == 0.9


def test_zeros_grow_layer_by_layer_and_never_come_back() -> None:
    params = weights()
    options = GradualOptions(weights=("a", "b"), sparsity=0.9, ramp=0.5, interval=2)
    zeros = Zeros(params, {}, options, steps=20)
    before, counts = dict(zeros.masks), []
    for step in range(1, 21):
        with torch.no_grad():
            for value in params.values():
                value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(step)))
        zeros.after_step()
        assert all(not (zeros.masks[name] & ~before[name]).any() for name in "ab")
        assert all((params[name][~zeros.masks[name]] == 0).all() for name in "ab")
        before = dict(zeros.masks)
        counts.append(zero_counts(params))
    assert counts[0] == [0, 0]
    assert counts[1] == counts[2] == [int(100 * share_after(2, 10, 0.9))] * 2
    assert counts[9:] == [[90, 90]] * 11


def test_a_global_share_takes_the_smallest_of_all() -> None:
    params = weights()
    largest = torch.cat([params[name].detach().abs().flatten() for name in "ab"]).topk(60).values.min()
    wanted = {name: params[name].detach().abs() >= largest for name in "ab"}
    options = GradualOptions(weights=("a", "b"), sparsity=0.7, scope="global", ramp=0.1)
    zeros = Zeros(params, {}, options, steps=10)
    zeros.after_step()
    assert sum(zero_counts(params)) == 140
    assert all(torch.equal(zeros.masks[name], wanted[name]) for name in "ab")
    assert zero_counts(params)[0] > 90, "the small layer loses most"


def test_the_first_of_equal_weights_go() -> None:
    drawn = torch.randint(-3, 4, (200,), generator=torch.Generator().manual_seed(4)).float()
    params = {"a": drawn.clone().requires_grad_()}
    options = GradualOptions(weights=("a",), sparsity=0.6, ramp=0.1)
    zeros = Zeros(params, {}, options, steps=10)
    zeros.after_step()
    gone = torch.argsort(drawn.abs(), stable=True)[:120]
    assert zeros.masks["a"].sum() == 80
    assert not zeros.masks["a"][gone].any()


def test_given_masks_hold_without_growth_and_are_where_growth_begins() -> None:
    params = weights()
    mask = torch.arange(100).view(10, 10) % 2 == 0
    zeros = Zeros(params, {"a": mask}, None, steps=5)
    assert zero_counts(params) == [50, 0]
    with torch.no_grad():
        params["a"] += 1
    zeros.after_step()
    assert torch.equal(params["a"] != 0, mask)
    grown = Zeros(params, {"a": mask}, GradualOptions(weights=("a",), sparsity=0.8, ramp=1.0), steps=1)
    grown.after_step()
    assert zero_counts(params) == [80, 0]
    assert not (grown.masks["a"] & ~mask).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sparsity": 1.0}, "sparsity 1.0"),
        ({"ramp": 0.0}, "ramp 0.0"),
        ({"interval": 0}, "interval 0"),
        ({"scope": "luck"}, "layer, global"),
    ],
)
def test_options_that_make_no_sense(change: dict[str, object], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        GradualOptions(**{"weights": ("a",), "sparsity": 0.5, **change})  # type: ignore[arg-type]


def test_masks_that_do_not_fit() -> None:
    with pytest.raises(MethodError, match="mask for c"):
        Zeros(weights(), {"c": torch.ones(2)}, None, 1)
    with pytest.raises(MethodError, match=r"mask of a has the shape \(2,\)"):
        Zeros(weights(), {"a": torch.ones(2)}, None, 1)
    with pytest.raises(MethodError, match="c is to be pruned gradually"):
        Zeros(weights(), {}, GradualOptions(weights=("c",), sparsity=0.5), 1)
