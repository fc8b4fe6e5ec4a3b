from __future__ import annotations

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.errors import ModelError
from kd_yolo.nn.lightnet import build_model
from kd_yolo.pretrain.stages import Adapters, Cut, find_cuts, run_rows, settle_batchnorm, stage_losses

ONE_LEVEL = {
    "nc": 2,
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]],
    "head": [[[-1], 1, "Detect", ["nc"]]],
}


def some_images(count: int = 2, side: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def lively(name: str, seed: int) -> DetectionModel:
    """Return a random network whose BatchNorms know its activations: without that they fade from row to row."""
    torch.manual_seed(seed)
    model = build_model(name, nc=3).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    run_rows(model, some_images(8), [])
    return model.eval()


@pytest.fixture(scope="module")
def peer() -> DetectionModel:
    return lively("yolo26n.yaml", 1)


@pytest.fixture(scope="module")
def student() -> DetectionModel:
    return lively("lightnet-n", 2)


# Rows by hand from the YAML files: the last row of the backbone at each stride, and what Detect reads. The peer's last
# backbone row is C2PSA, 10; in YOLOv8 it is SPPF, 9. LightNet-m has its own layout.
@pytest.mark.parametrize(
    ("name", "other", "rows"),
    [
        ("lightnet-n", "yolo26n", [(2, 2), (4, 4), (6, 6), (9, 10), (15, 16), (18, 19), (21, 22)]),
        ("lightnet-s", "yolo26n", [(2, 2), (4, 4), (6, 6), (9, 10), (15, 16), (18, 19), (21, 22)]),
        ("lightnet-m", "yolo26n", [(2, 2), (4, 4), (8, 6), (16, 10), (27, 16), (32, 19), (37, 22)]),
        ("lightnet-s", "yolov8n", [(2, 2), (4, 4), (6, 6), (9, 9), (15, 15), (18, 18), (21, 21)]),
    ],
)
def test_find_cuts__rows_of_known_networks(name: str, other: str, rows: list[tuple[int, int]]) -> None:
    models = build_model(name, nc=3), build_model(f"{other}.yaml", nc=3)
    cuts = find_cuts(*models)
    assert [cut.name for cut in cuts] == [
        *(f"backbone/{s}" for s in (4, 8, 16, 32)),
        *(f"head/{s}" for s in (8, 16, 32)),
    ]
    assert [(cut.student, cut.peer) for cut in cuts] == rows
    maps = [run_rows(model.eval(), some_images(1), range(len(model.model) - 1)) for model in models]
    for cut in cuts:
        assert maps[0][cut.student].shape[1:] == (cut.student_channels, 64 // cut.stride, 64 // cut.stride)
        assert maps[1][cut.peer].shape[1:] == (cut.peer_channels, 64 // cut.stride, 64 // cut.stride)


def test_find_cuts__no_common_level(peer: DetectionModel) -> None:
    with pytest.raises(ModelError, match=r"head reads strides \[4\].*\[8, 16, 32\].*share none"):
        find_cuts(DetectionModel(ONE_LEVEL, verbose=False), peer)


def test_find_cuts__leaves_the_mode_as_it_was(student: DetectionModel, peer: DetectionModel) -> None:
    student.train()
    find_cuts(student, peer)
    assert student.training
    assert not peer.training
    student.eval()


def test_run_rows__equals_the_networks_own_pass(peer: DetectionModel) -> None:
    found: dict[int, torch.Tensor] = {}
    handles = [
        peer.model[row].register_forward_hook(lambda module, _, output: found.update({module.i: output}))
        for row in (4, 10, 16, 22)
    ]
    with torch.no_grad():
        peer(some_images())
        for handle in handles:
            handle.remove()
        mine = run_rows(peer, some_images(), (4, 10, 16, 22))
    assert all(torch.equal(found[row], mine[row]) for row in (4, 10, 16, 22))


@torch.no_grad()
def test_stage_losses__forced_stages_do_not_see_the_ones_before(peer: DetectionModel) -> None:
    student = lively("lightnet-n", 3)
    cuts = find_cuts(student, peer)
    adapters = Adapters(cuts)

    def losses(forced: bool) -> dict[str, float]:
        found = stage_losses(student, peer, adapters, cuts, some_images(), forced)
        return {name: float(loss) for name, loss in found.items()}

    before = {forced: losses(forced) for forced in (True, False)}
    for parameter in student.model[1].parameters():
        parameter.mul_(1.7)
    after = {forced: losses(forced) for forced in (True, False)}
    first, *later = before[True]
    assert first == "backbone/4"
    assert after[True][first] != before[True][first]
    assert {name: after[True][name] for name in later} == {name: before[True][name] for name in later}
    assert all(after[False][name] != before[False][name] for name in (first, *later))


def test_stage_losses__forced_gradients_stay_in_their_stage(peer: DetectionModel) -> None:
    student = lively("lightnet-n", 3).train()
    cuts = find_cuts(student, peer)
    adapters = Adapters(cuts)
    for forced in (True, False):
        student.zero_grad()
        stage_losses(student, peer, adapters, cuts, some_images(), forced)["backbone/16"].backward()  # type: ignore[no-untyped-call]
        reached = {int(name.split(".")[1]) for name, p in student.named_parameters() if p.grad is not None}
        assert reached == ({5, 6} if forced else set(range(7)))


@torch.no_grad()
@pytest.mark.parametrize("forced", [True, False])
def test_stage_losses__nothing_is_left_when_the_student_is_the_peer(peer: DetectionModel, forced: bool) -> None:
    cuts = find_cuts(peer, peer)
    assert all(
        type(adapter) is nn.Identity for part in (Adapters(cuts).out, Adapters(cuts).back) for adapter in part.values()
    )
    found = stage_losses(peer, peer, Adapters(cuts), cuts, some_images(), forced)
    assert {name: float(loss) for name, loss in found.items()} == dict.fromkeys(found, 0.0)


@torch.no_grad()
def test_stage_losses__one_is_knowing_nothing(student: DetectionModel, peer: DetectionModel) -> None:
    """An adapter that says the mean of the peer's map everywhere leaves exactly its variance."""
    cuts = [cut for cut in find_cuts(student, peer) if cut.name == "head/16"]
    adapters = Adapters(cuts)
    target = run_rows(peer, some_images(), [cuts[0].peer])[cuts[0].peer]
    adapter = adapters.out["head16"]
    assert isinstance(adapter, nn.Conv2d)
    assert adapter.bias is not None
    adapter.weight.zero_()
    adapter.bias.fill_(float(target.mean()))
    found = stage_losses(student, peer, adapters, cuts, some_images(), forced=False)
    assert float(found["head/16"]) == pytest.approx(1.0, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("split", [1, 3])
def test_fit__equals_least_squares(student: DetectionModel, peer: DetectionModel, split: int) -> None:
    """Against LAPACK with the ridge as further rows: r * n * I on the centred inputs is sqrt(r n) I below them."""
    cut = next(cut for cut in find_cuts(student, peer) if cut.name == "backbone/8")
    adapters = Adapters([cut])
    images = some_images(3)
    adapters.fit(student, peer, [cut], images.chunk(split))
    x = run_rows(student, images, [cut.student])[cut.student].transpose(0, 1).flatten(1).T.double()
    y = run_rows(peer, images, [cut.peer])[cut.peer].transpose(0, 1).flatten(1).T.double()
    for adapter, inputs, outputs in ((adapters.out["backbone8"], x, y), (adapters.back["backbone8"], y, x)):
        assert isinstance(adapter, nn.Conv2d)
        assert adapter.bias is not None
        centred, wanted = inputs - inputs.mean(0), outputs - outputs.mean(0)
        ridge = 1e-3 * centred.square().mean() * len(centred)
        rows = torch.cat([centred, ridge.sqrt() * torch.eye(centred.shape[1], dtype=torch.float64)])
        expected = torch.linalg.lstsq(rows, torch.cat([wanted, wanted.new_zeros(centred.shape[1], wanted.shape[1])]))
        assert torch.allclose(adapter.weight.flatten(1).double(), expected.solution.T, atol=1e-5, rtol=1e-4)
        bias = outputs.mean(0) - inputs.mean(0) @ expected.solution
        assert torch.allclose(adapter.bias.double(), bias, atol=1e-5, rtol=1e-4)
        plain = torch.linalg.lstsq(centred, wanted).solution
        left, least = ((wanted - centred @ solution).square().mean() for solution in (expected.solution, plain))
        assert least <= left <= 1.1 * least + 1e-3 * wanted.square().mean()


def test_fit__leaves_identities_alone(peer: DetectionModel) -> None:
    cuts = [Cut("backbone", 8, 4, 4, 128, 128)]
    adapters = Adapters(cuts)
    adapters.fit(peer, peer, cuts, [some_images()])
    assert not list(adapters.parameters())


@torch.no_grad()
def test_settle_batchnorm__evaluation_then_computes_what_training_does(peer: DetectionModel) -> None:
    """On one batch both differ only by the unbiased variance; a fresh network is far off, and its adapters with it."""
    torch.manual_seed(4)
    fresh = build_model("lightnet-n", nc=3).eval()
    images = some_images(8, 128)
    cuts = find_cuts(fresh, peer)

    def after_fit() -> float:
        adapters = Adapters(cuts)
        adapters.fit(fresh.eval(), peer, cuts, [images])
        losses = stage_losses(fresh.train(), peer, adapters, cuts, images, forced=False)
        return max(float(loss) for loss in losses.values())

    twin = {name: value.clone() for name, value in fresh.state_dict().items()}
    unsettled = after_fit()
    fresh.load_state_dict(twin)
    momenta = [m.momentum for m in fresh.modules() if isinstance(m, nn.BatchNorm2d)]
    settle_batchnorm(fresh.eval(), [images])
    assert not fresh.training
    assert [m.momentum for m in fresh.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    assert all(torch.equal(twin[name], value) for name, value in fresh.named_parameters())
    settled = after_fit()
    assert settled < 0.5 * unsettled, (settled, unsettled)
