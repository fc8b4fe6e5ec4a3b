"""The command line: ``kd-yolo COMMAND key=value ...``. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from kd_yolo import __version__
from kd_yolo.command_table import COMMANDS, TASK_CONFIGS
from kd_yolo.errors import KDYoloError, nearest

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after the program name; None takes them from the process.

    Returns:
        0, or 2 after one line on standard error, or 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in {"help", "--help", "-h"}:
        print(overview())
        return 0
    if words[0] in {"version", "--version", "-V"}:
        print(f"kd-yolo {__version__}")
        return 0
    try:
        return _run(words[0], words[1:])
    except KDYoloError as error:
        print(f"kd-yolo: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        task = "".join(f"{word} " for word in words if word.startswith("task="))
        hint = {
            "train": f"; go on with: kd-yolo train {task}resume=true",
            "pretrain": "; the same command again goes on",
        }.get(words[0], "")
        print(f"kd-yolo: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away, as with `| head`
        return 0


def overview() -> str:
    """Return the help text of the program."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: kd-yolo COMMAND key=value ...",
            "",
            *lines,
            "",
            "kd-yolo COMMAND --help lists a command's keys. json=true prints one JSON object on standard output.",
        ]
    )


def command_help(name: str, task: str | None = None) -> str:
    """Return the help text of one command; ``train`` has other keys for other tasks."""
    if name == "train" and task in TASK_CONFIGS:
        return _task_help(str(task))
    command = COMMANDS[name]
    sentence = f"{command.summary[0].upper()}{command.summary[1:]}."
    lines = [f"usage: kd-yolo {name} {command.usage}".rstrip(), "", sentence]
    keys = {**command.keys, "json": "print one JSON object [false]"}
    width = min(max(len(key) for key in keys), 28)
    lines += ["", *(f"  {key:<{width}}  {text}" for key, text in keys.items())]
    if command.stock:
        from kd_yolo.config import REPLACED_KEYS, stock_keys

        names = [key for key in stock_keys() if key not in {*command.keys, *REPLACED_KEYS}]
        lines += ["", "Ultralytics' own keys, with their meaning and defaults there:", *_wrapped(names)]
    if command.example:
        lines += ["", f"Example: {command.example}"]
    return "\n".join(lines)


def _run(name: str, words: list[str]) -> int:
    from kd_yolo.config import parse_pairs
    from kd_yolo.errors import ConfigError

    if name not in COMMANDS:
        raise ConfigError(f"unknown command '{name}'{nearest(name, COMMANDS)} (kd-yolo --help lists all)")
    if any(word in {"--help", "-h", "help"} for word in words):
        print(command_help(name, next((word[5:] for word in words if word.startswith("task=")), None)))
        return 0
    positional = [words.pop(0)] if words and "=" not in words[0] and name == "data" else []
    values = parse_pairs(words)
    as_json = values.pop("json", False)
    if not isinstance(as_json, bool):
        raise ConfigError(f"json={as_json}: true or false")
    # Ultralytics takes a program whose name ends in "yolo" for its own command line, where predict() returns nothing.
    sys.argv = ["kd-yolo-cli", *sys.argv[1:]]
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")  # never install packages behind the user's back
    module, _, function = COMMANDS[name].handler.partition(":")
    handler: Callable[..., tuple[str, Any]]
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        handler = getattr(importlib.import_module(module), function)
        text, content = handler(*positional, values)
    print(json.dumps(content, default=str) if as_json else text)
    return 0


def _task_help(task: str) -> str:
    """Return the help text of ``train`` for a task: its own keys, read from what checks them."""
    lines = [f"usage: kd-yolo train task={task} data=... key=value ...", "", *_fields(TASK_CONFIGS[task].config)]
    if TASK_CONFIGS[task].options:
        lines += ["", "Values of the model's file that may be replaced:", *_fields(TASK_CONFIGS[task].options, "kd.")]
    lines += ["", *(f"  {line}" for line in TASK_CONFIGS[task].notes)]
    return "\n".join([*lines, "", f"Example: {TASK_CONFIGS[task].example}"])


def _fields(place: str, prefix: str = "") -> list[str]:
    """Return a line for each key of a pydantic model, named as ``module:class``."""
    module, _, name = place.partition(":")
    fields = getattr(importlib.import_module(module), name).model_fields
    width = max(map(len, fields)) + len(prefix)
    hidden = {"kd.imgsz", "kd.teacher"}  # keys of their own
    shown = {f"{prefix}{key}": field for key, field in fields.items() if f"{prefix}{key}" not in hidden}
    return [
        f"  {key:<{width}}  {field.description} {'needed' if field.is_required() else f'[{field.default}]'}"
        for key, field in shown.items()
    ]


def _wrapped(names: Sequence[str], width: int = 100) -> list[str]:
    lines, line = [], " "
    for name in names:
        if len(line) + len(name) > width:
            lines.append(line)
            line = " "
        line += f" {name}"
    return [*lines, line]
