"""Labelled images with others behind them: what is taken apart and what is padded."""

from __future__ import annotations

import torch

from kd_yolo.distill.joined import take_images, with_background, with_boxes


def test_take_images__slices_every_tensor_of_nested_outputs() -> None:
    outputs = {"one2many": {"boxes": torch.arange(12).reshape(4, 3), "feats": [torch.arange(4)]}, "n": (1,)}
    first = take_images(outputs, slice(2))
    assert first["one2many"]["boxes"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert first["one2many"]["feats"][0].tolist() == [0, 1]
    assert first["n"] == (1,)
    chosen = take_images(outputs, torch.tensor([3, 1]))
    assert chosen["one2many"]["boxes"].tolist() == [[9, 10, 11], [3, 4, 5]]


def test_take_images__keeps_the_graph() -> None:
    values = torch.ones(3, 2, requires_grad=True)
    take_images({"x": values}, slice(1))["x"].sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1, 1], [0, 0], [0, 0]]


def test_with_background__pads_images_without_foreground() -> None:
    targets = {
        "fg_mask": torch.ones(2, 5, dtype=torch.bool),
        "target_labels": torch.full((2, 5), 7),
        "target_scores": torch.ones(2, 5, 3),
    }
    padded = with_background(targets, 3)
    assert padded["fg_mask"].shape == (5, 5)
    assert padded["target_scores"].shape == (5, 5, 3)
    assert padded["fg_mask"].dtype == torch.bool
    assert padded["target_labels"].dtype == torch.int64
    for name, values in padded.items():
        assert torch.equal(values[:2], targets[name])
        assert not values[2:].any()
    assert with_background({}, 3) == {}


def test_with_boxes__numbers_the_boxes_behind_the_labelled_images() -> None:
    batch = {
        "img": torch.zeros(2, 3, 4, 4),
        "bboxes": torch.full((1, 4), 0.5),
        "cls": torch.zeros(1, 1),
        "batch_idx": torch.tensor([1.0]),
    }
    found = {"bboxes": torch.full((2, 4), 0.25), "cls": torch.ones(2, 1), "batch_idx": torch.tensor([0.0, 2.0])}
    joined = with_boxes(batch, found, torch.zeros(5, 3, 4, 4))
    assert joined["batch_idx"].tolist() == [1.0, 2.0, 4.0]
    assert joined["cls"].flatten().tolist() == [0.0, 1.0, 1.0]
    assert joined["bboxes"].shape == (3, 4)
    assert len(joined["img"]) == 5
    assert batch["batch_idx"].tolist() == [1.0]  # the caller's batch is as it was


def test_with_boxes__without_boxes_or_labels_only_the_images_change() -> None:
    images = torch.zeros(3, 3, 4, 4)
    assert set(with_boxes({"img": images[:1]}, {"cls": torch.ones(1, 1)}, images)) == {"img"}
    batch = {"img": images[:1], "cls": torch.ones(1, 1), "bboxes": torch.ones(1, 4), "batch_idx": torch.zeros(1)}
    assert with_boxes(batch, {}, images)["cls"] is batch["cls"]
