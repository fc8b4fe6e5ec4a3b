"""Which recipe teaches the default student best? A designed search on the validation split, never on test.

    python benchmarks/recipe_search.py teacher=yolo26n-neu.pt data=neu trials=16

``teacher`` is the one of ``neu_table.py``. Needs ``pip install optuna``. Two stages, both on validation:

1. **Screen.** The default before the search and each of its neighbours in ``FIRST``, then what Optuna's TPE sampler
   proposes from ``SPACE``. One seed a recipe (``SCREEN_SEED``, which no table uses). A run whose best epoch so far lies
   in the lowest quarter after ``GRACE`` of its epochs is stopped.
2. **Confirm.** The ``top`` best recipes and the default are trained on ``CONFIRM_SEEDS``; the highest mean over these
   wins. The default stays when nothing beats it by more than ``MARGIN`` points: one seed of many always looks good.

Interrupt it whenever you like: the same command goes on; one at a time in a folder. Other keys: model=, epochs=,
imgsz=, batch=, jobs=, threads=, device=, top=, out=.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from single_runs import best_so_far, run_of, train

from kd_yolo.compare.job import Job, JobResult, run_job
from kd_yolo.config import parse_pairs, refuse_unknown
from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.errors import ConfigError, KDYoloError
from kd_yolo.files import write_json, write_text
from kd_yolo.tables import markdown_table

HERE = Path(__file__).resolve().parent
# What is searched; the first value of each is the default when the search began.
SPACE: dict[str, list[Any]] = {
    "balance": [0.5, 0.25, 1.0, 2.0],
    "kd.alpha": [0.5, 0.0, 1.0],
    "kd.one2one": [False, True],
    "schedule.decay": ["constant", "cosine"],
    "mosaic": [0.0, 0.5],
    "optimizer": ["auto", "AdamW 0.0005", "AdamW 0.002"],
    "warmup_epochs": [3.0, 1.0],
    "nbs": [64, 32],
}
DEFAULT = {key: values[0] for key, values in SPACE.items()}
FIRST: tuple[dict[str, Any], ...] = (
    {},
    {"nbs": 32},
    {"kd.one2one": True},
    {"schedule.decay": "cosine"},
    {"mosaic": 0.5},
    {"balance": 2.0},
)
SCREEN_SEED = 100
CONFIRM_SEEDS = (101, 102)
GRACE = 0.6  # of the epochs
MARGIN = 0.3  # points of mAP50-95
KEYS: dict[str, Any] = {
    "data": "neu",
    "teacher": "",
    "model": "lightnet-n",
    "epochs": 8,
    "imgsz": 128,
    "batch": 32,
    "trials": 16,
    "top": 3,
    "jobs": 2,
    "threads": 1,
    "device": "cpu",
    "out": "runs/recipe-search",
}
POLL_S = 2.0
SETTLED = {TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING}


def main() -> None:
    """Run both stages and write ``recipe_search.json`` and ``.md``."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    stop = threading.Event()

    def end(*_: Any) -> None:
        stop.set()  # ends the trainings in order; the next call resumes them
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        keys = checked(parse_pairs(sys.argv[1:]))
        out = Path(str(keys["out"])).resolve()
        out.mkdir(parents=True, exist_ok=True)
        study = screen(keys, out, stop)
        content = summary(study, confirm(study, keys, out), keys)
    except KDYoloError as error:
        sys.exit(f"recipe_search.py: {error}")
    except KeyboardInterrupt:
        sys.exit("recipe_search.py: stopped; the same command goes on")
    write_json(HERE / "recipe_search.json", content)
    write_text(HERE / "recipe_search.md", page(content))
    print(page(content))


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all keys, files with absolute paths.

    Raises:
        KDYoloError: An unknown key, a number that is none, a data set or teacher that is not there.
    """
    refuse_unknown(given, KEYS, "recipe_search.py")
    keys = {**KEYS, **given}
    for key in ("epochs", "imgsz", "batch", "trials", "top", "jobs", "threads"):
        if not isinstance(keys[key], int) or keys[key] < 1:
            raise ConfigError(f"{key}={keys[key]}: a whole number of at least 1 is needed")
    if not Path(str(keys["teacher"])).is_file():
        raise ConfigError(f"teacher={keys['teacher']}: no such file; give the trained teacher of neu_table.py")
    return keys | {"data": str(resolve_dataset(str(keys["data"]))), "teacher": str(Path(keys["teacher"]).absolute())}


def screen(keys: Mapping[str, Any], out: Path, stop: threading.Event) -> optuna.Study:
    """Propose and run recipes until there are as many as asked for.

    Raises:
        KDYoloError: A run failed.
    """
    study = optuna.create_study(
        study_name=job_of(DEFAULT, SCREEN_SEED, keys, out).name,  # another setting is another study
        storage=JournalStorage(JournalFileBackend(str(out / "search.log"))),
        sampler=optuna.samplers.TPESampler(multivariate=True, n_startup_trials=len(FIRST) + 4),
        pruner=optuna.pruners.PercentilePruner(75.0, 5, math.ceil(GRACE * keys["epochs"])),
        direction="maximize",
        load_if_exists=True,
    )
    take_up(study)
    for change in FIRST:
        study.enqueue_trial({**DEFAULT, **change}, skip_if_exists=True)
    left = int(keys["trials"]) - len(ended(study))
    study.optimize(
        lambda trial: objective(trial, keys, out, stop),
        n_trials=max(0, left),
        n_jobs=int(keys["jobs"]),
        callbacks=[show],
        catch=(KDYoloError,),
    )
    if len(ended(study)) < int(keys["trials"]):
        raise KDYoloError("a run of the screen failed, see the logs in the folder of runs; the same command goes on")
    return study


def ended(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that were trained to their end or stopped for being poor."""
    return [t for t in study.get_trials(deepcopy=False) if t.state in {TrialState.COMPLETE, TrialState.PRUNED}]


