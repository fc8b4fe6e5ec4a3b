"""Distillation terms of classifiers: golden values, identities, gradients, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from class_factory import taps
from torch import Tensor

from kd_yolo.classify.hflkd import HFLKD, one_to_all
from kd_yolo.classify.methods import ClassTaps, build_method, list_methods, load_method, parse_args
from kd_yolo.distill.ops.matching import attend
from kd_yolo.distill.ops.separation import separated_kl
from kd_yolo.errors import ConfigError


def hflkd(classes: int = 4, student: int = 16, teacher: int = 16, seed: int = 0, **args: object) -> HFLKD:
    method = build_method("hflkd", args, student, teacher, classes, seed=seed)
    assert isinstance(method, HFLKD)
    return method


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


# ---- logits ----------------------------------------


@pytest.mark.parametrize("classes", [3, 5, 100])
def test_separated_kl__sums_to_the_whole_divergence(classes: int) -> None:
    """KL(p_t || p_s) = L_rel + (1 - p_y) L_irr, for every sample."""
    rng = torch.Generator().manual_seed(classes)
    student, teacher = (4 * torch.randn(64, classes, generator=rng) for _ in range(2))
    target = torch.randint(classes, (64,), generator=rng)
    relevant, irrelevant = separated_kl(student, teacher, target)
    whole = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1)
    p_y = teacher.softmax(1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(relevant + (1 - p_y) * irrelevant, whole, atol=1e-5, rtol=1e-5)


def test_hflkd__two_classes_have_no_irrelevant_part() -> None:
    student, teacher, target = taps(classes=2)
    terms = hflkd(2)(student, teacher, target).terms
    assert float(terms["hflkd_irr"].detach()) == 0.0
    assert float(terms["hflkd_rel"].detach()) > 0


def test_kd__golden_value() -> None:
    """Teacher logits (ln 3, 0), student (0, 0), tau 1: p = (3/4, 1/4), q = (1/2, 1/2).

    KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.304099 - 0.173287 = 0.130812.
    """
    feature = torch.zeros(1, 1, 1, 1)
    teacher = ClassTaps(feature, torch.tensor([[math.log(3.0), 0.0]]))
    student = ClassTaps(feature, torch.zeros(1, 2))
    method = build_method("kd", {"tau": 1.0, "weight": 2.0}, 1, 1, 2)
    assert float(method(student, teacher, torch.tensor([0])).terms["kd_kl"]) == pytest.approx(2 * 0.130812, abs=1e-5)


def test_kd__gradient_does_not_fade_with_temperature() -> None:
    """tau^2 makes up for the gradient's 1 / tau^2: from 5 to 50 it changes by less than a tenth."""
    norms = []
    for tau in (5.0, 50.0):
        student, teacher, target = taps()
        loss = total(build_method("kd", {"tau": tau}, 16, 16, 4)(student, teacher, target).terms)
        norms.append(float(torch.autograd.grad(loss, student.feature)[0].norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.2)


def test_dkd__is_the_weighted_separation() -> None:
    student, teacher, target = taps()
    method = build_method("dkd", {"alpha": 3.0, "beta": 5.0, "tau": 2.0, "weight": 0.5}, 16, 16, 4)
    relevant, other = separated_kl(student.logits, teacher.logits, target, 2.0)
    terms = method(student, teacher, target).terms
    torch.testing.assert_close(terms["dkd_target"], 0.5 * 3 * 4 * relevant.mean())
    torch.testing.assert_close(terms["dkd_other"], 0.5 * 5 * 4 * other.mean())


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_logit_methods__zero_at_equality_and_standardised(name: str) -> None:
    student, _, target = taps()
    same = ClassTaps(student.feature, student.logits.detach())
    shifted = ClassTaps(student.feature, 5 * student.logits.detach() + 3)
    plain, z_scored = (build_method(name, {"standardize": on}, 16, 16, 4) for on in (False, True))
    assert float(total(plain(student, same, target).terms).detach()) == pytest.approx(0.0, abs=1e-6)
    assert float(total(plain(student, shifted, target).terms).detach()) > 0.1
    assert float(total(z_scored(student, shifted, target).terms).detach()) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("classes", [3, 5])
def test_hflkd__repo_mode_divides_by_the_batch_twice(classes: int) -> None:
    student, teacher, target = taps(batch=6, classes=classes)
    terms = hflkd(classes, mode="repo", weighting="fixed", tau=5.0)(student, teacher, target).terms
    relevant, irrelevant = separated_kl(student.logits, teacher.logits, target, 5.0)
    torch.testing.assert_close(terms["hflkd_rel"], 25 / 6 * relevant.mean())
    torch.testing.assert_close(terms["hflkd_irr"], 25 / 6 * irrelevant.mean())
    fixed = hflkd(classes, tau=5.0)(student, teacher, target).terms
    torch.testing.assert_close(fixed["hflkd_rel"], 25 * relevant.mean())


def test_hflkd__defaults_follow_the_number_of_classes() -> None:
    assert (hflkd(6).tau, hflkd(100).tau) == (5.0, 4.0)
    assert (hflkd(6).gains["hflkd_irr"], hflkd(100).gains["hflkd_irr"]) == (2.0, 8.0)
    repo = hflkd(6, mode="repo")
    assert (repo.weighting, repo.query, repo.embed) == ("frozen", "student", "teacher")
    assert hflkd(6, mu=0.0).terms == ("hflkd_feat", "hflkd_irr")


# ---- one-to-all features ----------------------------------------


def weights_of(query: Tensor, key: Tensor, heads: int, scale: float = 1.0) -> Tensor:
    """Return M, (B, h, N, N), by letting the unit vectors be what is mixed."""
    positions = query.shape[2]
    unit = torch.eye(positions).expand(query.shape[0], -1, -1)
    mixed = attend(query, key, unit.repeat(1, heads, 1), heads, scale)
    return mixed.reshape(-1, heads, positions, positions).transpose(2, 3)


def test_attend__rows_sum_to_one_and_columns_follow_the_keys() -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 8, 5, generator=rng) for _ in range(2))
    weights = weights_of(student, teacher, 2)
    torch.testing.assert_close(weights.sum(3), torch.ones(2, 2, 5))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(weights_of(student, teacher[..., order], 2), weights[..., order])


