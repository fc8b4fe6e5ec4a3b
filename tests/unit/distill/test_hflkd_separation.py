"""Separated logits (softmax and sigmoid) and logit standardisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from taps_factory import Shape, foreground, random_taps
from torch import Tensor

from kd_yolo.distill.methods.hflkd import irrelevant_weight
from kd_yolo.distill.ops.logits import MASKED_LOGIT
from kd_yolo.distill.ops.separation import assigned_targets, separated_kl, separation_loss, target_loss
from kd_yolo.distill.ops.standardize import standardize_logits
from kd_yolo.errors import ConfigError, DistillationError

SHAPE = Shape()


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def softmax_kl(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    log_p, log_q = (teacher / tau).log_softmax(1), (student / tau).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


@pytest.mark.parametrize("classes", [2, 3, 5, 100])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_separated_kl__adds_up_to_the_whole_divergence(classes: int, tau: float) -> None:
    student, teacher = draw(7, classes), draw(7, classes, seed=1)
    target = torch.arange(7) % classes
    relevant, irrelevant = separated_kl(student, teacher, target, tau)
    p_y = (teacher / tau).softmax(1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(relevant + (1 - p_y) * irrelevant, softmax_kl(student, teacher, tau), rtol=0, atol=1e-5)
    assert float(irrelevant.abs().max()) == 0.0 if classes == 2 else float(irrelevant.min()) > 0


def test_separated_kl__a_target_at_the_wrong_place_breaks_the_identity() -> None:
    student, teacher, target = draw(7, 5), draw(7, 5, seed=1), torch.arange(7) % 5
    relevant, irrelevant = separated_kl(student, teacher, (target + 1) % 5)
    p_y = teacher.softmax(1).gather(1, target[:, None]).squeeze(1)
    assert float((relevant + (1 - p_y) * irrelevant - softmax_kl(student, teacher, 1.0)).abs().max()) > 1e-2


def test_separated_kl__certain_logits_stay_finite_with_gradient() -> None:
    student = torch.tensor([[80.0, -40.0, -40.0]], requires_grad=True)
    relevant, irrelevant = separated_kl(student, torch.tensor([[-60.0, 70.0, 0.0]]), torch.tensor([0]))
    torch.autograd.backward((relevant + irrelevant).sum())
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())
    assert float(relevant.detach()) == pytest.approx(120.0 - 0.693, abs=0.01)  # log 1 - log(2 exp(-120))


def test_separation_loss__released_mode_divides_by_the_batch_once_more() -> None:
    student, teacher, target, tau = draw(6, 5), draw(6, 5, seed=1), torch.arange(6) % 5, 5.0
    # The released sums, written with F.kl_div: batchmean, then tau^2 / B.
    one_hot = F.one_hot(target, 5).bool()
    p, q = (teacher / tau).softmax(1), (student / tau).softmax(1)

    def pair(x: Tensor) -> Tensor:
        return torch.stack([x[one_hot], 1 - x[one_hot]], 1)

    rel = F.kl_div(pair(q).log(), pair(p), reduction="batchmean") * tau**2 / 6
    rest = [(x / tau - 1000.0 * one_hot).softmax(1) for x in (student, teacher)]
    irr = F.kl_div(rest[0].clamp_min(1e-300).log(), rest[1], reduction="batchmean") * tau**2 / 6
    torch.testing.assert_close(separation_loss(student, teacher, target, tau, released=True), (rel, irr))
    torch.testing.assert_close(separation_loss(student, teacher, target, tau), (6 * rel, 6 * irr))


def test_assigned_targets__class_and_score_of_the_foreground_alone() -> None:
    batch, scores = foreground(SHAPE), random_taps(SHAPE, 0).scores
    found = assigned_targets(batch, scores)
    assert found is not None
    assert torch.equal(found[0], batch["target_labels"])
    assert torch.equal(found[1], batch["target_scores"].amax(2))
    plain = assigned_targets({k: v for k, v in batch.items() if k != "target_scores"}, scores)
    assert plain is not None
    assert torch.equal(plain[1], batch["fg_mask"].float())


@pytest.mark.parametrize("missing", ["fg_mask", "target_labels"])
def test_assigned_targets__none_without_an_assigner(missing: str) -> None:
    batch = {k: v for k, v in foreground(SHAPE).items() if k != missing}
    assert assigned_targets(batch, random_taps(SHAPE, 0).scores) is None


@pytest.mark.parametrize("key", ["fg_mask", "target_labels", "target_scores"])
def test_assigned_targets__other_anchors_are_refused_with_both_shapes(key: str) -> None:
    batch = foreground(SHAPE)
    batch[key] = batch[key][:, :-1]
    with pytest.raises(DistillationError, match=rf"{key} is \(2, 12.*\(2, 13"):
        assigned_targets(batch, random_taps(SHAPE, 0).scores)


def test_target_loss__golden() -> None:
    # One image, two classes, two anchors: anchor 0 has class 1 and weight 3, anchor 1 class 0 and weight 1.
    student = torch.tensor([[[9.0, 0.0], [0.0, 9.0]]])
    teacher = torch.tensor([[[-9.0, 2.0], [1.0, -9.0]]])
    p = torch.tensor([1.0, 2.0]).sigmoid()
    kb = p * (2 * p).log() + (1 - p) * (2 * (1 - p)).log()  # q = 1/2
    loss = target_loss(student, teacher, torch.tensor([[1, 0]]), torch.tensor([[3.0, 1.0]]), 1.0)
    assert float(loss) == pytest.approx(float((3 * kb[0] + kb[1]) / 4), rel=1e-6)


def test_irrelevant_weight__leaves_out_the_target_and_what_is_unknown() -> None:
    teacher = torch.tensor([[[0.0, -9.0], [2.0, -9.0], [MASKED_LOGIT, MASKED_LOGIT]]])
    labels, strength = torch.tensor([[1, 1]]), torch.tensor([[0.7, 0.0]])  # anchor 0 foreground, anchor 1 not
    weight = irrelevant_weight(teacher, (labels, strength), 1.0, 0.01)
    torch.testing.assert_close(weight, torch.tensor([[[0.5, 0.01], [0.0, 0.01], [0.0, 0.0]]]))
    everything = irrelevant_weight(teacher, None, 2.0, 0.01)
    torch.testing.assert_close(everything[0, 1], torch.tensor([float(torch.tensor(2.0).sigmoid()) ** 2, 1e-4]))


def test_standardize_logits__mean_0_variance_1_over_the_classes() -> None:
    scores = draw(2, 5, 4)
    result = standardize_logits(scores)
    expected = (scores - scores.mean(1, keepdim=True)) / scores.std(1, unbiased=False, keepdim=True)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(standardize_logits(3 * scores + 7), result, rtol=1e-5, atol=1e-6)


def test_standardize_logits__mask_counts_and_poison_does_not() -> None:
    scores, mask = draw(2, 5, 4), torch.tensor([True, False, True, True, False])
    poisoned = scores.masked_fill(~mask[:, None], float("nan")).requires_grad_()
    result = standardize_logits(poisoned, mask)
    torch.testing.assert_close(result[:, mask], standardize_logits(scores[:, mask]))
    assert float(result[:, ~mask].detach().abs().max()) == 0.0
    torch.autograd.backward((result * draw(2, 5, 4, seed=2)).sum())
    assert poisoned.grad is not None
    assert float(poisoned.grad[:, ~mask].abs().max()) == 0.0
    assert bool(torch.isfinite(poisoned.grad).all())


def test_standardize_logits__equal_logits_are_0_with_a_finite_gradient() -> None:
    scores = torch.full((1, 3, 2), -4.6, requires_grad=True)
    result = standardize_logits(scores)
    assert float(result.detach().abs().max()) == 0.0
    torch.autograd.backward(result[0, 0].sum())
    assert scores.grad is not None
    assert bool(torch.isfinite(scores.grad).all())


def test_standardize_logits__gradcheck() -> None:
    scores, mask = draw(1, 4, 2).requires_grad_(), torch.tensor([True, True, False, True])
    assert torch.autograd.gradcheck(standardize_logits, (scores, mask))


@pytest.mark.parametrize(("classes", "mask"), [(1, None), (3, [False, True, False])])
def test_standardize_logits__one_class_is_refused(classes: int, mask: list[bool] | None) -> None:
    with pytest.raises(ConfigError, match=r"standardize=true needs at least 2 classes.*found 1.*standardize=false"):
        standardize_logits(draw(1, classes, 2), None if mask is None else torch.tensor(mask))