def take_up(study: optuna.Study) -> None:
    """Ask again for what an interrupted search left or what failed; their runs are taken up where they stand."""
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == TrialState.RUNNING:  # its process is gone
            study.tell(trial.number, state=TrialState.FAIL)
    settled = [t.params or t.system_attrs.get("fixed_params") for t in trials if t.state in SETTLED]
    for trial in trials:
        if trial.state not in SETTLED and trial.params not in settled:
            study.enqueue_trial(trial.params)
            settled.append(trial.params)


def objective(trial: optuna.Trial, keys: Mapping[str, Any], out: Path, stop: threading.Event) -> float:
    """Train one recipe, or stop it early."""
    recipe = {key: trial.suggest_categorical(key, values) for key, values in SPACE.items()}
    enough = threading.Event()
    found: list[JobResult] = []
    job = job_of(recipe, SCREEN_SEED, keys, out)
    thread = threading.Thread(target=lambda: found.append(run_job(job, stop=enough)))
    thread.start()
    told, poor = 0, False
    try:
        while thread.is_alive() and not stop.is_set() and not poor:
            thread.join(POLL_S)
            values = best_so_far(job)
            for step in range(told, len(values)):
                trial.report(values[step], step + 1)
            told = max(told, len(values))
            poor = told < int(keys["epochs"]) and thread.is_alive() and trial.should_prune()
    finally:
        if stop.is_set() or poor or sys.exc_info()[0] is not None:
            enough.set()
        thread.join()
    if poor and found[0].status == "stopped":
        raise optuna.TrialPruned
    return points(found[0])


def confirm(study: optuna.Study, keys: Mapping[str, Any], out: Path) -> list[dict[str, Any]]:
    """Train the best recipes and the default on further seeds; return them, the highest mean over these first.

    Raises:
        KDYoloError: A run failed.
    """
    complete = [trial for trial in ended(study) if trial.state == TrialState.COMPLETE]
    ranked = sorted(complete, key=lambda trial: -float(trial.value or 0.0))
    recipes = [DEFAULT, *(dict(trial.params) for trial in ranked[: int(keys["top"])])]
    recipes = list({json.dumps(one, sort_keys=True): one for one in recipes}.values())
    seeds = (SCREEN_SEED, *CONFIRM_SEEDS)
    jobs = [job_of(recipe, seed, keys, out) for recipe in recipes for seed in seeds]
    reached = [points(result) for result in train(jobs, int(keys["jobs"]))]
    rows: list[dict[str, Any]] = []
    for number, recipe in enumerate(recipes):
        values = reached[number * len(seeds) : (number + 1) * len(seeds)]
        # The screen's seed chose the recipe, so it does not judge it.
        rows.append({"recipe": recipe, "values": values, "mean": sum(values[1:]) / len(CONFIRM_SEEDS)})
    return sorted(rows, key=lambda row: -row["mean"] - (MARGIN if row["recipe"] == DEFAULT else 0.0))