def test_attend__golden_without_the_square_root() -> None:
    """One head, d = 4: <q, k> is 1 or 0, and the scale sqrt(d) undoes 1 / sqrt(d)."""
    query = torch.tensor([[[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    key = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    found = weights_of(query, key, 1, scale=2.0)[0, 0, 0]
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0]).softmax(0))


@pytest.mark.parametrize("query", ["student", "teacher"])
def test_one_to_all__single_position_is_plain_mse(query: str) -> None:
    rng = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(3, 8, 1, generator=rng) for _ in range(2))
    found = one_to_all(student, teacher, query, 8, 7.0)  # type: ignore[arg-type]
    torch.testing.assert_close(found, F.mse_loss(student, teacher))


def test_one_to_all__equal_maps_and_sharp_similarity_give_zero() -> None:
    rng = torch.Generator().manual_seed(2)
    same = F.normalize(torch.randn(2, 32, 6, generator=rng), dim=1) * 3
    assert float(one_to_all(same, same, "teacher", 1, 100.0)) < 1e-6
    assert float(one_to_all(same, same, "teacher", 1, 0.0)) > 0.1  # the twin that averages everything


def test_feature_loss__fixed_mode_can_be_learned_and_repo_mode_cannot() -> None:
    """The released target is whitened, the student's map is not negative: half of the target is out of reach."""
    rng = torch.Generator().manual_seed(3)
    teacher = torch.randn(8, 16, 3, 3, generator=rng).relu()
    free = torch.randn(8, 16, 3, 3, generator=rng).requires_grad_()
    losses = {}
    for mode in ("fixed", "repo"):
        method = hflkd(mode=mode, sharpness=10.0)
        parameters = [free, *(p for p in method.parameters() if mode == "fixed")]
        optimizer = torch.optim.Adam(parameters, lr=0.05)
        for _ in range(80):
            optimizer.zero_grad()
            loss = method.feature_loss(free.relu(), teacher)
            torch.autograd.backward(loss)
            optimizer.step()
        losses[mode] = float(loss.detach())
    assert losses["repo"] >= 0.45
    assert losses["fixed"] < 0.15


