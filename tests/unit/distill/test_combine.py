"""Combinations: names, arguments, terms, what is read, balance; and the contract of methods, on combinations."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import test_method_contract as contract
import torch
from pydantic import Field
from taps_factory import Shape, foreground, leaves, make, map_leaves, random_taps, total, with_leaves
from torch import Tensor

from kd_yolo.config import TrainConfig
from kd_yolo.distill.base import DetectorSpec, DistillMethod, MethodArgs, Taps, build_method, load_method, parse_args
from kd_yolo.distill.combine import Combination, combined_file, default_balance, is_combination, nested_args
from kd_yolo.errors import ConfigError
from kd_yolo.tasks.preflight import resolve_method

SHAPE = Shape()
COMBINATIONS = ["cwd+bckd", "bckd+kd-lightnet"]


def resolve(method: str, balance: float | None = None, **kd: Any) -> dict[str, Any]:
    config = TrainConfig(data="neu", method=method, balance=balance)
    return resolve_method(config, {"kd": {k.replace("__", "."): v for k, v in kd.items()}, "schedule": {}}, {})


# ---- the contract of methods -----------------------------------------------------------------------------------------

CONTRACT: list[tuple[Any, tuple[Any, ...]]] = [
    *((contract.test_forward__named_finite_scalars_not_negative_with_gradient, (pair, 0)) for pair in contract.PAIRS),
    (contract.test_forward__float64_stays_float64, ()),
    (contract.test_forward__no_gradient_to_the_teacher, ()),
    (contract.test_forward__teacher_under_inference_mode, ()),
    (contract.test_forward__reads_nothing_of_the_teacher_that_it_does_not_name, ()),
    *((contract.test_forward__batch_without_boxes, (batch,)) for batch in ({}, contract.NO_BOX)),
    *((contract.test_forward__teacher_lacks_classes, (one2one,)) for one2one in (True, False)),
    *((contract.test_forward__half_precision_taps_under_autocast, (pair,)) for pair in ("same", "no bins")),
    *((contract.test_forward__same_for_a_permuted_or_repeated_batch, (o,)) for o in ([1, 0, 2], [0, 1, 2, 0, 1, 2])),
    (contract.test_forward__weight_is_a_factor_and_zero_is_plain_training, ()),
    (contract.test_forward__unmatched_logits_are_refused_with_both_shapes, ()),
    (contract.test_build_method__unequal_levels_are_refused_with_both_numbers, ()),
    (contract.test_parse_args__typo_names_the_nearest, ()),
    *((contract.test_parse_args__weight_must_be_a_finite_number_from_0, (value,)) for value in ("2", -1.0, True)),
]


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("case", range(len(CONTRACT)))
def test_combination__keeps_the_contract(name: str, case: int) -> None:
    check, arguments = CONTRACT[case]
    check(name, *arguments)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combination__adapters_repeat_and_the_random_streams_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contract.test_build_method__adapters_repeat_and_leave_the_random_streams_alone(name, monkeypatch)


def test_combination__gradcheck_in_float64() -> None:
    wide = Shape(channels=(7, 3))
    method = make("cwd+bckd", SHAPE, wide, bckd={"box_weight": 0.0}).double()
    student, teacher = random_taps(SHAPE, 0, torch.float64, grad=True), random_taps(wide, 1, torch.float64)
    batch = foreground(SHAPE)

    def loss(*values: Tensor) -> Tensor:
        return total(method(with_leaves(student, values), teacher, batch))

    numeric, analytic = contract.slopes(loss, leaves(student))
    assert analytic == pytest.approx(numeric, rel=1e-4, abs=0)


def test_combination__zero_at_equality() -> None:
    teacher = random_taps(SHAPE, 3)
    losses = make("cwd+bckd", SHAPE)(map_leaves(teacher, lambda x: x), teacher, foreground(SHAPE))
    assert float(total(losses)) < 1e-5


# ---- what a combination is made of -----------------------------------------------------------------------------------


def test_combination__terms_are_those_of_the_members_alone() -> None:
    wide = Shape(channels=(7, 3))
    student, teacher, batch = random_taps(SHAPE, 0), random_taps(wide, 1), foreground(SHAPE)
    both = make("cwd+bckd", SHAPE, wide, weight=2.0, cwd={"tau": 3.0})
    losses = both(student, teacher, batch)
    alone = {
        **make("cwd", SHAPE, wide, tau=3.0)(student, teacher, batch),
        **make("bckd", SHAPE, wide)(student, teacher, batch),
    }
    assert both.terms == tuple(losses) == ("kd_cwd", "kd_bckd_cls", "kd_bckd_box")
    assert both.reads == {"neck", "scores", "boxes"}
    for term, value in losses.items():
        torch.testing.assert_close(value, 2 * alone[term])


def test_combination__order_changes_nothing_but_the_order() -> None:
    wide = Shape(channels=(7, 3))
    student, teacher, batch = random_taps(SHAPE, 0), random_taps(wide, 1), foreground(SHAPE)
    one, other = (make(name, SHAPE, wide)(student, teacher, batch) for name in ("cwd+bckd", "bckd+cwd"))
    assert list(one) == ["kd_cwd", "kd_bckd_cls", "kd_bckd_box"]
    assert list(other) == ["kd_bckd_cls", "kd_bckd_box", "kd_cwd"]
    assert all(torch.equal(one[term], other[term]) for term in one)


def test_combination__member_of_weight_0_is_left_out_and_not_read() -> None:
    method = make("cwd+bckd", SHAPE, cwd={"weight": 0.0})
    assert method.terms == ("kd_bckd_cls", "kd_bckd_box")
    assert method.reads == {"scores", "boxes"}
    assert tuple(method(random_taps(SHAPE, 0), random_taps(SHAPE, 1), {})) == method.terms


def test_combination__all_members_of_weight_0_count_as_weight_0() -> None:
    method = make("cwd+bckd", SHAPE, cwd={"weight": 0.0}, bckd={"weight": 0.0})
    assert method.args.weight == 0.0
    assert method.reads == frozenset()
    assert float(total(method(random_taps(SHAPE, 0), random_taps(SHAPE, 1), {}))) == 0.0


def test_combination__state_can_be_saved_and_restored() -> None:
    wide = Shape(channels=(7, 3))
    method, other = (build_method("cwd+bckd", {}, SHAPE.spec(), wide.spec(), seed=s) for s in (0, 1))
    buffer = io.BytesIO()
    torch.save(method, buffer)  # a checkpoint holds the whole object
    buffer.seek(0)
    copy = torch.load(buffer, weights_only=False)
    other.load_state_dict(copy.state_dict())
    student, teacher = random_taps(SHAPE, 0), random_taps(wide, 1)
    assert torch.equal(total(method(student, teacher, {})), total(copy(student, teacher, {})))
    assert torch.equal(total(method(student, teacher, {})), total(other(student, teacher, {})))


class FakeArgs(MethodArgs):
    hold: int = Field(default=1, ge=1)


class Fake(DistillMethod):
    Args = FakeArgs
    terms = ("kd_cls", "kd_odd")
    values: ClassVar[tuple[float, float]] = (1.0, 2.0)

    def __init__(self, args: FakeArgs, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(args, student, teacher)
        self.hold = args.hold
        self.reads = frozenset({"head"})

    def forward(self, student: Taps, teacher: Taps, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {term: torch.tensor(value) for term, value in zip(self.terms, self.values, strict=True)}


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> str:
    """Provide a module of somebody else with a method whose terms collide with kd-lightnet's."""
    module = types.ModuleType("somebody.kd_fake")
    own = type("Somebodys", (Fake,), {"__module__": module.__name__})
    module.Somebodys = own  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebody", types.ModuleType("somebody"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_combination__colliding_terms_get_the_method_into_their_name(third_party: str) -> None:
    method = make(f"kd-lightnet+{third_party}", SHAPE)
    losses = method(random_taps(SHAPE, 0), random_taps(SHAPE, 1), foreground(SHAPE))
    assert tuple(losses) == method.terms
    assert method.terms == ("kd_lightnet_cls", "kd_box", "kd_somebody_kd_fake_cls", "kd_odd")
    assert losses["kd_somebody_kd_fake_cls"].item() == 1.0
    assert losses["kd_odd"].item() == 2.0
    assert method.reads == {"scores", "scores_one2one", "boxes", "head"}