def job_of(recipe: Mapping[str, Any], seed: int, keys: Mapping[str, Any], out: Path) -> Job:
    """Return the run of a recipe and a seed; its folder's name is the hash of all that determines it."""
    arguments = {key: keys[key] for key in ("data", "teacher", "model", "epochs", "imgsz", "batch", "device")}
    arguments |= {
        "close_mosaic": 2,
        **{key: value for key, value in recipe.items() if key != "optimizer"},
        "seed": seed,
    }
    if recipe["optimizer"] != "auto":
        arguments["optimizer"], rate = str(recipe["optimizer"]).split()
        arguments |= {"lr0": float(rate), "momentum": 0.9, "warmup_bias_lr": 0.0}  # as optimizer=auto sets them
    if recipe["schedule.decay"] != "constant":
        arguments["schedule.final"] = 0.0
    return run_of(f"s{seed}", arguments, out, int(keys["threads"]))


def points(result: JobResult) -> float:
    """Return what a run reached on validation, mAP50-95 in points.

    Raises:
        KDYoloError: It failed or was stopped.
    """
    if result.status != "done":
        raise KDYoloError(f"{result.name}: {result.reason}; see {result.log}")
    return 100 * float(result.record["metrics"]["mAP50-95"])


def changed(recipe: Mapping[str, Any]) -> str:
    """Return in what a recipe differs from the default before the search."""
    return ", ".join(f"{k}={v}" for k, v in recipe.items() if v != DEFAULT[k]) or "default before"


def show(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Print a line for every trial that ended."""
    text = f"{trial.value:.1f}" if trial.state == TrialState.COMPLETE else trial.state.name.lower()
    print(f"trial {trial.number}: {text}: {changed(trial.params)}", flush=True)


def summary(study: optuna.Study, confirmed: list[dict[str, Any]], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was tried and what won, as plain data."""
    trials = [
        {"recipe": t.params, "value": t.value, "state": t.state.name.lower(), "epochs": len(t.intermediate_values)}
        for t in ended(study)
    ]
    setting = {key: keys[key] for key in ("model", "epochs", "imgsz", "batch", "trials", "top")}
    setting |= {"teacher": Path(keys["teacher"]).name, "data": Path(keys["data"]).parent.name, "split": "val"}
    return {
        "setting": setting,
        "seeds": {"screen": SCREEN_SEED, "confirm": CONFIRM_SEEDS},
        "space": SPACE,
        "trials": trials,
        "confirmed": confirmed,
        "winner": confirmed[0]["recipe"],
    }


def page(content: Mapping[str, Any]) -> str:
    """Return both stages as Markdown."""
    rows = [
        [changed(row["recipe"]), *(f"{v:.1f}" for v in row["values"]), f"{row['mean']:.2f}"]
        for row in content["confirmed"]
    ]
    seeds = [content["seeds"]["screen"], *content["seeds"]["confirm"]]
    screened = sorted(content["trials"], key=lambda one: (one["state"] != "complete", -float(one["value"] or 0.0)))
    listed = [[changed(one["recipe"]), figure(one)] for one in screened]
    blocks = [
        f"# Recipe search: {content['setting']['data']}, validation split, mAP50-95",
        markdown_table(["confirmed", *(f"seed {s}" for s in seeds), "mean of the last two"], rows),
        markdown_table(["screened", f"seed {seeds[0]}"], listed),
    ]
    return "\n\n".join(blocks) + "\n"


def figure(trial: Mapping[str, Any]) -> str:
    """Return a trial's result, or when it was stopped."""
    return f"{trial['value']:.1f}" if trial["state"] == "complete" else f"stopped after epoch {trial['epochs']}"


if __name__ == "__main__":
    main()
