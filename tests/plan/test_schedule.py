"""The plan: exact at its ends, monotone between, guarded against lengths that nobody knows."""

import math

import pytest

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.plan import Plan, plan_at

SHAPES = ["linear", "cosine", "exponential", "sigmoid"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("start", "end"), [(0.1, 0.6), (0.0, 1.0), (7, 93), (0, 100), (0.5, 60)])
def test_lambda_is_monotone_and_exact_at_its_ends(shape, start, end):
    plan = Plan(start=start, end=end, shape=shape)
    first, last, *_ = plan.steps(100)
    values = [plan_at(step, 100, plan).blend for step in range(101)]
    assert values == sorted(values)
    assert set(values[: first + 1]) == {0.0} and set(values[last:]) == {1.0}
    assert all(0 < value < 1 for value in values[first + 1 : last])


def test_the_default_rises_between_a_tenth_and_six_tenths():
    states = [plan_at(step, 1000) for step in (0, 100, 101, 350, 599, 600, 1000, 5000)]
    phases = [
        "latent",
        "latent",
        "blending",
        "blending",
        "blending",
        "ternary",
        "ternary",
        "ternary",
    ]
    assert [state.phase for state in states] == phases
    assert states[3].blend == pytest.approx(0.5)
    assert {state.angle_factor for state in states} == {1.0}


@pytest.mark.parametrize("shape", SHAPES)
def test_symmetric_shapes_are_symmetric_and_exponential_is_early(shape):
    plan = Plan(start=0, end=100, shape=shape)
    early, middle, late = (plan_at(step, None, plan).blend for step in (20, 50, 80))
    if shape == "exponential":
        assert middle > 0.9
    else:
        assert middle == pytest.approx(0.5) and early + late == pytest.approx(1.0)


@pytest.mark.parametrize("total", [0, 1, 2])
def test_tiny_trainings_start_latent_and_end_ternary(total):
    assert plan_at(0, total).blend == 0.0
    assert plan_at(max(total, 1), total).blend == 1.0


def test_no_rise_at_all_is_ternary_from_the_start():
    assert plan_at(0, None, Plan(start=0, end=0)).blend == 1.0
    assert plan_at(0, 10, Plan(start=0.0, end=0.0)).blend == 1.0
    step = [plan_at(s, 10, Plan(start=0.5, end=0.5)).blend for s in (4, 5, 6)]
    assert step == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("total", [None, -1, math.inf, math.nan])
def test_fractions_of_an_unknown_length_are_refused_with_a_way_out(total):
    with pytest.raises(ConfigError, match=r"number of training steps.*max_steps.*Plan\(start=1000"):
        plan_at(0, total)
    assert plan_at(5, total, Plan(start=0, end=10, shape="linear")).blend == 0.5


def test_the_angles_warm_up_to_exactly_one():
    plan = Plan(start=0, end=0, angle_warmup=4)
    factors = [plan_at(step, None, plan).angle_factor for step in range(6)]
    assert factors == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert plan_at(9, 20, Plan(angle_warmup=0.5)).angle_factor == 10 / 11


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -0.1}, "start must be a fraction"),
        ({"end": math.nan}, "end must be a fraction"),
        ({"start": True}, "start must be a fraction"),
        ({"end": "0.5"}, "end must be a fraction"),
        ({"end": 100.0}, r"at most 1.0.*Use end=100"),
        ({"start": 0.7, "end": 0.6}, "must not come before"),
        ({"start": 7, "end": 6}, "must not come before"),
        ({"shape": "step"}, "shape='step'"),
        ({"angle_warmup": -1}, "angle_warmup must be"),
        ({"freeze_latents": None}, "freeze_latents must be"),
        ({"freeze_latents": 50.0}, "Use freeze_latents=50"),
        ({"second_stage": -0.5}, "second_stage must be"),
        ({"second_lr_factor": 0.0}, "second_lr_factor must be a finite number > 0"),
        ({"second_lr_factor": math.inf}, "second_lr_factor must be a finite number > 0"),
        ({"second_decay_factor": -1}, "second_decay_factor must be a finite number >= 0"),
        ({"second_decay_factor": None}, "second_decay_factor must be a finite number >= 0"),
    ],
)
def test_bad_plans_say_what_is_wrong(settings, message):
    with pytest.raises(ConfigError, match=message):
        Plan(**settings)


def test_mixed_positions_are_ordered_when_the_length_is_known():
    assert Plan(start=10, end=0.5).steps(100) == (10, 50, 0, 0, None)
    with pytest.raises(ConfigError, match="must not come before"):
        plan_at(0, 10, Plan(start=10, end=0.5))


def test_a_plan_is_plain_data():
    plan = Plan(start=3, end=0.5, shape="sigmoid", angle_warmup=2, freeze_latents=0.25)
    assert Plan(**plan.to_dict()) == plan
    assert {type(value) for value in plan.to_dict().values()} <= {int, float, str, type(None)}


def test_latents_stand_still_first_whatever_lambda_does():
    plan = Plan(start=2, end=6, freeze_latents=4)
    states = [plan_at(step, None, plan) for step in range(7)]
    assert [state.latent_factor for state in states] == [0.0] * 4 + [1.0] * 3
    assert states[3].phase == "blending" and states[3].blend == pytest.approx(0.1464, abs=1e-4)
    halves = [plan_at(step, 20, Plan(freeze_latents=0.25)).latent_factor for step in (4, 5)]
    assert halves == [0.0, 1.0]


def test_the_second_stage_lowers_rates_and_ends_the_decay():
    plan = Plan(second_stage=0.5, second_lr_factor=0.6)
    found = [plan_at(step, 10, plan)[-2:] for step in (0, 4, 5, 10, 99)]
    assert found == [(1.0, 1.0), (1.0, 1.0), (0.6, 0.0), (0.6, 0.0), (0.6, 0.0)]
    assert {plan_at(step, 10)[-2:] for step in range(12)} == {(1.0, 1.0)}


@pytest.mark.parametrize("name", ["start", "angle_warmup", "freeze_latents", "second_stage"])
def test_any_fraction_needs_the_length(name):
    absolute = Plan(start=0, end=10)
    assert absolute.is_absolute
    plan = Plan(**{**absolute.to_dict(), name: 0.5})
    assert not plan.is_absolute
    with pytest.raises(ConfigError, match="number of training steps"):
        plan.steps(None)
