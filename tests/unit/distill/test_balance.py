from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_yolo.distill.balance import balance_factors, gradient_norm
from kd_yolo.errors import ConfigError, DistillationError


def a_graph(seed: int = 0) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """Return neck maps inside a graph (not leaves), a task loss and two terms of very different size."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    weights = [torch.randn(c, 3, 1, 1, generator=generator).requires_grad_() for c in (4, 5)]
    neck = [torch.nn.functional.conv2d(images[..., ::s, ::s], w) for s, w in zip((1, 2), weights, strict=True)]
    task = sum((x.sin().sum() for x in neck), torch.zeros(()))
    terms = {"kd_cls": 1e-4 * neck[0].square().mean(), "kd_box": 1e3 * (neck[0].cos().sum() + neck[1].exp().sum())}
    return neck, task, terms


def test_gradient_norm__golden_over_all_maps() -> None:
    # d/dx sum(3 x) = 3 in each of 4 cells, d/dy sum(4 y) = 4 in each of 4 cells: sqrt(4 * 9 + 4 * 16) = 10.
    x, y = torch.zeros(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 1, 2, 2, requires_grad=True)
    assert gradient_norm((3 * x).sum() + (4 * y).sum(), [x, y]) == pytest.approx(10.0)


def test_gradient_norm__zero_without_a_path_to_the_neck() -> None:
    x, other = torch.zeros(1, 1, 2, 2, requires_grad=True), torch.ones((), requires_grad=True)
    assert gradient_norm(torch.ones(()), [x]) == 0.0
    assert gradient_norm(2 * other, [x]) == 0.0


def test_gradient_norm__half_precision_maps_do_not_underflow() -> None:
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float16, requires_grad=True)
    tiny = (x.float() * 1e-7).sum()  # below float16's smallest normal number: rounded to 1.19e-7 when stored directly
    assert gradient_norm(tiny, [x]) == pytest.approx(2e-7, rel=1e-2)
    lost = (x.float() * 1e-8).sum()  # would be stored as 0
    assert gradient_norm(lost, [x]) == pytest.approx(2e-8, rel=1e-2)


@settings(deadline=None, max_examples=20)
@given(ratio=st.floats(0.01, 5.0), seed=st.integers(0, 20))
def test_balance_factors__each_scaled_term_pulls_r_times_the_task(ratio: float, seed: int) -> None:
    neck, task, terms = a_graph(seed)
    factors = balance_factors(terms, task, neck, ratio)
    assert list(factors) == list(terms)
    assert all(type(value) is float for value in factors.values())
    goal = ratio * gradient_norm(task, neck)
    for name, term in terms.items():
        assert gradient_norm(factors[name] * term, neck) == pytest.approx(goal, rel=1e-4)


def test_balance_factors__keeps_the_graph_and_writes_no_gradient() -> None:
    neck, task, terms = a_graph()
    inputs = [x.grad_fn for x in neck]
    balance_factors(terms, task, neck, 0.3)
    torch.autograd.backward(task + sum(terms.values(), torch.zeros(())))
    assert inputs == [x.grad_fn for x in neck]
    leaf = torch.zeros(1, 1, 2, 2, requires_grad=True)
    balance_factors({"kd": (2 * leaf).sum()}, (3 * leaf).sum(), [leaf], 0.3)
    assert leaf.grad is None


def test_balance_factors__no_terms_no_factors() -> None:
    neck, task, _ = a_graph()
    assert balance_factors({}, task, neck, 0.3) == {}


@pytest.mark.parametrize("term", ["constant", "zero gradient", "other input"])
def test_balance_factors__a_term_without_gradient_is_named(term: str) -> None:
    neck, task, terms = a_graph()
    dead = {
        "constant": torch.ones(()),
        "zero gradient": (0.0 * neck[0]).sum(),
        "other input": 2 * torch.ones((), requires_grad=True),
    }[term]
    with pytest.raises(DistillationError, match="distillation loss 'kd_dead' has no gradient on the neck"):
        balance_factors({**terms, "kd_dead": dead}, task, neck, 0.3)


def test_balance_factors__a_task_loss_without_gradient_is_named() -> None:
    neck, _, terms = a_graph()
    with pytest.raises(DistillationError, match="the task loss has no gradient"):
        balance_factors(terms, torch.ones(()), neck, 0.3)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_balance_factors__a_term_with_a_broken_gradient_is_named(factor: float) -> None:
    neck, task, terms = a_graph()
    with pytest.raises(DistillationError, match="'kd_cls' on the neck is not finite"):
        balance_factors({**terms, "kd_cls": (factor * neck[0]).sum()}, task, neck, 0.3)


@pytest.mark.parametrize("ratio", [0.0, -0.1, float("nan"), float("inf")])
def test_balance_factors__the_ratio_must_be_positive(ratio: float) -> None:
    neck, task, terms = a_graph()
    with pytest.raises(ConfigError, match="balance="):
        balance_factors(terms, task, neck, ratio)
