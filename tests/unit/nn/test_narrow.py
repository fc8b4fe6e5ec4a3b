from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nn_factory import randomise_bn
from torch import Tensor, nn
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from kd_yolo.checkpoints import load_model
from kd_yolo.errors import ModelError
from kd_yolo.images import textured_images, to_canvas
from kd_yolo.nn import narrow as narrowing
from kd_yolo.nn import narrowing_blocks
from kd_yolo.nn import refit as refitting
from kd_yolo.nn.blocks import RepBlock
from kd_yolo.nn.growing_channels import Channels, joined, repeated
from kd_yolo.nn.lightnet import build_model
from kd_yolo.nn.merging import max_errors, random_images, raw_outputs
from kd_yolo.nn.narrow import check_rows, narrow
from kd_yolo.nn.narrow_report import NarrowReport
from kd_yolo.nn.narrowing_blocks import Narrowing, tie
from kd_yolo.nn.narrowing_sites import Samples
from kd_yolo.nn.refit import install, refit
from kd_yolo.nn.surgery import reparameterize

FAMILIES = ["yolo26n.yaml", "yolo11n.yaml", "yolov8n.yaml"]
ATTENTION = 10  # row of YOLO26 and YOLO11 that a student may leave out


def network(
    name: str = "yolo26n.yaml", width: float = 0.125, nc: int = 6, seed: int = 0, **keys: Any
) -> DetectionModel:
    """Return a stock family's network of another width, in float64 and eval mode, with random BatchNorm statistics."""
    cfg: dict[str, Any] = yaml_model_load(name)
    cfg |= {"scales": {"t": [cfg["scales"]["n"][0], width, 1024]}, "scale": "t", **keys}
    torch.manual_seed(seed)
    model = build_model(cfg, nc=nc).double().eval()
    randomise_bn(model, seed)
    return model


def student(width: float = 0.09375, reparam: str | None = "qarep", seed: int = 1) -> tuple[DetectionModel, list[int]]:
    """Return a YOLO26 of another width without attention, and the rows it stands for."""
    cfg: dict[str, Any] = yaml_model_load("yolo26n.yaml")
    cfg |= {"scales": {"t": [0.5, width, 1024]}, "scale": "t"}
    del cfg["backbone"][ATTENTION]
    for row in cfg["head"]:
        if isinstance(row[0], list):
            row[0] = [index - (index >= ATTENTION) if index > 0 else index for index in row[0]]
    cfg["head"][-2][3] = [1024, False]  # its C3k2 holds a Bottleneck and an attention: here the Bottleneck alone
    cfg["head"][-2][1] = 1
    if reparam:
        cfg["kd_yolo"] = {"reparam": reparam, "scope": "body"}
    torch.manual_seed(seed)
    model = build_model(cfg, nc=6).double()
    return model, [row for row in range(24) if row != ATTENTION]


def pictures(count: int = 16, px: int = 64, seed: int = 0) -> Tensor:
    return to_canvas(textured_images(count, (px, px), seed), (px, px)).double()


def difference(first: DetectionModel, second: DetectionModel) -> float:
    images = random_images(first, imgsz=64)
    with torch.no_grad():
        return max_errors(raw_outputs(first.eval(), images), raw_outputs(second.eval(), images))[1]


def same(first: nn.Module, second: nn.Module) -> bool:
    values = second.state_dict()
    return all(torch.equal(value, values[name]) for name, value in first.state_dict().items())


@pytest.fixture(scope="module")
def source() -> DetectionModel:
    return network()


@pytest.fixture(scope="module")
def narrowed(source: DetectionModel) -> tuple[DetectionModel, NarrowReport, list[int]]:
    target, rows = student()
    return target, narrow(target, source, rows, pictures(32)), rows


@pytest.mark.parametrize("name", FAMILIES)
def test_narrow__same_structure_is_the_source_itself(name: str) -> None:
    model, target = network(name), network(name, seed=1)
    assert difference(model, target) > 1e-3
    report = narrow(target, model, range(len(model.model)), pictures(8))
    assert difference(model, target) < 1e-9
    assert max(*report.before, *report.after) < 1e-18
    assert report.share == 1.0
    assert same(model, target)  # BatchNorm statistics of the source included


@pytest.mark.parametrize("form", ["qarep", "repvgg", "multi"])
def test_narrow__same_structure_with_branches_is_the_source_itself(form: str, source: DetectionModel) -> None:
    target = network(seed=1)
    reparameterize(target, form)
    report = narrow(target, source, range(24), pictures(8))
    assert difference(source, target) < 1e-9
    assert 0.5 < report.share < 1.0


