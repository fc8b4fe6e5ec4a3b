"""Pretrain a student on images without labels: it learns to compute what a pretrained detector computes inside."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER, TQDM

from kd_yolo.checkpoints import DAMAGE, load_model, serialize
from kd_yolo.devices import parse_device
from kd_yolo.distill.teacher import fold_batchnorm
from kd_yolo.errors import ConfigError, DistillationError, ModelError, OutputError
from kd_yolo.files import check_writable, sha256, write_json, written_aside
from kd_yolo.nn.merging import merge, rep_blocks
from kd_yolo.nn.student import StudentSpec, build_student, student_spec
from kd_yolo.nn.warmstart import warm_start
from kd_yolo.pretrain.interrupted import damaged, identity, load_part, part_file, save_part
from kd_yolo.pretrain.report import PretrainReport
from kd_yolo.pretrain.settings import PretrainConfig
from kd_yolo.pretrain.stages import Adapters, Cut, find_cuts, settle_batchnorm, stage_losses
from kd_yolo.pretrain.views import Views, find_images
from kd_yolo.provenance import versions
from kd_yolo.tasks.canvas import check_canvas
from kd_yolo.tasks.peer import fits, inherits
from kd_yolo.tasks.start import narrow_on_images

WARM_UP_STEPS = 30
FINAL_SHARE = 0.01  # of the learning rate
CLIP_NORM = 10.0
WEIGHT_DECAY = 1e-4
CHECKED_IMAGES = 64
CHECK_EPOCH = 2**32 - 1  # whose views are measured on; no pretraining gets so far


@dataclass
class _State:
    """What is under way."""

    student: DetectionModel
    peer: DetectionModel
    adapters: Adapters
    cuts: list[Cut]
    optimizer: torch.optim.Optimizer
    device: torch.device
    share: float
    whole: bool  # the student computes what it took over, nothing in it is new
    epoch: int = 0


def pretrain(config: PretrainConfig) -> PretrainReport:
    """Pretrain, or go on where the same pretraining was stopped.

    On a CPU the weights of an interrupted and resumed pretraining equal those of an uninterrupted one, bit for bit.

    Raises:
        ConfigError: A canvas that is no multiple of the stride, an output that would overwrite its input, a device that
            is not there, or the state of an interrupted pretraining with other keys.
        DataError: No readable images, or too few.
        CheckpointError: The pretrained file, or the state of an interrupted pretraining, is missing, truncated, foreign
            or of another task.
        ModelError: The two networks share no stage, or do not read RGB images.
        OutputError: The result cannot be written.
        DistillationError: The loss became infinite.
    """
    started = time.time()
    device = parse_device(config.device)
    spec = student_spec(config.model, config.reparam, scratch=not config.model.endswith(".pt"), trust=config.trust)
    check_canvas(config.imgsz, spec.max_stride)
    source = Path(config.peer).expanduser().resolve()
    peer, _ = load_model(source, trust=config.trust)
    check_canvas(config.imgsz, max(spec.max_stride, int(peer.stride.max())))
    out = _checked_out(config, spec, source)
    files = find_images(config.images)
    torch.manual_seed(config.seed)
    state = _prepare(config, spec, source, peer, files, device)
    views = Views(files, config.imgsz, config.seed)
    held = _held_batches(views, config)
    if not state.whole:
        settle_batchnorm(state.student, held)
    state.adapters.fit(state.student.eval(), state.peer, state.cuts, held)
    before = _errors(state, held)
    part, name = part_file(out), identity(config, spec, source, files)
    if config.resume and part.is_file():
        _resume(state, part, name)
    for epoch in range(state.epoch, config.epochs):
        _epoch(state, views, config, epoch)
        state.epoch = epoch + 1
        save_part(part, name, _content(state))
    numbers = (len(files), config.epochs, config.imgsz)
    told = (config.model, source.name, sha256(source), state.share, *numbers, before, _errors(state, held))
    report = PretrainReport(out, *told, round(time.time() - started, 1))
    _write(state, config, report)
    part.unlink(missing_ok=True)
    return report


def _checked_out(config: PretrainConfig, spec: StudentSpec, source: Path) -> Path:
    """Return the absolute path of the result, which can be written and overwrites nothing that was not named."""
    name = config.out or f"{Path(config.model).stem}-from-{source.stem}.pt"
    out = Path(name).expanduser().resolve()
    if out.suffix != ".pt":
        raise ConfigError(f"out={name}: a checkpoint ends in .pt; choose another name")
    if out in {source, spec.weights}:
        raise ConfigError(f"out={name}: would overwrite what is read; choose another name")
    if out.is_dir():
        raise ConfigError(f"out={name}: is a folder; give the name of a file")
    if config.out is None and out.exists() and not part_file(out).is_file():
        raise ConfigError(f"{out}: exists already; give out=FILE, its own name to replace it")
    try:
        check_writable(out.parent)
    except OutputError as error:
        raise OutputError(f"{out.parent}: not writable; choose another place with out=FILE") from error
    return out


def _prepare(
    config: PretrainConfig,
    spec: StudentSpec,
    source: Path,
    peer: DetectionModel,
    files: list[Path],
    device: torch.device,
) -> _State:
    """Let the student take over what it can, find the cuts, and make both networks ready."""
    for name, cfg in ((config.model, spec.cfg), (source.name, peer.yaml)):
        if cfg.get("channels", 3) != 3:
            raise ModelError(f"{name}: reads {cfg['channels']} channels, but the images are RGB; take another model")
    peer = merge(peer, check=False)[0].float() if rep_blocks(peer) else peer
    student, share, inherited = _student(config, spec, source, peer, files)
    try:
        cuts = find_cuts(student, peer)
    except ModelError as error:
        raise ModelError(f"{config.model} from {source.name}: {error}") from error
    LOGGER.info(f"taught at {', '.join(cut.name for cut in cuts)} (part of the network / stride)")
    adapters = Adapters(cuts).to(device)
    student = student.to(device).requires_grad_(True)
    peer = fold_batchnorm(peer.eval()).requires_grad_(False).to(device)
    optimizer = torch.optim.AdamW(_groups(student, adapters, inherited, config), weight_decay=WEIGHT_DECAY)
    return _State(student, peer, adapters, cuts, optimizer, device, share, inherited == _rows(student))


def _student(
    config: PretrainConfig, spec: StudentSpec, source: Path, peer: DetectionModel, files: list[Path]
) -> tuple[DetectionModel, float, frozenset[str]]:
    """Return the student, the share of its parameters that is inherited, and the inherited layers."""
    if spec.weights is not None:
        return _own_weights(config, spec)
    student = spec.build(int(peer.model[-1].nc))
    student.names = dict(peer.names)
    said = inherits(spec.cfg)
    if said is not None and fits(peer, said):
        narrowed = narrow_on_images(student, peer, said.rows, files, config.imgsz)
        LOGGER.info(f"{config.model} from {source.name}: {narrowed.summary()}")
        return student, narrowed.share, _rows(student)
    report = warm_start(student, peer)
    meant = f", whose rows are those of {said.source}" if said is not None else ""
    LOGGER.info(f"{config.model}{meant}, from {source.name}: {report.summary()}")
    if not report.layers:
        LOGGER.warning(
            f"{source.name}: no layer has the role and shape of one in {config.model}, 0 % inherited; the student "
            f"starts from random weights{f', give from={said.source}.pt to take over all rows' if said else ''}"
        )
    return student, report.share, frozenset(report.layers)


def _own_weights(config: PretrainConfig, spec: StudentSpec) -> tuple[DetectionModel, float, frozenset[str]]:
    """Return a student that goes on from its own checkpoint, re-parameterized if that is asked for."""
    assert spec.weights is not None
    student, _ = load_model(spec.weights, trust=config.trust)
    LOGGER.info(f"{config.model}: goes on from its own weights, no others are taken over")
    if config.reparam is not None:
        channels = int(student.yaml.get("channels", 3))
        built = build_student(spec.cfg, student, int(student.model[-1].nc), channels, student.names, verbose=False)
        student = built if built is not None else student
    return student, 1.0, _rows(student)


def _rows(student: DetectionModel) -> frozenset[str]:
    return frozenset(f"model.{row}" for row in range(len(student.model)))


def _groups(
    student: DetectionModel, adapters: Adapters, inherited: frozenset[str], config: PretrainConfig
) -> list[dict[str, Any]]:
    """Return parameter groups: new layers at the full rate, inherited ones at a part of it; the head learns nothing."""
    head = f"model.{len(student.model) - 1}."
    new: list[nn.Parameter] = list(adapters.parameters())
    old: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if name.startswith(head):
            continue
        (old if any(name.startswith(f"{layer}.") for layer in inherited) else new).append(parameter)
    groups = [{"params": new, "factor": 1.0}, {"params": old, "factor": config.lr_inherited}]
    return [group for group in groups if group["params"]]


def _epoch(state: _State, views: Views, config: PretrainConfig, epoch: int) -> None:
    forced = epoch < round(config.forced * config.epochs)
    batches = views.epoch(epoch, config.batch)
    title = f"{epoch + 1}/{config.epochs} {'apart' if forced else 'joined'}"
    state.student.train()
    state.student.model[-1].eval()
    sums: dict[str, float] = {}
    for step, numbers in TQDM(list(enumerate(batches)), desc=title):
        _set_rate(state.optimizer, config, epoch * len(batches) + step, config.epochs * len(batches))
        images = views.batch(numbers, epoch).to(state.device)
        losses = stage_losses(state.student, state.peer, state.adapters, state.cuts, images, forced)
        state.optimizer.zero_grad()
        _total(losses).backward()
        nn.utils.clip_grad_norm_([p for g in state.optimizer.param_groups for p in g["params"]], CLIP_NORM)
        state.optimizer.step()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss.detach())
    LOGGER.info(f"{title}: {', '.join(f'{name} {value / len(batches):.3f}' for name, value in sums.items())}")


def _total(losses: dict[str, Tensor]) -> Tensor:
    """Return the sum of the stages' losses; raise when it is not finite."""
    value = torch.stack(list(losses.values())).sum()
    if not torch.isfinite(value):
        worst = next((name for name, loss in losses.items() if not torch.isfinite(loss)), "their sum")
        raise DistillationError(f"pretrain: the loss of {worst} is not finite; give a lower lr0= and resume=false")
    return value


