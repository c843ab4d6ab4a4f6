"""core/alarms.py on logs made up: a healthy one raises none, each fault its own."""

import pytest

from core.alarms import alarms


def healthy(steps=30):
    """The log of a run that learns: entropy falls, nearly all judgements become right."""
    rows = []
    for step in range(steps):
        done = step / steps
        rows.append(
            {
                "format": 0.97 + 0.03 * done,
                "truncated": 0.02,
                "entropy": 0.4 - 0.3 * done,
                "grad_norm": 0.5,
                "filtered": 0.0 if done < 0.8 else 0.08,
                "mismatch": 5e-7 if step % 10 == 0 else None,
                "judge_calls": 100.0 * (step + 1),
                "judge_failed": 1.0 * step,
                "skipped": 0,
            }
        )
    return rows


def test_a_healthy_run_raises_no_alarm_at_any_step():
    rows = healthy()
    for step in range(1, len(rows) + 1):
        assert alarms(rows[:step]) == {}


FAULTS = {
    "format_falls": (6, lambda row: row | {"format": 0.7}),
    "responses_are_cut_off": (5, lambda row: row | {"truncated": 0.3}),
    "entropy_has_collapsed": (5, lambda row: row | {"entropy": 0.001}),
    "rewards_are_all_equal": (5, lambda row: row | {"grad_norm": 0.0}),
    "many_are_filtered": (5, lambda row: row | {"filtered": 0.2}),
    "policies_drift_apart": (1, lambda row: row | {"mismatch": 4e-6}),
    "the_judge_fails": (1, lambda row: row | {"judge_failed": row["judge_failed"] + 40}),
    "updates_are_skipped": (1, lambda row: row | {"skipped": 1}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_raises_its_own_alarm_alone(name):
    steps, damage = FAULTS[name]
    rows = healthy()
    rows = rows[:-steps] + [damage(row) for row in rows[-steps:]]
    found = alarms(rows)
    assert list(found) == [name]
    assert len(found[name]) < 250


def test_a_judge_that_has_recovered_raises_none():
    rows = healthy()
    rows = [row | {"judge_failed": row["judge_failed"] + 40} for row in rows]
    assert alarms(rows) == {}


def test_stage_5_has_no_format():
    rows = [{key: row[key] for key in row if key != "format"} for row in healthy()]
    assert alarms(rows) == {}