def test_combination__hold_is_that_of_the_member_that_taps_the_heads(third_party: str) -> None:
    assert build_method(f"cwd+{third_party}", {third_party: {"hold": 2}}, SHAPE.spec(), SHAPE.spec()).hold == 2
    resolved = resolve(f"cwd+{third_party}", somebody__kd_fake__hold=2)
    assert resolved["args"][third_party] == {"hold": 2}


def test_combination__holds_that_differ_are_refused_with_both() -> None:
    spec = SHAPE.spec()
    members = {f"m{hold}": Fake(FakeArgs(hold=hold), spec, spec) for hold in (1, 2)}
    with pytest.raises(ConfigError, match=r"m1 after block 1, m2 after block 2.*same hold"):
        Combination(Combination.Args(), spec, spec, members)
    members["m1"] = Fake(FakeArgs(hold=1, weight=0.0), spec, spec)  # off: it does not count
    assert Combination(Combination.Args(), spec, spec, members).hold == 2


# ---- names and arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cwd+bckdd", r"method 'bckdd' is unknown.*did you mean 'bckd'\?"),
        ("cwd+", "a name is missing"),
        ("+", "a name is missing"),
        ("cwd+bckd+cwd", "cwd is named 2 times"),
        ("cwd+none", "none combines with nothing"),
        ("cwd+bckd.yaml", r"cwd\+bckd.yaml"),
        ("cwd+no.such.module", "'no.such.module' is unknown"),
    ],
)
def test_resolve_method__wrong_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tau": 2.0}, r"no argument 'tau'; did you mean 'cwd.tau'\?"),
        ({"cls_weight": 2.0}, r"no argument 'cls_weight'; did you mean 'bckd.cls_weight'\?"),
        ({"cwd__tua": 2.0}, r"method 'cwd' has no argument 'tua'; did you mean 'tau'\?"),
        ({"ld__tau": 2.0}, r"no argument 'ld.tau'; did you mean 'cwd.tau'\?.*methods: (cwd, bckd|bckd, cwd)"),
        ({"cwd__tau": "hot"}, "method 'cwd': tau='hot'"),
        ({"cwd": 2.0}, "write kd.cwd.ARGUMENT=VALUE"),
        ({"weight": -1.0}, "weight=-1.0"),
    ],
)
def test_resolve_method__wrong_arguments_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve("cwd+bckd", **given)


