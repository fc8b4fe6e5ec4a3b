"""What the command line offers: every command with its keys. Data only; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from kd_yolo.command_help import BENCHMARK_KEYS, COMPARE_KEYS, EXPORT_KEYS, MODEL_KEY, TRAIN_KEYS, TRUST


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: One line for the overview.
        handler: ``module:function``; called with the parsed arguments, returns text and plain data.
        usage: What follows the command's name.
        keys: Own keys with their meaning, for the help text.
        stock: True when stock Ultralytics keys are accepted too.
        example: A command that works as written.
    """

    summary: str
    handler: str
    usage: str
    keys: dict[str, str]
    stock: bool = False
    example: str = ""


@dataclass(frozen=True)
class TaskHelp:
    """What ``train --help`` says of a task other than detection.

    Attributes:
        config: ``module:class`` of the model that checks its keys.
        notes: What else is accepted, one line each.
        example: A command that works as written.
        options: ``module:class`` of the model that checks ``kd.NAME``, where all of them are listed.
    """

    config: str
    notes: tuple[str, ...]
    example: str
    options: str = ""


TASK_CONFIGS = {
    "anomaly": TaskHelp(
        "kd_yolo.anomaly.settings:AnomalyConfig",
        ("Ultralytics' imgsz [256], batch [16], epochs [100, at least 2000 steps], lr0, device, project and so on",),
        "kd-yolo train task=anomaly data=surface-synth model=hkt imgsz=128 epochs=20",
        "kd_yolo.anomaly.spec:AnomalySpec",
    ),
    "classify": TaskHelp(
        "kd_yolo.classify.settings:ClassifyConfig",
        ("kd.NAME and schedule.NAME are arguments of the method; Ultralytics' own keys as for yolo classify train",),
        "kd-yolo train task=classify data=knock-synth model=lightnet-n-cls imgsz=128 epochs=20",
    ),
}