def _set_rate(optimizer: torch.optim.Optimizer, config: PretrainConfig, step: int, steps: int) -> None:
    """Warm up linearly, then fall as a cosine."""
    warm = min((step + 1) / WARM_UP_STEPS, 1.0)
    fall = FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
    for group in optimizer.param_groups:
        group["lr"] = config.lr0 * group["factor"] * warm * fall


def _held_batches(views: Views, config: PretrainConfig) -> list[Tensor]:
    """Return fixed views that no epoch uses."""
    numbers = list(range(0, len(views.files), max(len(views.files) // CHECKED_IMAGES, 1)))[:CHECKED_IMAGES]
    parts = [numbers[i : i + config.batch] for i in range(0, len(numbers), config.batch)]
    if len(parts) > 1 and len(parts[-1]) == 1:  # BatchNorm cannot take statistics of one image's 1x1 maps
        parts[-2] += parts.pop()
    return [views.batch(part, CHECK_EPOCH) for part in parts]


@torch.no_grad()
def _errors(state: _State, held: list[Tensor]) -> dict[str, float]:
    """Return each stage's error, the mean over all held images."""
    state.student.eval()
    count = sum(map(len, held))
    sums: dict[str, float] = {}
    for images in held:
        losses = stage_losses(state.student, state.peer, state.adapters, state.cuts, images.to(state.device), False)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss) * len(images) / count
    return sums


def _content(state: _State) -> dict[str, Any]:
    parts = {"student": state.student, "adapters": state.adapters, "optimizer": state.optimizer}
    return {"epoch": state.epoch, **{name: part.state_dict() for name, part in parts.items()}}


def _resume(state: _State, part: Path, name: dict[str, Any]) -> None:
    """Take up what another process left, or refuse it when it belongs to other keys."""
    content = load_part(part, name)
    try:
        state.student.load_state_dict(content["student"])
        state.adapters.load_state_dict(content["adapters"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.epoch = int(content["epoch"])
    except (*DAMAGE, TypeError, AttributeError) as error:
        raise damaged(part) from error
    LOGGER.info(f"resuming after {state.epoch} epochs")


def _write(state: _State, config: PretrainConfig, report: PretrainReport) -> None:
    student = state.student.cpu().eval()
    student.args = {"imgsz": config.imgsz, "task": "detect"}
    content = serialize(student, {}, {"pretrain": report.provenance(), "versions": versions()})
    with written_aside(report.path) as aside:
        aside.write_bytes(content)
    write_json(report.path.with_suffix(".json"), report.to_dict())