def test_resolve_method__arguments_are_nested_over_the_members_files() -> None:
    resolved = resolve("kd-lightnet+cwd", kd_lightnet__gamma=2.0, cwd__tau=2.0)
    assert resolved["name"] == "kd-lightnet+cwd"
    assert resolved["args"]["kd_lightnet"] == {**combined_file("kd-lightnet+cwd").args["kd_lightnet"], "gamma": 2.0}
    assert resolved["args"]["cwd"]["tau"] == 2.0
    built = build_method(resolved["name"], resolved["args"], SHAPE.spec(), SHAPE.spec())  # as a worker rebuilds it
    assert isinstance(built, Combination)
    assert [member.args.model_dump() for member in built.members if isinstance(member, DistillMethod)] == [
        parse_args("kd-lightnet", {"gamma": 2.0}).model_dump(),
        parse_args("cwd", {"tau": 2.0}).model_dump(),
    ]


def test_resolve_method__schedule_is_that_of_the_first() -> None:
    own = {name: resolve(name)["schedule"] for name in ("score-l2", "cwd")}
    assert own["score-l2"] != own["cwd"]
    assert resolve("score-l2+cwd")["schedule"] == own["score-l2"]
    assert resolve("cwd+score-l2")["schedule"] == own["cwd"]


def test_resolve_method__a_file_of_a_combination(tmp_path: Any) -> None:
    file = tmp_path / "both.yaml"
    file.write_text("name: cwd+kd-lightnet\nargs:\n  cwd: {tau: 2.0}\n  kd-lightnet: {gamma: 0.0}\nbalance: 0.2\n")
    resolved = resolve(str(file), cwd__normalise=False)
    assert resolved["args"] == {"cwd": {"tau": 2.0, "normalise": False}, "kd_lightnet": {"gamma": 0.0}}
    assert resolved["balance"] == 0.2


def test_resolve_method__balance_is_shared_and_off_when_a_weight_is_given() -> None:
    assert [default_balance(n) for n in (2, 3, 4)] == [0.15, 0.1, 0.07]
    assert resolve("cwd+bckd")["balance"] == 0.15
    assert resolve("cwd+bckd+kd-lightnet")["balance"] == 0.1
    assert resolve("cwd+bckd", cwd__tau=2.0)["balance"] == 0.15
    assert resolve("cwd+bckd", cwd__weight=2.0)["balance"] is None
    assert resolve("cwd+bckd", weight=0.0)["balance"] is None
    assert resolve("cwd+bckd", bckd__box_weight=2.0)["balance"] is None
    assert resolve("cwd+bckd", balance=0.4, cwd__weight=2.0)["balance"] == 0.4
    assert resolve("cwd")["balance"] is None


def test_is_combination__a_path_with_a_plus_is_a_file() -> None:
    assert is_combination("cwd+bckd")
    assert not is_combination("a+b/mine.yaml")
    assert not is_combination("cwd")


def test_nested_args__by_member() -> None:
    assert nested_args("cwd+bckd", {"cwd.tau": 1, "weight": 2, "bckd.beta": 3}) == {
        "cwd": {"tau": 1},
        "weight": 2,
        "bckd": {"beta": 3},
    }


def test_load_method__of_a_combination() -> None:
    assert load_method("cwd+bckd") is Combination