def test_narrow__a_reparameterized_source_is_merged_first(source: DetectionModel) -> None:
    model = copy.deepcopy(source)
    reparameterize(model, "repvgg")
    randomise_bn(model, 3)
    target = network(seed=1)
    narrow(target, model, range(24), pictures(8))
    assert difference(model, target) < 1e-9
    assert any(isinstance(module, RepBlock) for module in model.modules())


def test_narrow__refit_beats_slicing(narrowed: tuple[DetectionModel, NarrowReport, list[int]]) -> None:
    _, report, _ = narrowed
    assert report.images == 28
    assert report.held_out == 4
    # random weights amplify what slicing loses; on images that the fit has not seen, refitting ends 1e4 times nearer
    assert all(after < before / 1000 for before, after in zip(report.before, report.after, strict=True))


def test_narrow__source_stays_and_report_counts(
    narrowed: tuple[DetectionModel, NarrowReport, list[int]], source: DetectionModel
) -> None:
    target, report, _ = narrowed
    assert same(source, network())
    assert target.training  # as it was
    assert all(torch.isfinite(value).all() for value in target.state_dict().values())
    assert report.source_parameters == sum(parameter.numel() for parameter in source.parameters())
    assert report.parameters == sum(parameter.numel() for parameter in target.parameters())
    plain, rows = student(reparam=None)
    assert narrow(plain, source, rows, pictures(8)).share == 1.0
    assert json.loads(json.dumps(report.to_dict()))["share"] == report.share
    assert "% inherited" in report.summary()
    assert "\n" not in report.summary()


def test_narrow__statistics_are_those_of_the_fitted_images(
    source: DetectionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[nn.Module] = []

    def noted(site: Any, *rest: Any) -> None:
        fitted.append(site.target)
        install(site, *rest)

    monkeypatch.setattr(refitting, "install", noted)
    target, rows = student()
    narrow(target, source, rows, pictures(16))
    seen, _ = narrowing._split(pictures(16))
    stems: dict[nn.Module, Tensor] = {}
    layers: list[Any] = [module for module in fitted if not isinstance(module, nn.Conv2d)]
    for module in layers:
        module.conv.register_forward_hook(lambda conv, inputs, output: stems.update({conv: output}))
    with torch.no_grad():
        narrowing._run(target.eval(), torch.cat([seen, seen.flip(3)]))
    assert len(stems) == len(layers) > 80
    for module in layers:
        z = stems[module.conv]
        assert torch.allclose(z.mean((0, 2, 3)), module.bn.running_mean, rtol=1e-6, atol=1e-8)
        assert torch.allclose(z.var((0, 2, 3), correction=0), module.bn.running_var, rtol=1e-6, atol=1e-8)
    # what lost nothing keeps the statistics that the source had from its own training
    first: Any = target.model[0]
    assert first not in fitted
    assert torch.equal(first.bn.running_mean, source.model[0].bn.running_mean)


def test_narrow__deterministic_for_a_seed(
    narrowed: tuple[DetectionModel, NarrowReport, list[int]], source: DetectionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Samples.__init__, "__defaults__", (100, 0))  # few positions, so that the seed matters
    models: list[DetectionModel] = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(models))
        target, rows = student()
        state = torch.random.get_rng_state()
        narrow(target, source, rows, pictures(8), seed=seed)
        assert torch.equal(state, torch.random.get_rng_state())
        models.append(target)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_narrow__float32_and_half_targets(source: DetectionModel) -> None:
    for dtype in (torch.float32, torch.float16):
        target, rows = student()
        report = narrow(target.to(dtype), source, rows, pictures(8).float())
        assert {parameter.dtype for parameter in target.parameters()} == {dtype}
        assert all(after < before for before, after in zip(report.before, report.after, strict=True))


def with_dead_channels(name: str, width: float, kept: float) -> DetectionModel:
    """Return a network in which every channel that a narrower one would leave out is always 0."""
    model = network(name, width)
    walk = Narrowing(narrowing._importance(model, pictures(8)))
    with torch.no_grad():
        narrowing._fill(network(name, kept, seed=1), model, range(len(model.model)), walk)
        for site in walk.sites:
            if isinstance(site.source, Conv):
                dead = torch.ones(site.outputs.width, dtype=torch.bool)
                dead[site.outputs.source] = False
                site.source.bn.weight[dead] = 0.0
                site.source.bn.bias[dead] = 0.0
    return model