@pytest.mark.parametrize(("student", "teacher"), [(16, 32), (32, 16), (24, 24)])
@pytest.mark.parametrize("embed", ["student", "teacher"])
def test_hflkd__other_widths_and_sizes(student: int, teacher: int, embed: str) -> None:
    mine, _, target = taps(channels=student, size=5)
    _, theirs, _ = taps(channels=teacher, size=3)
    terms = hflkd(4, student, teacher, embed=embed)(mine, theirs, target).terms
    assert set(terms) == {"hflkd_feat", "hflkd_rel", "hflkd_irr"}
    assert all(bool(torch.isfinite(value)) for value in terms.values())


def test_hflkd__grid_limits_the_positions() -> None:
    student, teacher, target = taps(size=6)
    coarse = hflkd(grid=1)(student, teacher, target).terms["hflkd_feat"]
    fine = hflkd()(student, teacher, target).terms["hflkd_feat"]
    assert float(coarse) != pytest.approx(float(fine))


# ---- weighting ----------------------------------------


def trained(method: HFLKD, steps: int = 4, batch: int = 8) -> tuple[dict[str, bool], list[Tensor]]:
    """Return which parameters changed, and the terms of the last step over their gains."""
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    values: list[Tensor] = []
    for step in range(steps):
        student, teacher, target = taps(batch=batch, seed=step)
        optimizer.zero_grad()
        found = method(student, teacher, target)
        torch.autograd.backward(total(found.terms))
        optimizer.step()
        values = [value.detach() for value in found.terms.values()]
    changed = {name: not torch.equal(p.detach(), before[name]) for name, p in method.named_parameters()}
    return changed, values


@pytest.mark.parametrize("mode", ["regularised", "bilevel"])
def test_weighting__trains_predictor_and_projection(mode: str) -> None:
    changed, _ = trained(hflkd(weighting=mode))
    assert changed["projection.weight"]
    assert changed["logit_scale"]
    assert all(changed[name] for name in changed if name.startswith("predictor.") and name.endswith("11.bias"))


def test_weighting__uncertainty_trains_one_number_a_term_and_skips_zero_terms() -> None:
    method = hflkd(2, weighting="uncertainty")
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for step in range(5):
        student, teacher, target = taps(classes=2, seed=step)
        optimizer.zero_grad()
        torch.autograd.backward(total(method(student, teacher, target).terms))
        optimizer.step()
    learned = dict(zip(method.terms, method.log_variance.tolist(), strict=True))
    assert learned["hflkd_irr"] == 0.0  # two classes: it says nothing
    assert learned["hflkd_feat"] != 0.0


def test_weighting__frozen_never_changes_and_lets_its_gradient_through() -> None:
    method = hflkd(mode="repo")
    changed, _ = trained(method)
    assert not any(changed.values())  # the released optimizer has neither G nor the projection
    student, teacher, target = taps()
    found = method(student, teacher, target)
    assert found.task_factor is not None
    assert 0 < float(found.task_factor.detach()) < 1
    assert torch.autograd.grad(found.task_factor, student.feature)[0].abs().max() > 0


@pytest.mark.parametrize("seed", range(5))
def test_weighting__regularised_stays_in_bounds(seed: int) -> None:
    method = hflkd(weighting="regularised", w_low=0.2, w_high=1.5, kappa=50.0)
    plain = hflkd()
    plain.load_state_dict(method.state_dict(), strict=False)
    optimizer = torch.optim.SGD(method.predictor.parameters(), lr=1.0)
    for step in range(6):
        student, teacher, target = taps(seed=10 * seed + step)
        optimizer.zero_grad()
        found, unit = method(student, teacher, target).terms, plain(student, teacher, target).terms
        for name in found:
            weight = float(found[name].detach() / unit[name].detach())
            assert 0.2 - 1e-5 <= weight <= 1.5 + 1e-5
        torch.autograd.backward(total(found))
        optimizer.step()


