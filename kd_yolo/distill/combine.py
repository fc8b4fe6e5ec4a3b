"""Several methods at once: ``method=cwd+bckd+ld``.

A combination is made of built methods: its terms are all of theirs, it reads what any of them reads, and ``kd.weight``
is a factor on all. Arguments of a member are written ``kd.<method>.<argument>``. The scales of
losses from different papers have nothing to do with one another, so a combination is balanced unless told otherwise:
each term is set once to ``BALANCE`` / n of the task loss's gradient on the neck, n methods
(``kd_yolo/distill/balance.py``). The schedule is the one of the method named first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_yolo.config import MethodFile, validate
from kd_yolo.distill.base import DetectorSpec, DistillMethod, MethodArgs, Taps, build_method, load_method, parse_args
from kd_yolo.errors import ConfigError, nearest
from kd_yolo.resources import find, load_yaml

SEPARATOR = "+"
# The share of the task loss's gradient that a combination gets; per term divided by the number of methods.
BALANCE = 0.3


class CombinationArgs(MethodArgs):
    """Arguments of the combination itself; those of its members are theirs."""


class Combination(DistillMethod):
    """The named losses of several methods together.

    A member whose own weight is 0 is left out, unless all are: then the combination counts as weight 0. A term name
    that two members share gets the method into it: ``kd_cls`` of ``kd-lightnet`` becomes ``kd_lightnet_cls``.
    """

    Args = CombinationArgs
    args: CombinationArgs

    def __init__(
        self,
        args: CombinationArgs,
        student: DetectorSpec,
        teacher: DetectorSpec,
        members: Mapping[str, DistillMethod],
    ) -> None:
        """Put built methods together.

        Args:
            args: The factor on all.
            student: What the members were built for.
            teacher: What the members were built for.
            members: Built methods by name, in the order of their terms.

        Raises:
            ConfigError: Two members tap the heads after different blocks.
        """
        active = {name: member for name, member in members.items() if member.args.weight > 0}
        super().__init__(args if active else CombinationArgs(weight=0.0), student, teacher)
        self.members = nn.ModuleList(active.values() if active else members.values())
        self.term_names = _term_names(active or members)
        self.terms = tuple(name for names in self.term_names for name in names.values())
        self.reads = frozenset(what for member in active.values() for what in member.reads if self.args.weight > 0)
        self.hold = _common_hold(active)

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the terms of every member, see the base class.

        Raises:
            KDYoloError: What a member raises.
        """
        if self.args.weight == 0:
            return {name: torch.zeros((), device=student.scores.device) for name in self.terms}
        losses = {}
        for member, names in zip(self.members, self.term_names, strict=True):
            for term, value in member(student, teacher, batch).items():
                losses[names[term]] = self.args.weight * value
        return losses


def is_combination(name: str) -> bool:
    """Return whether a method's name is that of a combination and not of a file."""
    return SEPARATOR in name and not name.endswith((".yaml", ".yml"))


def member_names(name: str) -> list[str]:
    """Return the methods that a combination names, each importable.

    Raises:
        ConfigError: An empty, repeated or unknown name, or ``none``.
    """
    names = [part.strip() for part in name.split(SEPARATOR)]
    for member, count in Counter(names).items():
        if not member:
            raise ConfigError(f"method '{name}': a name is missing beside '+'; write for example method=cwd+bckd")
        if member == "none":
            raise ConfigError(f"method '{name}': none combines with nothing; drop it")
        if count > 1:
            raise ConfigError(f"method '{name}': {member} is named {count} times; name it once")
        load_method(member)
    return names


def combined_file(name: str) -> MethodFile:
    """Return what a YAML file of a combination would hold: the members' arguments, a schedule and a balance.

    The schedule is that of the method named first; a third party's module has no file and thereby the default one.

    Raises:
        ConfigError: As for ``member_names``, or an unusable file of a member.
    """
    files = {member: _method_file(member) for member in member_names(name)}
    first = next(iter(files.values()))
    args = {_key(member): file.args for member, file in files.items()}
    return MethodFile(name=name, args=args, schedule=first.schedule, balance=default_balance(len(files)))


def default_balance(methods: int) -> float:
    """Return the gradient ratio of each term in a combination of so many methods, to two digits."""
    return round(BALANCE / methods, 2)


