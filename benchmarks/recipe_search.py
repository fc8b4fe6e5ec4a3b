"""Which recipe teaches the default student best? A designed search on the validation split, never on test.

    python benchmarks/recipe_search.py teacher=yolo26n-neu.pt data=neu trials=16

``teacher`` is the one of ``neu_table.py``. Needs ``pip install optuna``. Two stages, both on validation:

1. **Screen.** Optuna's TPE sampler proposes recipes from ``SPACE``; the shipped default and each of its neighbours that
   ``FIRST`` names are tried first. One seed a recipe (``SCREEN_SEED``, which no table uses). A run whose best epoch so
   far lies in the lowest quarter after ``GRACE`` of its epochs is stopped.
2. **Confirm.** The ``top`` best recipes and the default are trained on ``CONFIRM_SEEDS`` as well; the highest mean over
   all of them wins. The default stays when nothing beats it by more than ``MARGIN`` points: one seed of many always
   looks good by chance.

Interrupt it whenever you like: the same command goes on. Other keys: model=, epochs=, imgsz=, batch=, jobs=, threads=,
device=, top=, out=.
"""

from __future__ import annotations

import csv
import json
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
from single_runs import run_of

from kd_yolo.compare.job import Job, JobResult, run_job
from kd_yolo.config import parse_pairs, refuse_unknown
from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.errors import ConfigError
from kd_yolo.files import write_json, write_text
from kd_yolo.tables import markdown_table