def test_weighting__learned_weights_do_not_collapse() -> None:
    """Joint training on the summed loss would drive every weight to 0; the regularised objective holds them near 1."""
    method = hflkd(weighting="regularised", kappa=1.0)
    optimizer = torch.optim.Adam(method.predictor.parameters(), lr=0.01)
    unit = hflkd()(*taps(batch=8)).terms["hflkd_rel"]
    for _ in range(60):
        student, teacher, target = taps(batch=8)
        optimizer.zero_grad()
        found = method(student, teacher, target).terms
        torch.autograd.backward(total(found))
        optimizer.step()
    assert 0.5 < float(found["hflkd_rel"].detach() / unit.detach()) < 1.5


def test_weighting__adds_no_gradient_to_the_student() -> None:
    gradients = []
    for mode in ("fixed", "regularised"):
        student, teacher, target = taps()
        method = hflkd(weighting=mode, w_low=0.999999, w_high=1.000001)
        loss = total(method(student, teacher, target).terms)
        gradients.append(torch.autograd.grad(loss, student.feature)[0])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_bilevel__single_image_keeps_the_weights() -> None:
    changed, _ = trained(hflkd(weighting="bilevel"), steps=2, batch=1)
    assert not any(value for name, value in changed.items() if name.startswith("predictor."))


# ---- every method ----------------------------------------


@pytest.mark.parametrize("name", list_methods())
def test_method__weight_zero_is_zero_and_teacher_gets_no_gradient(name: str) -> None:
    student, teacher, target = taps()
    for tensor in (teacher.feature, teacher.logits):
        tensor.requires_grad_()
    loss = total(build_method(name, {}, 16, 16, 4)(student, teacher, target).terms)
    torch.autograd.backward(loss)
    assert teacher.feature.grad is None
    assert teacher.logits.grad is None
    assert student.feature.grad is not None
    assert float(total(build_method(name, {"weight": 0.0}, 16, 16, 4)(student, teacher, target).terms)) == 0.0


@pytest.mark.parametrize("name", list_methods())
def test_method__half_precision_inputs_give_float32_losses(name: str) -> None:
    student, teacher, target = taps()
    low = ClassTaps(student.feature.bfloat16(), student.logits.bfloat16())
    for value in build_method(name, {}, 16, 16, 4)(low, teacher, target).terms.values():
        assert value.dtype == torch.float32
        assert bool(torch.isfinite(value))


@pytest.mark.parametrize("name", list_methods())
def test_method__order_of_images_does_not_matter(name: str) -> None:
    student, teacher, target = taps(batch=6)
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    turned = [ClassTaps(one.feature[order], one.logits[order]) for one in (student, teacher)]
    method = build_method(name, {}, 16, 16, 4)
    first = method(student, teacher, target).terms
    second = method(turned[0], turned[1], target[order]).terms
    for key in first:
        torch.testing.assert_close(first[key], second[key], atol=1e-5, rtol=1e-4)


def test_build_method__leaves_the_random_stream_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = hflkd(seed=1)
    torch.testing.assert_close(torch.rand(3), expected)
    assert torch.equal(first.projection.weight, hflkd(seed=1).projection.weight)
    assert not torch.equal(first.projection.weight, hflkd(seed=2).projection.weight)


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("hflk", {}, "did you mean 'hflkd'"),
        ("kd", {"taw": 1.0}, "did you mean 'tau'"),
        ("kd", {"tau": 0.0}, "tau=0.0"),
        ("hflkd", {"weighting": "joint"}, "weighting='joint'"),
        ("hflkd", {"mode": "paper"}, "mode='paper'"),
        ("dkd", {"alpha": float("nan")}, "alpha"),
    ],
)
def test_parse_args__refuses(name: str, args: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_args(name, args)


def test_hflkd__nothing_to_distil_is_refused() -> None:
    with pytest.raises(ConfigError, match="all 0"):
        hflkd(alpha=0.0, mu=0.0, nu=0.0)
    assert load_method("hflkd") is HFLKD