def nested_args(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Sort ``{"cwd.tau": 2.0, "weight": 1.0}`` by member: ``{"cwd": {"tau": 2.0}, "weight": 1.0}``.

    Args:
        name: The combination.
        given: Arguments as on the command line, after ``kd.``; what is nested already stays.

    Raises:
        ConfigError: A key that belongs to no member.
    """
    keys = sorted((_key(member) for member in member_names(name)), key=len, reverse=True)
    nested: dict[str, Any] = {}
    for key, value in given.items():
        member = next((known for known in keys if key.replace("-", "_").startswith(f"{known}.")), None)
        if member is not None:
            nested.setdefault(member, {})[key[len(member) + 1 :]] = value
        elif key in CombinationArgs.model_fields or key.replace("-", "_") in keys:
            nested[key.replace("-", "_")] = value
        else:
            raise _unknown(name, key, keys)
    return nested


def merged_args(args: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested arguments with others over them, member by member."""
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in args.items()}
    for key, value in given.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, Mapping) else value
    return merged


def gives_weight(given: Iterable[str]) -> bool:
    """Return whether one of these arguments is a weight; balancing would undo it."""
    return any(key.endswith("weight") for key in given)


def parse_combination(name: str, args: Mapping[str, Any]) -> CombinationArgs:
    """Validate nested arguments of a combination and of all its members.

    Raises:
        ConfigError: An unknown or ill-typed argument; the message names it and the nearest known one.
    """
    names = member_names(name)
    for member in names:
        parse_args(member, _member_args(name, member, args))
    keys = [_key(member) for member in names]
    own = {key: value for key, value in args.items() if key not in keys}
    for key in own:
        if key not in CombinationArgs.model_fields:
            raise _unknown(name, key, keys)
    return validate(CombinationArgs, own, where=f"method '{name}'")


def build_combination(
    name: str, args: Mapping[str, Any], student: DetectorSpec, teacher: DetectorSpec, seed: int = 0
) -> Combination:
    """Build a combination; every member gets the adapters that it would get alone.

    Raises:
        ConfigError: Wrong names or arguments, or members that cannot work with these detectors or with one another.
    """
    own = parse_combination(name, args)
    members = {
        member: build_method(member, _member_args(name, member, args), student, teacher, seed)
        for member in member_names(name)
    }
    return Combination(own, student, teacher, members)


def _key(member: str) -> str:
    """Return a member's key among the arguments; the command line turns - into _ in every key."""
    return member.replace("-", "_")


def _method_file(member: str) -> MethodFile:
    if "." in member:
        return MethodFile(name=member)
    path = find("methods", member)
    return validate(MethodFile, load_yaml(path), where=str(path))


def _member_args(name: str, member: str, args: Mapping[str, Any]) -> Mapping[str, Any]:
    given = args.get(_key(member), {})
    if not isinstance(given, Mapping):
        raise ConfigError(f"method '{name}': {_key(member)}={given!r}: write kd.{_key(member)}.ARGUMENT=VALUE")
    return given


def _unknown(name: str, key: str, keys: Sequence[str]) -> ConfigError:
    fields = {member: load_method(member).Args.model_fields for member in member_names(name)}
    known = ["weight", *(f"{_key(member)}.{field}" for member, own in fields.items() for field in own)]
    owners = [other for other in known if other.rpartition(".")[2] == key]
    hint = f"; did you mean {' or '.join(repr(other) for other in owners)}?" if owners else nearest(key, known)
    return ConfigError(
        f"method '{name}' has no argument '{key}'{hint} (write kd.<method>.<argument>; methods: {', '.join(keys)})"
    )


def _term_names(members: Mapping[str, DistillMethod]) -> list[dict[str, str]]:
    """Return for every member its terms and what they are called here."""
    count = Counter(term for member in members.values() for term in member.terms)

    def named(name: str, term: str) -> str:
        owner = _key(name).replace(".", "_").removeprefix("kd_")
        return term if count[term] == 1 else f"kd_{owner}_{term.removeprefix('kd_')}"

    return [{term: named(name, term) for term in member.terms} for name, member in members.items()]


def _common_hold(members: Mapping[str, DistillMethod]) -> int:
    holds = {name: member.hold for name, member in members.items() if "head" in member.reads}
    if len(set(holds.values())) > 1:
        listed = ", ".join(f"{name} after block {hold}" for name, hold in holds.items())
        raise ConfigError(f"these methods tap the heads at different blocks ({listed}); give all the same hold")
    return next(iter(holds.values()), DistillMethod.hold)
