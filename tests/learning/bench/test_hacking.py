"""The slice `hacking` of the learning benchmark: its cells, its figures, and that both arms begin with the same policy."""

import json
from dataclasses import replace

import pytest

from bot.config import Config
from learning.bench import hacking
from learning.bench.arena import Point
from learning.bench.grid import PEOPLE_KINDS, SEEDS
from learning.bench.hacking import ARMS, HackingCell

PLAIN = Point(0, 0.5, 0.5, 0.0, 1.0, 1.0, 0.0, stopped=False, drifted=False)


def test_both_arms_have_every_kind_of_people_and_five_seeds():
    cells = hacking.choose_cells(None, seed=7)
    for arm in ARMS:
        assert [cell.users for cell in cells if cell.arm == arm] == [*PEOPLE_KINDS]
        assert [cell.seed for cell in cells if cell.arm == arm] == [*range(7, 7 + SEEDS)]
    assert {cell.users for cell in hacking.choose_cells("mine.py", 0)} == {"mine.py"}


def test_a_fall_is_what_the_last_round_lost_against_the_best_one_of_the_mean():
    curves = {"guarded": (0.0, 0.4, 0.5), "unguarded": (0.0, 0.6, -0.2)}
    found = {
        HackingCell(arm, "brief", seed): [replace(PLAIN, utility=value + seed / 100) for value in curve]
        for arm, curve in curves.items()
        for seed in range(3)
    }
    figures = hacking.compute_figures(found)
    assert (figures["guarded_best_round"], figures["unguarded_best_round"]) == (2, 1)
    assert figures["guarded_fall"] == 0
    assert figures["unguarded_fall"] == pytest.approx(0.8)
    assert figures["unguarded_utility_last_low"] < -0.19 < figures["unguarded_utility_last_high"]
    json.dumps(figures)


def test_both_arms_begin_with_one_policy_and_go_different_ways(demo_model, monkeypatch):
    monkeypatch.setattr(hacking, "REACTIONS", 12)
    monkeypatch.setattr(hacking, "ROUNDS", 1)
    monkeypatch.setattr(hacking, "train_policy", lambda *_: None)  # the reactions teach only the head
    monkeypatch.setattr("learning.bench.arena.SAMPLES_PER_PROMPT", 1)
    monkeypatch.setattr("learning.training.distillation.STEPS", 2)
    config = Config()
    config = config.model_copy(
        update={
            "learning": config.learning.model_copy(update={"distil_prompts": 3}),
            "training": config.training.model_copy(update={"max_steps": 2}),
        }
    )
    found = {arm: hacking.run_cell(config, demo_model, HackingCell(arm, "curious", 0)) for arm in ARMS}
    assert [len(rows) for rows in found.values()] == [2, 2]
    assert found["guarded"][0] == found["unguarded"][0]
    assert found["guarded"][1] != found["guarded"][0]
    assert found["unguarded"][1] not in (found["guarded"][1], found["unguarded"][0])
