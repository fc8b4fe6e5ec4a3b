"""The same commands from Python: ``from kd_yolo import KDYOLO``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionPredictor, DetectionValidator
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT

from kd_yolo.checkpoints import load_model
from kd_yolo.config import split_train_keys
from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.errors import CheckpointError, ModelError
from kd_yolo.nn.lightnet import build_model
from kd_yolo.tasks.detect import KDTrainer

if TYPE_CHECKING:
    from kd_yolo.bench import BenchReport
    from kd_yolo.deploy import DeployReport
    from kd_yolo.export import ExportReport
    from kd_yolo.training import TrainReport

MODEL_FILES = {".pt", ".onnx", ".engine", ".xml", ".torchscript", ".yaml", ".yml"}


class KDPredictor(DetectionPredictor):
    """The stock predictor, but one that returns its results under any program name.

    Ultralytics takes a program whose name ends in "yolo" for its own command line and then calls ``predict_cli``, which
    returns nothing.
    """

    def predict_cli(self, source: Any = None, model: Any = None) -> Iterator[Any]:
        """Return the results as a generator instead of dropping them."""
        return self(source, model, stream=True)


class KDYOLO(YOLO):
    """An Ultralytics model with distillation, re-parameterized students and checked deployment.

    Everything of ``ultralytics.YOLO`` works. Training takes kd-yolo's keys too, validation and prediction use the
    square training canvas, and checkpoints are loaded restricted.

    Examples:
        >>> model = KDYOLO("lightnet-s")
        >>> model.train(data="steel-synth", imgsz=160, epochs=10)
        >>> model.deploy()
        >>> model.export(format="onnx", imgsz=160)
    """

    def __init__(self, model: str | Path = "lightnet-s", trust: bool = False, verbose: bool = False) -> None:
        """Load a checkpoint or exported file, or build an untrained model by name.

        Args:
            model: ``lightnet-n|s|m``, a stock or own YAML, a ``.pt`` file, or an exported file.
            trust: Load foreign pickled classes from a checkpoint.
            verbose: Print the layer table of a new model.

        Raises:
            CheckpointError: The file is missing, damaged, foreign or of another task.
            ModelError: The model cannot be built.
        """
        name = str(model)
        self._trust = trust
        if name.endswith(".pt"):
            load_model(name, trust=trust)  # refuses what must not be unpickled; the parent class loads it again
        elif Path(name).suffix in MODEL_FILES - {".yaml", ".yml"} and not Path(name).exists():
            raise CheckpointError(f"{name}: no such file")
        elif Path(name).suffix not in MODEL_FILES and not Path(name).exists():
            name += ".yaml"  # a built-in name
        super().__init__(name, task="detect", verbose=verbose)

    @property
    def task_map(self) -> dict[str, dict[str, Any]]:
        """Map the detection task to our trainer."""
        return {
            "detect": {
                "model": DetectionModel,
                "trainer": KDTrainer,
                "validator": DetectionValidator,
                "predictor": KDPredictor,
            }
        }

    def train(self, **kwargs: Any) -> TrainReport:
        """Train, with kd-yolo's and Ultralytics' keys, and load the best student.

        Args:
            **kwargs: As ``kd-yolo train``; dotted keys as a mapping: ``**{"kd.tau": 2}``.

        Raises:
            KDYoloError: Anything wrong with the input.
        """
        from kd_yolo.training import train

        model = str(self.ckpt_path) if self.ckpt_path else str(self.model_name).removesuffix(".yaml")
        own = {"data": "resumed"} if kwargs.get("resume") else {"model": model, "trust": self._trust}
        config, stock, groups = split_train_keys({**own, **kwargs})
        report = train(config, stock, groups)
        self._load(str(report.best), task="detect")
        return report

    def val(self, **kwargs: Any) -> Any:
        """Validate on the square canvas (``rect=False``), where exported files are judged too."""
        if kwargs.get("data"):
            kwargs["data"] = str(resolve_dataset(str(kwargs["data"])))
        return super().val(**{"rect": False, "plots": False, **kwargs})

    def predict(self, source: Any = None, stream: bool = False, **kwargs: Any) -> Any:
        """Detect on the square canvas, so that ``.pt`` and exported files return the same boxes."""
        results = super().predict(source, stream, **{"rect": False, "save": False, **kwargs})
        return results if stream or isinstance(results, list) else list(results)

    def deploy(self, out: str | Path | None = None, nms: bool = True) -> DeployReport:
        """Merge branches and write a checkpoint of stock classes; see ``kd_yolo.deploy.deploy``."""
        from kd_yolo.deploy import deploy

        return deploy(self._checkpoint("deploy"), out=None if out is None else Path(out), nms=nms, trust=self._trust)

    def export(self, format: str = "onnx", **kwargs: Any) -> ExportReport:
        """Deploy, export and prove the file equal; see ``kd_yolo.export.export``."""
        from kd_yolo.export import export

        if kwargs.get("data"):
            kwargs["data"] = str(resolve_dataset(str(kwargs["data"])))
        return export(self._checkpoint("export"), format=format, trust=self._trust, **kwargs)

    def benchmark(self, *others: str | Path, **kwargs: Any) -> BenchReport:
        """Time this file beside others; see ``kd_yolo.bench.benchmark``."""
        from kd_yolo.bench import benchmark

        if kwargs.get("data"):
            kwargs["data"] = str(resolve_dataset(str(kwargs["data"])))
        return benchmark([str(self.ckpt_path or self.model_name), *map(str, others)], **kwargs)

    def _new(self, cfg: str, task: str | None = None, verbose: bool = False) -> None:
        self.model = build_model(cfg, verbose=verbose)
        self.cfg = self.model_name = cfg
        self.task = task or "detect"
        self.overrides.update({"model": cfg, "task": self.task})
        self.model.args = {**DEFAULT_CFG_DICT, **self.overrides}
        self.model.task = self.task

    def _checkpoint(self, what: str) -> Path:
        if not self.ckpt_path:
            raise ModelError(f"{self.model_name} is not trained: no checkpoint to {what}; train it or load a .pt file")
        return Path(str(self.ckpt_path))