@pytest.mark.parametrize(("name", "width", "kept"), [("yolov8n.yaml", 0.125, 0.09375), ("yolo26n.yaml", 0.25, 0.125)])
def test_narrow__dead_channels_are_left_out_and_nothing_is_lost(name: str, width: float, kept: float) -> None:
    # halves, shortcuts, pools, concatenations over rows, depthwise convolutions, and with YOLO26 one of two heads
    model, target = with_dead_channels(name, width, kept), network(name, kept, seed=1)
    report = narrow(target, model, range(len(model.model)), pictures(8))
    assert max(report.before) < 1e-18
    assert difference(model, target) < 1e-9


def test_narrow__whole_heads_of_an_attention_are_kept() -> None:
    model, target = network(width=0.25), network(width=0.125, seed=1)  # 2 heads of 64 channels to 1
    walk = Narrowing(narrowing._importance(model, pictures(8)))
    with torch.no_grad():
        narrowing._fill(target, model, range(24), walk)
    attention = next(site for site in walk.sites if site.source is model.model[10].m[0].attn.qkv)
    start = int(attention.outputs.source[0])
    assert start in (0, 128)
    assert attention.outputs.source.tolist() == list(range(start, start + 128))


def test_tie__channels_that_a_shortcut_adds_are_chosen_together(source: DetectionModel) -> None:
    zeros = {module: torch.zeros(module.conv.out_channels) for module in source.modules() if isinstance(module, Conv)}
    rows: Any = source.model
    chain, half = rows[6].m[0], rows[2].c
    zeros[rows[2].m[0].cv2] += 1.0  # added to the second half of the first convolution
    zeros[chain.m[0].cv2] += 1.0  # both Bottlenecks of a C3k add to what its first convolution writes
    zeros[chain.m[1].cv2] += 2.0
    zeros[rows[9].cv2] += 4.0  # SPPF adds what it reads, which row 8 writes
    tie(zeros, source)
    assert zeros[rows[2].cv1].tolist() == [0.0] * half + [1.0] * half
    assert set(zeros[chain.cv1].tolist()) == {3.0}
    assert set(zeros[rows[8].cv2].tolist()) == {4.0}
    assert set(zeros[rows[6].cv1].tolist()) == {0.0}


# Deliberately wrong twins: each must be found by the errors in the report.


def shuffled(site: Any, x: Tensor, positions: Tensor, expected: Tensor, ridge: float) -> None:
    """Refit to the channels of the source in another order."""
    refit(site, x, positions, expected.roll(1, 1), ridge)