HERE = Path(__file__).resolve().parent
METRIC = "metrics/mAP50-95(B)"
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
    given = parse_pairs(sys.argv[1:])
    try:
        refuse_unknown(given, KEYS, "recipe_search.py")
        keys = {**KEYS, **given}
        if not Path(str(keys["teacher"])).is_file():
            raise ConfigError(f"teacher={keys['teacher']}: no such file; give the trained teacher of neu_table.py")
        keys |= {"data": str(resolve_dataset(str(keys["data"]))), "teacher": str(Path(keys["teacher"]).absolute())}
    except ConfigError as error:
        sys.exit(f"recipe_search.py: {error}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out = Path(str(keys["out"])).resolve()
    out.mkdir(parents=True, exist_ok=True)
    study = screen(keys, out)
    chosen = confirm(study, keys, out)
    report(study, chosen, keys, given)


def screen(keys: Mapping[str, Any], out: Path) -> optuna.Study:
    """Propose and run recipes until there are as many as asked for."""
    study = optuna.create_study(
        study_name="recipe",
        storage=JournalStorage(JournalFileBackend(str(out / "search.log"))),
        sampler=optuna.samplers.TPESampler(seed=0, multivariate=True, n_startup_trials=len(FIRST) + 4),
        pruner=optuna.pruners.PercentilePruner(75.0, n_startup_trials=5, n_warmup_steps=int(GRACE * keys["epochs"])),
        direction="maximize",
        load_if_exists=True,
    )
    take_up(study)
    for change in FIRST:
        study.enqueue_trial({**DEFAULT, **change}, skip_if_exists=True)
    done = sum(trial.state in {TrialState.COMPLETE, TrialState.PRUNED} for trial in study.get_trials(deepcopy=False))
    stop = threading.Event()

    def end(*_: Any) -> None:
        stop.set()  # ends the trainings in order; the next call resumes them
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        study.optimize(
            lambda trial: objective(trial, keys, out, stop),
            n_trials=max(0, int(keys["trials"]) - done),
            n_jobs=int(keys["jobs"]),
            callbacks=[show],
        )
    finally:
        stop.set()
        for number, handler in before.items():
            signal.signal(number, handler)
    return study


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
    ended = threading.Event()
    found: list[JobResult] = []
    job = job_of(recipe, SCREEN_SEED, keys, out)
    thread = threading.Thread(target=lambda: found.append(run_job(job, stop=ended)))
    thread.start()
    told, pruned = 0, False
    while thread.is_alive():
        thread.join(POLL_S)
        if stop.is_set():
            ended.set()
            continue
        values = best_so_far(job.folder / "student" / "results.csv")
        for step in range(told, len(values)):
            trial.report(values[step], step + 1)
        told = max(told, len(values))
        if told < int(keys["epochs"]) and trial.should_prune() and not ended.is_set():
            pruned = True
            ended.set()
    if pruned:
        raise optuna.TrialPruned
    return points(found[0])


def confirm(study: optuna.Study, keys: Mapping[str, Any], out: Path) -> list[dict[str, Any]]:
    """Train the best recipes and the default on further seeds; return them, the highest mean first."""
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    ranked = sorted(complete, key=lambda trial: -float(trial.value or 0.0))
    recipes = [dict(trial.params) for trial in ranked[: int(keys["top"])]]
    recipes = list({json.dumps(one, sort_keys=True): one for one in [DEFAULT, *recipes]}.values())
    jobs = [(number, seed) for number in range(len(recipes)) for seed in (SCREEN_SEED, *CONFIRM_SEEDS)]
    values: dict[tuple[int, int], float] = {}
    lock, waiting = threading.Lock(), list(jobs)

    def work() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                number, seed = waiting.pop(0)
            result = run_job(job_of(recipes[number], seed, keys, out))
            values[number, seed] = points(result)
            print(f"confirm: recipe {number} seed {seed}: {values[number, seed]:.1f}", flush=True)

    threads = [threading.Thread(target=work) for _ in range(int(keys["jobs"]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(values) < len(jobs):
        sys.exit("recipe_search.py: a confirming run failed, see its log; the same command goes on")
    rows: list[dict[str, Any]] = []
    for number, recipe in enumerate(recipes):
        reached = [values[number, seed] for seed in (SCREEN_SEED, *CONFIRM_SEEDS)]
        rows.append({"recipe": recipe, "values": reached, "mean": sum(reached) / len(reached), "default": number == 0})
    return sorted(rows, key=lambda row: -row["mean"] - (MARGIN if row["default"] else 0.0))


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


def best_so_far(file: Path) -> list[float]:
    """Return the highest mAP50-95 up to each epoch that has ended, in points."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        values = [100 * float(row[METRIC]) for row in csv.DictReader(stream) if row.get(METRIC)]
    return [max(values[: end + 1]) for end in range(len(values))]


def points(result: JobResult) -> float:
    """Return what a run reached on validation, mAP50-95 in points.

    Raises:
        RuntimeError: It failed or was stopped.
    """
    if result.status != "done":
        raise RuntimeError(f"{result.name}: {result.reason}; see {result.log}")
    value = float(result.record["metrics"]["mAP50-95"])
    return value if value > 1 else 100 * value


def changed(recipe: Mapping[str, Any]) -> str:
    """Return in what a recipe differs from the default."""
    found = [f"{key}={value}" for key, value in recipe.items() if value != DEFAULT[key]]
    return ", ".join(found) or "default before"


def show(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Print a line for every trial that ended."""
    text = f"{trial.value:.1f}" if trial.value is not None else trial.state.name.lower()
    print(f"trial {trial.number}: {text}: {changed(trial.params)}", flush=True)


def report(
    study: optuna.Study, chosen: list[dict[str, Any]], keys: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Write what was tried and what won."""
    trials: list[dict[str, Any]] = [
        {"recipe": t.params, "value": t.value, "state": t.state.name.lower(), "epochs": len(t.intermediate_values)}
        for t in study.get_trials(deepcopy=False)
        if t.state in {TrialState.COMPLETE, TrialState.PRUNED}
    ]
    setting = {key: keys[key] for key in ("model", "epochs", "imgsz", "batch", "trials", "top")}
    content = {
        "setting": {**setting, "teacher": Path(keys["teacher"]).name, "split": "val"},
        "seeds": {"screen": SCREEN_SEED, "confirm": CONFIRM_SEEDS},
        "space": SPACE,
        "trials": trials,
        "confirmed": chosen,
        "winner": chosen[0]["recipe"],
    }
    write_json(HERE / "recipe_search.json", content)
    rows = [[changed(row["recipe"]), *(f"{v:.1f}" for v in row["values"]), f"{row['mean']:.2f}"] for row in chosen]
    seeds = [f"seed {seed}" for seed in (SCREEN_SEED, *CONFIRM_SEEDS)]
    screened = sorted(trials, key=lambda one: -float(one["value"] or 0.0))
    listed = [[changed(one["recipe"]), figure(one)] for one in screened]
    blocks = [
        "# Recipe search: NEU-DET, validation split, mAP50-95",
        markdown_table(["confirmed", *seeds, "mean"], rows),
        markdown_table(["screened", f"seed {SCREEN_SEED}"], listed),
    ]
    write_text(HERE / "recipe_search.md", "\n\n".join(blocks) + "\n")
    print("\n\n".join(blocks))


def figure(trial: Mapping[str, Any]) -> str:
    """Return a trial's result, or when it was stopped."""
    return f"{trial['value']:.1f}" if trial["state"] == "complete" else f"stopped after epoch {trial['epochs']}"


if __name__ == "__main__":
    main()