COMMANDS: dict[str, Command] = {
    "train": Command(
        "train a student, with a teacher beside it",
        "kd_yolo.commands:train",
        "data=neu.yaml [model=lightnet-s] [teacher=self|FILE|none] [method=kd-lightnet] [epochs=100] ...",
        TRAIN_KEYS,
        stock=True,
        example="kd-yolo train data=steel-synth imgsz=160 epochs=10",
    ),
    "val": Command(
        "validate a detector, classifier or anomaly model, checkpoint or exported file",
        "kd_yolo.commands:val",
        "model=best.pt data=neu.yaml [imgsz=224] [split=test]",
        {
            "model": MODEL_KEY,
            "data": "data set; needed",
            "category": "anomaly models: category of data=, or all",
            "threshold": "anomaly models: own, or f1: those of the best F1 on the labelled val images [own]",
            "out": "anomaly models: with threshold=f1, the checkpoint to write with them",
            "trust": TRUST,
        },
        stock=True,
        example="kd-yolo val model=runs/detect/train/weights/best.pt data=steel-synth imgsz=160 split=test",
    ),
    "predict": Command(
        "detect in images, folders or videos; classify them; look for anomalies",
        "kd_yolo.commands:predict",
        "model=best.pt source=FOLDER [imgsz=224] [conf=0.25]",
        {
            "model": MODEL_KEY,
            "source": "image, folder, video or camera number; needed",
            "anomaly": "an anomaly model beside the detector: marks what looks abnormal and no known class explains",
            "anomaly_conf": "with anomaly=: lowest confidence of such a region; 0.5 is its threshold [0.5]",
            "anomaly_imgsz": "with anomaly=: its canvas [its own]",
            "explained": "with anomaly=: share under detections from which a region is explained [0.5]",
            "min_area": "anomaly models: smallest region in pixels of the image [16 pixels of the canvas]",
            "save_json": "anomaly models: a JSON file for each image [with anomaly= true, else false]",
            "trust": TRUST,
        },
        stock=True,
        example="kd-yolo predict model=runs/detect/train/weights/best.pt source=photos/ imgsz=160",
    ),
    "deploy": Command(
        "merge branches into plain convolutions, checked; stock classes only",
        "kd_yolo.commands:deploy",
        "model=best.pt [out=FILE] [nms=true]",
        {
            "model": "checkpoint; needed",
            "out": "file to write [<model>-deploy.pt]",
            "nms": "true: NMS head; false: NMS-free head [true]",
            "trust": TRUST,
        },
        example="kd-yolo deploy model=runs/detect/train/weights/best.pt",
    ),
    "export": Command(
        "deploy, export and prove the file equal",
        "kd_yolo.commands:export",
        "model=best.pt [format=onnx|openvino|engine|...] [quantize=16|8] [data=neu.yaml]",
        EXPORT_KEYS,
        example="kd-yolo export model=runs/detect/train/weights/best.pt format=onnx imgsz=160",
    ),
    "benchmark": Command(
        "time, size and accuracy of several files in one table",
        "kd_yolo.commands:benchmark",
        "model=A,B,... [imgsz=224] [batch=1] [data=neu.yaml]",
        BENCHMARK_KEYS,
        example="kd-yolo benchmark model=best-deploy.pt,best.onnx imgsz=160",
    ),
    "compare": Command(
        "did distillation help? matched runs over seeds, paired differences, a verdict",
        "kd_yolo.commands:compare",
        "data=neu.yaml students=lightnet-n methods=none,kd-lightnet teacher=FILE|self [seeds=0,1,2] [epochs=100] ...",
        COMPARE_KEYS,
        stock=True,
        example="kd-yolo compare data=steel-synth students=lightnet-n methods=none,cwd teacher=self imgsz=160",
    ),
    "pretrain": Command(
        "let a student take over a pretrained detector, and learn from unlabeled images what it computes",
        "kd_yolo.start_commands:pretrain",
        "model=lightnet-s from=yolo26n.pt images=FOLDER [epochs=10]",
        {
            "model": "student: lightnet-n|s|m, a YAML or a .pt file; needed",
            "from": "pretrained detector; needed",
            "images": "folder of images without labels, or a data set, whose training images are taken; needed",
            "epochs": "passes over the images; 0: take over and fit only [10]",
            "imgsz": "canvas in pixels [160]",
            "batch, forced, lr0, lr_inherited, reparam, seed, device": "see docs/recipe.md",
            "out": "checkpoint to write [MODEL-from-PEER.pt]",
            "resume": "go on where an interrupted one with the same keys stopped [true]",
            "trust": TRUST,
        },
        example="kd-yolo pretrain model=lightnet-s from=yolo26n.pt images=photos/",
    ),
    "grow": Command(
        "grow a pretrained detector into a larger one that computes the same: a start for a stronger teacher",
        "kd_yolo.start_commands:grow",
        "model=yolo26n.pt [scale=s] [out=FILE]",
        {
            "model": "checkpoint of a stock detector; needed",
            "scale": "larger scale of its family [s]",
            "out": "file to write [MODEL-grown-SCALE.pt]",
            "seed": "seed of the draws [0]",
            "trust": TRUST,
        },
        example="kd-yolo grow model=yolo26n.pt scale=s",
    ),
    "data": Command(
        "check, convert, make or split a data set",
        "kd_yolo.commands:data",
        "check|convert|make|split key=value ...",
        {
            "check data= [imgsz=640] [out=sheet.png]": "find label, image and split errors; draw a contact sheet",
            "convert from=voc|masks|coco|deeppcb src= out=": "bring a published layout into YOLO form",
            "convert from=classes src= out= [kind=class|defect|folder]": "a folder for each class, for task=classify",
            "convert from=signals src= out= [sampling_rate_hz=]": "draw WAV, CSV, NPY or MATLAB recordings as pictures",
            "make out= [train=240] [val=60] [test=60] [seed=0]": "write the built-in synthetic steel set",
            "split data= out= [split=0.8/0.1/0.1|kfold:5|FOLDER] [group=REGEX]": "split again, leakage-free",
        },
        example="kd-yolo data check data=steel-synth",
    ),
    "models": Command("list models with size, cost and deployed convolutions", "kd_yolo.info_commands:models", "", {}),
    "methods": Command("list distillation methods with their arguments", "kd_yolo.info_commands:methods", "", {}),
    "targets": Command("list processors to build engines and estimate for", "kd_yolo.info_commands:targets", "", {}),
    "doctor": Command("check the environment and say what is missing", "kd_yolo.info_commands:doctor", "", {}),
    "demo": Command(
        "the whole line on built-in data, in minutes on two CPU cores",
        "kd_yolo.commands:demo",
        "[project=runs/demo] [epochs=...]",
        {
            "project": "folder for the results [runs/demo]",
            "epochs": "epochs of teacher and student each",
            "model": "student [lightnet-n]",
            "imgsz": "canvas in pixels",
        },
        example="kd-yolo demo",
    ),
}