def elsewhere(site: Any, x: Tensor, positions: Tensor, expected: Tensor, ridge: float) -> None:
    """Refit to what the source writes at other positions."""
    refit(site, x, positions, expected.roll(len(expected) // 3, 0), ridge)


def joined_in_turn(parts: list[Channels]) -> Channels:
    """Take the first channels of a concatenation, whichever its parts chose."""
    return repeated(sum(part.width for part in parts), sum(len(part) for part in parts))


def halves_swapped(parts: list[Channels]) -> Channels:
    """Concatenate in another order."""
    return joined(parts[::-1])


@pytest.mark.parametrize("wrong", [shuffled, elsewhere])
def test_narrow__errors_show_a_wrong_refit(
    wrong: Callable[..., None],
    narrowed: tuple[DetectionModel, NarrowReport, list[int]],
    source: DetectionModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(narrowing, "refit", wrong)
    target, rows = student()
    report = narrow(target, source, rows, pictures(32))
    assert report.before == narrowed[1].before
    assert all(bad > 3 * good for bad, good in zip(report.after, narrowed[1].after, strict=True))


@pytest.mark.parametrize("wrong", [joined_in_turn, halves_swapped])
def test_narrow__dead_channels_show_a_wrong_slice(
    wrong: Callable[..., Channels], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_dead_channels("yolov8n.yaml", 0.125, 0.09375)
    monkeypatch.setattr(narrowing_blocks, "joined", wrong)
    report = narrow(network("yolov8n.yaml", 0.09375, seed=1), model, range(len(model.model)), pictures(8))
    assert max(report.before) > 0.1


# What does not fit.


def refused(
    match: str, target: DetectionModel, source: DetectionModel, rows: Any, images: Tensor | None = None
) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        narrow(target, source, rows, pictures(8) if images is None else images)
    assert "\n" not in str(caught.value)
    if images is None:  # then it is the networks, which are refused before there are images
        with pytest.raises(ModelError, match=match):
            check_rows(target, source, rows)


def test_narrow__refuses_rows_that_do_not_fit(source: DetectionModel) -> None:
    target, rows = student()
    refused("22 rows are given for the target's 23", target, source, rows[:-1])
    refused("row 24 is not one of the source's rows 0 to 23", target, source, [*rows[:-1], 24])
    refused("row -1 is not one of", target, source, [*rows[:-1], -1])
    refused("the source's row 4 is given twice", target, source, [4 if row == 6 else row for row in rows])
    refused("stands for row 10 of the source, whose head is row 23", target, source, [*rows[:-1], 10])
    swapped = [{0: 2, 2: 0}.get(row, row) for row in rows]
    refused("row 0 for the source's row 2 does not fit: it reads what stands for row -1", target, source, swapped)


def test_narrow__refuses_other_kinds(source: DetectionModel) -> None:
    cfg = copy.deepcopy(source.yaml)
    cfg["backbone"][8] = [-1, 1, "Conv", [1024, 1, 1]]
    target = build_model(cfg, nc=6).double()
    refused(r"row 8 for the source's row 8 \(C3k2\) does not fit: it has a Conv where", target, source, range(24))
    cfg = copy.deepcopy(source.yaml)
    cfg["backbone"][8][3] = [1024, False]
    target = build_model(cfg, nc=6).double()
    refused("it has a Bottleneck where the source has a C3k", target, source, range(24))
    cfg["backbone"][8] = [-1, 4, "C3k2", [1024, True]]
    target = build_model(cfg, nc=6).double()
    refused("it has 2 blocks in a chain, the source 1", target, source, range(24))
    cfg = copy.deepcopy(source.yaml)
    cfg["backbone"][3][3] = [256, 5, 2]
    refused("another kernel or stride", build_model(cfg, nc=6).double(), source, range(24))
    cfg = copy.deepcopy(source.yaml)
    cfg["head"][0][3] = [None, 2, "bilinear"]
    refused("it has mode=bilinear, the source nearest", build_model(cfg, nc=6).double(), source, range(24))


def test_narrow__refuses_wider_targets_and_other_classes(source: DetectionModel) -> None:
    refused("row 0 .* is wider than the source", network(width=0.25), source, range(24))
    refused(r"\(Detect\) does not fit: it has nc=2, the source 6", network(nc=2), source, range(24))
    refused("it has reg_max=16, the source 1", network(reg_max=16), source, range(24))
    refused("has lost its branch one2one_cv2", network(end2end=False), source, range(24))
    narrow_head = network(width=0.1875)
    refused("head_dim=", narrow_head, network(width=0.25), range(24))


def test_narrow__refuses_fused_and_other_networks(source: DetectionModel) -> None:
    target, rows = student()
    refused("the source is fused", target, copy.deepcopy(source).fuse(verbose=False), rows)
    other = copy.deepcopy(source)
    other.model[-1] = nn.Identity()
    refused("the target has a Identity head", other, source, range(24))


def test_narrow__refuses_images_it_cannot_use(source: DetectionModel) -> None:
    target, rows = student()
    for count in (0, 7):
        refused(f"{count} images are too few", target, source, rows, pictures(8)[:count])
    refused(r"images of shape \(8, 1, 64, 64\)", target, source, rows, pictures(8)[:, :1])
    refused("in torch.uint8", target, source, rows, (255 * pictures(8)).byte())
    refused("must be in 0..1", target, source, rows, 255 * pictures(8))
    refused("must be in 0..1", target, source, rows, pictures(8).fill_(torch.nan))
    refused("must be multiples of 32", target, source, rows, pictures(8)[..., :60])


def test_narrow__refuses_a_source_without_finite_values(source: DetectionModel) -> None:
    broken = copy.deepcopy(source)
    with torch.no_grad():
        broken.model[22].cv2.bn.bias.fill_(torch.nan)
    target, rows = student()
    refused("not finite", target, broken, rows, pictures(8))


def test_split__thins_out_evenly_and_holds_out_one_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(100.0).view(100, 1, 1, 1).expand(100, 1, 32, 32)
    fitted, held = narrowing._split(images)
    assert (len(fitted), len(held)) == (88, 12)
    monkeypatch.setattr(narrowing, "MAX_PIXELS", 2 * 40 * 32 * 32)
    fitted, held = narrowing._split(images)
    assert (len(fitted), len(held)) == (35, 5)
    kept = torch.cat([fitted, held])[:, 0, 0, 0].sort().values
    assert kept[0] == 0
    assert kept[-1] == 99
    assert float(kept.diff().max()) <= 3


def test_narrow__pretrained_weights_survive() -> None:
    shared = Path(os.environ.get("KD_YOLO_SHARED", Path(__file__).parents[4] / "shared"))
    file = shared / "weights" / "yolo26n-coco-rebuilt.pt"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    model = load_model(file)[0].float()
    cfg, rows = student(0.1875)
    target = build_model(cfg.yaml, nc=80)
    report = narrow(target, model, rows, pictures(24, 96).float())
    assert min(report.before) > 0.5
    assert max(report.after) < 0.3
