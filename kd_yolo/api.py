"""The same commands from Python: ``from kd_yolo import KDYOLO``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionPredictor
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT

from kd_yolo.anomaly.checkpoint import is_anomaly
from kd_yolo.checkpoints import load_model
from kd_yolo.config import split_train_keys
from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.errors import CheckpointError, ConfigError, ModelError
from kd_yolo.nn.lightnet import build_model
from kd_yolo.resources import builtin_names
from kd_yolo.runtimes import check_same_classes
from kd_yolo.runtimes.opening import FOLDER_NAMES, SUFFIXES, is_foreign
from kd_yolo.runtimes.ultralytics_backend import CanvasValidator, ExportedDetector
from kd_yolo.tasks.detect import KDTrainer

if TYPE_CHECKING:
    from kd_yolo.bench import BenchReport
    from kd_yolo.deploy import DeployReport
    from kd_yolo.export import ExportReport
    from kd_yolo.training import TrainReport

CHECKPOINT_KEYS = ("augment", "compile", "dnn", "embed", "visualize")  # what only a checkpoint can do


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
            model: ``lightnet-n|s|m``, a stock or own YAML, a ``.pt`` file, or an exported file or folder.
            trust: Load foreign pickled classes from a checkpoint.
            verbose: Print the layer table of a new model.

        Raises:
            CheckpointError: The file is missing, damaged, foreign or of another task.
            ModelError: The model cannot be built, or the exported file is damaged, no detector or from a newer version.
        """
        name = str(model)
        self._trust = trust
        path = Path(name)
        if is_anomaly(path):
            raise CheckpointError(f"{name}: is an anomaly model; use kd_yolo.inspection, see the page on Python")
        if name.endswith(".pt"):
            load_model(name, trust=trust)  # refuses what must not be unpickled; the parent class loads it again
        elif name in builtin_names("models"):
            name += ".yaml"  # even where a run's folder has that name
        elif not path.exists() and path.suffix not in {".yaml", ".yml"}:
            if path.suffix in SUFFIXES or path.name.endswith(tuple(FOLDER_NAMES)) or is_foreign(path):
                raise CheckpointError(f"{name}: no such file or folder")
            name += ".yaml"
        super().__init__(name, task="detect", verbose=verbose)

    @property
    def task_map(self) -> dict[str, dict[str, Any]]:
        """Map the detection task to our trainer."""
        return {
            "detect": {
                "model": DetectionModel,
                "trainer": KDTrainer,
                "validator": CanvasValidator,
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

        self._check_is_pytorch_model()
        model = str(self.ckpt_path) if self.ckpt_path else str(self.model_name).removesuffix(".yaml")
        own = {"data": "resumed"} if kwargs.get("resume") else {"model": model, "trust": self._trust}
        config, stock, groups = split_train_keys({**own, **kwargs})
        report = train(config, stock, groups)
        self._load(str(report.best), task="detect")
        return report

    def val(self, **kwargs: Any) -> Any:
        """Validate on the square canvas (``rect=False``), where exported files are judged too.

        Args:
            **kwargs: As ``kd-yolo val``. An exported file is judged on its own canvas unless ``imgsz`` says otherwise.

        Raises:
            DataError: The data set has other classes.
            ConfigError: An exported file cannot take a key.
        """
        if kwargs.get("data"):
            kwargs["data"] = str(resolve_dataset(str(kwargs["data"])))
            if not kwargs.get("single_cls"):
                check_same_classes(self.names, kwargs["data"], self.model_name)
        elif isinstance(self.model, ExportedDetector):
            raise ConfigError(f"{self.model_name}: an exported file knows no data set; give data=")
        given = self._opened({"rect": False, "plots": False, **kwargs})
        if isinstance(self.model, ExportedDetector):
            given["imgsz"] = max(given["imgsz"])  # see CanvasValidator
        return super().val(**given)

    def predict(self, source: Any = None, stream: bool = False, **kwargs: Any) -> Any:
        """Detect on the square canvas, so that ``.pt`` and exported files return the same boxes.

        Args:
            source: Image, folder, video, camera, array or a list of them.
            stream: Return a generator.
            **kwargs: As ``kd-yolo predict``. An exported file detects on its own canvas unless ``imgsz`` says
                otherwise.

        Raises:
            ConfigError: An exported file cannot take a key.
        """
        results = super().predict(source, stream, **self._opened({"rect": False, "save": False, **kwargs}))
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
        files = [str(self.ckpt_path or self.model_name), *map(str, others)]
        return benchmark(files, **{"trust": self._trust, **kwargs})

    def _load(self, weights: str, task: str | None = None) -> None:
        """Load a checkpoint as Ultralytics does; describe an exported file, which is opened when it is run."""
        path = Path(weights)
        if path.suffix == ".pt" or is_foreign(path):
            super()._load(weights, task=task)
            return
        self.model: Any = ExportedDetector(path)
        self.ckpt = None
        self.task = "detect"
        self.ckpt_path = self.model_name = weights
        self.overrides = {"model": weights, "task": "detect"}

    def _check_is_pytorch_model(self) -> None:
        """Refuse to train, merge or export an exported file.

        Raises:
            ModelError: It is one.
        """
        if isinstance(self.model, ExportedDetector):
            raise ModelError(
                f"{self.model_name}: is an exported file, which can predict, be validated and be timed; "
                "for anything else give the .pt checkpoint that it was exported from"
            )
        super()._check_is_pytorch_model()

    def _opened(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Open an exported file for a call; return the call's keys with the canvas and device that it gets."""
        model = self.model
        if not isinstance(model, ExportedDetector):
            return kwargs
        refused = [key for key in CHECKPOINT_KEYS if kwargs.get(key)]
        if refused:
            raise ConfigError(f"{refused[0]}={kwargs[refused[0]]}: only a .pt checkpoint can do that")
        if kwargs["rect"] and not model.description.dynamic:
            raise ConfigError(f"rect=true: {self.model_name} has a fixed canvas; export it with dynamic=true")
        head = model.description.head
        if kwargs.get("nms") is not None and bool(kwargs["nms"]) == (head == "nms-free"):
            raise ConfigError(f"nms={kwargs['nms']}: {self.model_name} has the head '{head}' for good; leave nms out")
        return {**kwargs, **model.open(kwargs.get("imgsz"), kwargs.get("device"))}

    def _new(self, cfg: str, task: str | None = None, verbose: bool = False) -> None:
        self.model = build_model(cfg, verbose=verbose)
        self.cfg = self.model_name = cfg
        self.task = task or "detect"
        self.overrides.update({"model": cfg, "task": self.task})
        self.model.args = {**DEFAULT_CFG_DICT, **self.overrides}
        self.model.task = self.task

    def _checkpoint(self, what: str) -> Path:
        self._check_is_pytorch_model()
        if not self.ckpt_path:
            raise ModelError(f"{self.model_name} is not trained: no checkpoint to {what}; train it or load a .pt file")
        return Path(str(self.ckpt_path))
