"""CWD against hand-computed values, and what normalising changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taps_factory import Shape, make, map_leaves, random_taps, total
from torch import Tensor, nn

from kd_yolo.distill.methods.cwd import channel_divergence
from kd_yolo.distill.ops.features import VARIANCE_FLOOR, channel_scale, standardise
from kd_yolo.errors import ConfigError

SHAPE = Shape()


def random_map(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_channel_divergence__golden_value() -> None:
    # One image, two channels of two cells, tau 1, as they are. Teacher channel 0: logits (ln 3, 0), p = (3/4, 1/4);
    # student (0, 0), q = (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2). Channel 1 agrees up to a shift: 0. Mean over 2.
    teacher = torch.tensor([[[[math.log(3.0), 0.0]], [[5.0, 6.0]]]], dtype=torch.float64)
    student = torch.tensor([[[[0.0, 0.0]], [[-1.0, 0.0]]]], dtype=torch.float64)
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert channel_divergence(student, teacher, 1.0, normalise=False).item() == pytest.approx(expected, abs=1e-12)


def test_channel_divergence__golden_value_with_temperature() -> None:
    # The same with logits doubled and tau 2: the same distributions, times tau^2 = 4.
    teacher = torch.tensor([[[[2 * math.log(3.0), 0.0]]]], dtype=torch.float64)
    student = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert channel_divergence(student, teacher, 2.0, normalise=False).item() == pytest.approx(expected, abs=1e-12)


def test_channel_divergence__normalised_golden_value() -> None:
    # Two cells (0, 2): standard deviation 1, the logits stay (0, 2); the student's (0, 8), deviation 4, become (0, 2)
    # too: no loss, and with normalise=false KL of sigmoid(2) against sigmoid(8).
    teacher, student = (torch.tensor([[[[0.0, top]]]], dtype=torch.float64) for top in (2.0, 8.0))
    assert channel_divergence(student, teacher, 1.0).item() == pytest.approx(0.0, abs=1e-6)
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-8))
    plain = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert channel_divergence(student, teacher, 1.0, normalise=False).item() == pytest.approx(plain, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    scale=st.lists(st.floats(0.1, 50.0), min_size=3, max_size=3),
    shift=st.lists(st.floats(-5.0, 5.0), min_size=3, max_size=3),
    seed=st.integers(0, 1000),
)
def test_channel_divergence__scale_and_shift_of_a_channel_do_not_matter(
    scale: list[float], shift: list[float], seed: int
) -> None:
    student, teacher = random_map(seed, 2, 3, 3, 4), random_map(seed + 1, 2, 3, 3, 4)
    factor, offset = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (scale, shift))
    value = channel_divergence(student, teacher, 1.0)
    changed = channel_divergence(student * factor + offset, teacher, 1.0)
    torch.testing.assert_close(changed, value, rtol=1e-3, atol=1e-6)  # up to the floor under the variance
    assert value.item() >= 0


def test_channel_divergence__gradient_is_that_of_the_formula() -> None:
    # d/ds of tau^2 KL(p || softmax(s / tau)) = tau (q - p), over images and channels.
    student, teacher, tau = random_map(0, 2, 3, 2, 2).requires_grad_(), random_map(1, 2, 3, 2, 2), 3.0
    torch.autograd.backward(channel_divergence(student, teacher, tau, normalise=False))
    q, p = (x.detach().flatten(2).div(tau).softmax(-1) for x in (student, teacher))
    assert student.grad is not None
    torch.testing.assert_close(student.grad.flatten(2), tau * (q - p) / 6)


def test_channel_divergence__a_twin_that_mixes_up_cells_and_channels_is_seen() -> None:
    student, teacher = random_map(0, 2, 3, 3, 3), random_map(1, 2, 3, 3, 3)
    wrong = torch.nn.functional.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="sum", log_target=True
    ) / (2 * 3)
    assert not torch.allclose(channel_divergence(student, teacher, 1.0, normalise=False), wrong, rtol=0.05)


def test_cwd__mean_over_levels() -> None:
    student, teacher = random_taps(SHAPE, 0), random_taps(SHAPE, 1)
    levels = [channel_divergence(s, t, 2.0) for s, t in zip(student.neck, teacher.neck, strict=True)]
    loss = make("cwd", SHAPE, tau=2.0, weight=3.0)(student, teacher, {})["kd_cwd"]
    torch.testing.assert_close(loss, 3 * torch.stack(levels).mean())


@pytest.mark.parametrize(("adapter", "kinds"), [("auto", [nn.Identity, nn.Conv2d]), ("always", [nn.Conv2d] * 2)])
def test_cwd__adapters_where_widths_differ_or_always(adapter: str, kinds: list[type[nn.Module]]) -> None:
    method = make("cwd", SHAPE, Shape(channels=(4, 9)), adapter=adapter)
    adapters = list(next(iter(method.children())))  # type: ignore[call-overload]
    assert [type(module) for module in adapters] == kinds
    student, teacher = random_taps(SHAPE, 0), random_taps(Shape(channels=(4, 9)), 1)
    torch.autograd.backward(total(method(student, teacher, {})))
    assert all(p.grad is not None for p in method.parameters())


def test_cwd__learns_to_agree_through_its_adapter() -> None:
    wide = Shape(channels=(7, 9))
    method, teacher = make("cwd", SHAPE, wide), random_taps(wide, 1)
    student = map_leaves(random_taps(SHAPE, 0, grad=True), lambda x: x)
    optimizer = torch.optim.Adam([*student.neck, *method.parameters()], lr=0.05)
    values = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = total(method(student, teacher, {}))
        torch.autograd.backward(loss)
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.2 * values[0]


@pytest.mark.parametrize("given", [{"tau": 0.0}, {"tau": "hot"}, {"normalise": 1}, {"adapter": "never"}])
def test_cwd__bad_arguments_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(given))}="):
        make("cwd", SHAPE, **given)


# ---- shared mathematics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_standardise__mean_0_variance_1_over_batch_and_cells(seed: int) -> None:
    z = standardise(random_map(seed, 3, 4, 2, 5) * 7 + 2)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.square().mean((0, 2, 3)), torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)


def test_standardise__a_flat_channel_stays_flat_with_a_finite_gradient() -> None:
    flat = torch.full((2, 1, 3, 3), 4.0, requires_grad=True)
    torch.autograd.backward(standardise(flat).square().sum())
    assert flat.grad is not None
    assert bool(torch.isfinite(flat.grad).all())
    assert float(channel_scale(flat.detach())) == pytest.approx(VARIANCE_FLOOR**-0.5)
