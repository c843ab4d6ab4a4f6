"""core/step_line.py: what a run prints of a step."""

import doctest
import math

import pytest

import downstream_grpo
import rl
import sft
from core import step_line
from core.step_line import held_out_line, short

ROW = {
    "reward": 1.4142,
    "result": 0.731,
    "consistency": None,
    "length": 61.3,
    "grad_norm": 0.5231,
    "seconds": 3.42,
}


def line_of(stage, row, step=7, steps=30, seconds_left=82):
    return step_line.step_line(step, steps, row, stage.VIEW.step, seconds_left)


def test_the_examples_of_the_docstrings_are_true():
    assert doctest.testmod(step_line).failed == 0


def test_a_step_is_one_line_of_eight_numbers():
    expected = (
        "step  7/30  reward  1.41  right 0.731  consistent     -  length  61.3  grad norm 0.523  "
        "3.42s  left 1m22s"
    )
    assert line_of(rl, ROW) == expected


@pytest.mark.parametrize("stage", [rl, downstream_grpo, sft])
def test_extreme_numbers_stay_within_110_columns(stage):
    row = dict.fromkeys(stage.VIEW.step, 0.98) | {"loss": 123.4, "norm": 1e9, "tokens": 123_456}
    row |= {"reward": -0.25, "length": 16384.2, "grad_norm": 123_456.0, "seconds": 1234.5}
    line = line_of(stage, row, step=1234, steps=9999, seconds_left=86_400 * 9.9)
    assert 60 < len(line) <= 110
    usual = line_of(stage, dict.fromkeys(row, 0.98), step=999, steps=9999)
    assert usual.index("grad norm") == line.index("grad norm")  # they stand below each other


@pytest.mark.parametrize("number", [math.inf, math.nan, 9999.96, 99.96, 0.9996, 0.0005, -0.251])
def test_a_number_is_never_longer_than_five_characters(number):
    assert len(short(number)) <= 5


def test_held_out_figures_that_a_model_does_not_have_are_left_out():
    row = {"val_loss": 0.51234, "val_accuracy": 0.85, "val_n": 200, "loss": 0.3}
    expected = "step 20/20  held out  loss 0.512  accuracy 0.850  of 200"
    assert held_out_line(20, 20, row, sft.VIEW.held_out) == expected
