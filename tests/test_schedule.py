"""The phases of a run, as pure functions of the step."""

import math

import pytest

from hf_tokenprune import Schedule, errors, schedule

SHARES = [
    (1, 1.5, 1.5),
    (1, 2, 1),
    (0, 1, 1),
    (0, 1, 0),
    (1, 1, 0),
    (0.3, 0.1, 0.7),
    (1e3, 1e-6, 1e3),
    (0, 1e-9, 5),
    (7, 3, 11),
]
RUNS = [
    (Schedule(dense=d, static=static, anneal=a, settle=s), total)
    for d, a, s in SHARES
    for static in (0, 1.5)
    for total in range(1, 51)
]


def phases(plan, total):
    return [plan.at(step, total) for step in range(total)]


def test_phases_partition_a_run_of_any_length():
    for plan, total in RUNS:
        numbers = [schedule.PHASES.index(moment.phase) for moment in phases(plan, total)]
        assert numbers == sorted(numbers), (plan, total)
        assert numbers.count(schedule.PHASES.index("anneal")) >= 1, "without annealing nothing is learned"
        steps = plan.steps(total)
        assert {name: numbers.count(i) for i, name in enumerate(schedule.PHASES)} == steps
        for name in schedule.PHASES:
            if steps[name]:
                assert plan.at(plan.start(name, total), total) == (name, 0.0)


def test_each_phase_gets_its_share_to_within_a_step():
    for plan, total in RUNS:
        whole = plan.dense + plan.static + plan.anneal + plan.settle
        names = [moment.phase for moment in phases(plan, total)]
        given = 0 if total * plan.anneal / whole >= 1 else 1  # a step that annealing gets without being owed it
        for name in schedule.PHASES:
            owed = total * getattr(plan, name) / whole
            assert abs(names.count(name) - owed) <= 1 + given, (plan, total, name)


def test_a_phase_without_a_share_gets_no_step():
    for plan, total in RUNS:
        names = {moment.phase for moment in phases(plan, total)}
        assert not {name for name in names if getattr(plan, name) == 0}, (plan, total)


def test_progress_starts_at_0_and_rises_evenly_through_a_phase():
    for plan, total in RUNS:
        for name in schedule.PHASES:
            progress = [moment.progress for moment in phases(plan, total) if moment.phase == name]
            assert progress == pytest.approx([i / len(progress) for i in range(len(progress))])


def test_after_its_last_step_a_run_has_settled():
    for plan, total in RUNS:
        assert plan.at(total, total).phase == "settle"


def test_only_proportions_count():
    for factor in (0.5, 3, 1e6):
        for total in range(1, 51):
            large = Schedule(dense=1 * factor, anneal=2 * factor, settle=3 * factor)
            assert large.steps(total) == Schedule(dense=1, anneal=2, settle=3).steps(total)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, True, "1", None])
@pytest.mark.parametrize("name", schedule.PHASES)
def test_a_share_that_is_none_is_refused_by_name(name, value):
    with pytest.raises(errors.ConfigError, match=name):
        Schedule(**{name: value})


def test_a_run_without_annealing_is_refused():
    with pytest.raises(errors.ConfigError, match="anneal=0"):
        Schedule(anneal=0)


@pytest.mark.parametrize(("progress", "expected"), [(0, 1.0), (0.4, 0.7), (0.8, 0.4), (0.9, 0.4), (1, 0.4)])
def test_ramp_reaches_its_end_when_warm_and_stays(progress, expected):
    assert schedule.ramp(progress, 1.0, 0.4, warm=0.8) == pytest.approx(expected)
