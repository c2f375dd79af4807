"""What is measured of answers: whether they read as text, how well values order them, intervals."""

import numpy as np
import pytest

from learning.judging.evaluation import is_well_formed
from learning.judging.statistics import accuracy, mean_interval


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("Hey there! 👋", True),
        ("ok", True),
        ("", False),
        ("  \n", False),
        ("broken \ufffd", False),
        ("a<|im_start|>", False),
        ("go to the shop go to the shop go to the shop", False),
    ],
)
def test_an_answer_is_well_formed_if_it_reads_as_text(text, good):
    assert is_well_formed(text) == good


def test_accuracy_is_a_half_for_noise_and_one_for_a_perfect_order():
    signs = np.array([1, 1, -1, -1])
    assert accuracy(np.array([4.0, 3.0, 2.0, 1.0]), signs) == 1.0
    assert accuracy(np.zeros(4), signs) == 0.5


def test_an_interval_holds_the_mean_and_narrows_with_more_values():
    few, many = mean_interval([0.0, 1.0] * 5, seed=0), mean_interval([0.0, 1.0] * 100, seed=0)
    assert few[1] < few[0] == 0.5 < few[2]
    assert many[2] - many[1] < few[2] - few[1]
