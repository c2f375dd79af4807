"""The slice `corrections` of the learning benchmark: its cells, its figures, its arms, and a short run of it."""

import json
from dataclasses import replace

import pytest

from bot.config import Config
from learning.bench import corrections
from learning.bench.arena import Point
from learning.bench.corrections import ARMS, COUNTS, CorrectionsCell, repeat_corrected
from learning.bench.grid import PEOPLE_KINDS, SEEDS
from learning.data.experience import Experience

PLAIN = Point(0, 0.5, 0.5, 0.0, 1.0, 1.0, 0.0, stopped=False, drifted=False)


def test_every_arm_has_every_kind_of_people_and_five_seeds():
    cells = corrections.choose_cells(None, seed=7)
    for arm in ARMS:
        assert [cell.users for cell in cells if cell.arm == arm] == [*PEOPLE_KINDS]
        assert [cell.seed for cell in cells if cell.arm == arm] == [*range(7, 7 + SEEDS)]
    assert {cell.users for cell in corrections.choose_cells("mine.py", 0)} == {"mine.py"}


def test_the_figures_are_means_over_series_after_each_number_of_corrections():
    found = {
        CorrectionsCell(arm, "brief", seed): [
            replace(PLAIN, win_rate=0.5 + at / 10 + seed / 100) for at in range(len(COUNTS))
        ]
        for arm in ARMS
        for seed in range(3)
    }
    figures = corrections.compute_figures(found)
    assert figures["own_answers_win_rate_5"] == pytest.approx(0.51)
    assert figures["plain_win_rate_20"] == pytest.approx(0.71)
    assert figures["repeated_win_rate_10_low"] < 0.61 < figures["repeated_win_rate_10_high"]
    json.dumps(figures)


def test_the_control_has_as_many_rows_of_the_same_weight():
    wanted = Experience("turn", "", (1,), (2,), None, 1.0, ("edit",), rejected_ids=(3,), is_correction=True, advantage=0.8)
    rows = repeat_corrected(Config(), None, None, [replace(wanted, is_correction=False, advantage=-0.5), wanted])
    assert len(rows) == 2 * Config().learning.own_answers
    assert {(one.completion_ids, one.rejected_ids, one.is_correction) for one in rows} == {((3,), None, False)}
    assert sum(one.advantage for one in rows) == pytest.approx(-0.8)


def test_a_cell_is_run(demo_model, monkeypatch):
    monkeypatch.setattr(corrections, "COUNTS", (2, 3))
    monkeypatch.setattr("learning.bench.arena.SAMPLES_PER_PROMPT", 1)
    config = Config()
    config = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": 2})})
    found = {arm: corrections.run_cell(config, demo_model, CorrectionsCell(arm, "curious", 0)) for arm in ARMS}
    assert [[point.reactions for point in points] for points in found.values()] == [[2, 3]] * 3
    assert found["own_answers"] != found["plain"] != found["repeated"]
