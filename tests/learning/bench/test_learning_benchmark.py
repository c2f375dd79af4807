"""The learning benchmark: what it counts, that it goes on where it was; and that the anchor holds against noise."""

import json
import random
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
import torch

from bot.config import Config, load
from bot.errors import ConfigError
from learning.bench import grid, jobs
from learning.bench.arena import Arena, Point, ReactingPeople, RunEnd, talk, train_policy
from learning.bench.grid import (
    CONTROLS,
    OBJECTIVES,
    SEEDS,
    STEPS,
    Cell,
    choose_cells,
    compute_figures,
    count_reactions_to,
    count_reactions_to_recover,
    run_cell,
    shuffle_rewards,
)
from learning.bench.simulated_people import read_prompts

ROUNDS = 10


def point(reactions: int, win_rate: float) -> Point:
    return Point(reactions, win_rate, win_rate, 0.0, 1.0, 1.0, 0.0, False, False)


def curve(*rates: float) -> list[Point]:
    return [point(step, rate) for step, rate in zip(STEPS, rates, strict=True)]


def test_people_react_as_they_mean_it_but_for_the_noise():
    likes = [
        ReactingPeople(lambda prompt, reply: 1.0, 0.1, 0.5, random.Random(seed)).give_opinion("", "") for seed in range(4000)
    ]
    given = [one for one in likes if one is not None]
    assert len(given) / len(likes) == pytest.approx(0.5, abs=0.03)
    assert sum(given) / len(given) == pytest.approx(0.9, abs=0.02)


def test_where_nothing_can_be_learned_the_policy_stays_as_it_was(demo_model, monkeypatch):
    monkeypatch.setattr(grid, "STEPS", (8,))
    monkeypatch.setattr(grid, "find_utility", lambda name: lambda prompt, reply: 1.0)
    [found] = run_cell(Config(), demo_model, Cell("dpo", "content", 0, noise=0.0))
    assert found.kl == 0
    assert found.win_rate == 0.5, "everybody likes everything: there is nothing to tell apart"


def test_a_cell_gives_the_same_whatever_its_process_did_before(demo_model, monkeypatch):
    monkeypatch.setattr(grid, "STEPS", (16,))
    monkeypatch.setattr("learning.bench.arena.SAMPLES_PER_PROMPT", 1)

    def cell(seed: int) -> list[Point]:
        torch.rand(5)  # something drawn before
        return run_cell(Config(), demo_model, Cell("kto", "brief", seed))

    first = cell(0)
    assert cell(0) == first
    assert cell(1) != first, "the control"


def test_the_small_slice_has_every_arm_on_every_seed_and_the_full_one_holds_it():
    small, whole = choose_cells("ci", None), choose_cells("full", None)
    assert {(cell.arm, cell.seed) for cell in small} == {(a, s) for a in (*OBJECTIVES, *CONTROLS) for s in range(SEEDS)}
    assert set(small) < set(whole)
    assert {cell.regime for cell in whole} == {"fresh", "logged", "drift"}
    assert {cell.regime for cell in choose_cells("regimes", None)} == {"logged", "drift"}
    assert {(cell.noise, cell.rate) for cell in whole} == {*product((0.0, 0.1, 0.2), (1.0, 0.2, 0.05))}
    for part in ("rates", "regimes"):
        assert set(choose_cells(part, None)) < set(whole)
        assert not set(choose_cells(part, None)) & set(small)
    assert {cell.arm for cell in choose_cells("rates", None, "kto,frozen")} == {"kto", "frozen"}
    with pytest.raises(ConfigError, match="--arms has value 'kto,ppo'; choose from kto,bco,dpo"):
        choose_cells("ci", None, "kto,ppo")
    assert {cell.users for cell in choose_cells("ci", "mine.py")} == {"mine.py"}
    assert [cell.seed for cell in choose_cells("ci", None, "kto", seed=100)] == [*range(100, 100 + SEEDS)]


def test_figures_are_those_of_the_default_and_of_each_arm():
    found = {Cell("kto", "brief", seed): curve(0.5, 0.6, 0.7, 0.8, 0.8 + seed / 100) for seed in range(5)}
    found |= {Cell("frozen", "brief", seed): curve(*[0.5] * 5) for seed in range(5)}
    found[Cell("kto", "brief", 0, noise=0.2)] = curve(*[0.1] * 5)
    made = compute_figures(found, default="kto")
    assert made["kto_win_rate_200"] == made["default_win_rate_200"] == pytest.approx(0.82)
    assert 0.8 <= made["default_win_rate_200_low"] < 0.82 < made["default_win_rate_200_high"] <= 0.84
    assert made["default_reactions_to_80"] == pytest.approx(160)
    assert made["frozen_reactions_to_65"] is None
    assert made["kto_noise_0.2_rate_1_fresh_win_rate"] == pytest.approx(0.1)
    assert made["kto_noise_0.2_rate_1_fresh_win_rate_low"] <= 0.1
    json.dumps(made)


def test_reactions_to_a_goal_are_drawn_straight_between_the_steps():
    assert count_reactions_to(0.65, [0.5, 0.6, 0.7, 0.8, 0.9]) == pytest.approx(100)
    assert count_reactions_to(0.6, [0.7, 0.1, 0.1, 0.1, 0.1]) == pytest.approx(20)
    assert count_reactions_to(0.95, [0.5, 0.6, 0.7, 0.8, 0.9]) is None


def test_recovering_is_to_win_again_nine_tenths_of_what_was_won():
    assert count_reactions_to_recover([[0.5, 0.6, 0.7, 0.8, 0.9, 0.2, 0.5, 0.8, 0.87, 0.9]]) == 160
    assert count_reactions_to_recover([[0.5, 0.6, 0.7, 0.8, 0.9, 0.2, 0.3, 0.4, 0.4, 0.4]]) is None


def test_an_interrupted_grid_goes_on_where_it_was(tmp_path, monkeypatch):
    wanted = [Cell("kto", "brief", seed) for seed in range(3)]
    kept = tmp_path / "kept.jsonl"

    def half(mark: str) -> None:
        rows = [{"mark": mark, "cell": asdict(one), "points": [asdict(p) for p in curve(*[0.9] * 5)]} for one in wanted[:2]]
        kept.write_text("\n".join([*map(json.dumps, rows), '{"mark": "cut o']))

    def never(*_: object) -> list[Point]:
        raise AssertionError("nothing is left to run")

    config = Config()
    half(jobs.hash_settings(config, "model"))
    found = jobs.run_cells(never, Point, config, "model", wanted[:2], kept, lambda *_: None)
    assert [points[-1].win_rate for points in found.values()] == [0.9, 0.9]
    assert not kept.exists(), "all is done"
    half("of other settings")
    assert list(jobs.read_kept_rows(kept, jobs.hash_settings(config, "model"))) == []


@pytest.mark.slow
@pytest.mark.parametrize("anchored", [True, False])
def test_random_reactions_do_not_move_the_policy_and_without_the_anchor_they_do(demo_model, anchored):
    """Ten rounds in which the adapter goes on from where it was, on shuffled reactions. The control ends once it moved."""
    settings = load(learning={"distil_prompts": 0})
    if not anchored:  # the control
        training = settings.training.model_copy(update={"weight_decay": 0.0})
        settings = settings.model_copy(update={"training": training})
    arena = Arena(settings, demo_model, seed=0, prompts=read_prompts(is_toy=True))
    people = ReactingPeople(lambda prompt, reply: 1.0 if "?" in reply else -1.0, 0.1, 1.0, random.Random(0))
    said = []
    for number in range(ROUNDS):
        said += talk(arena, people, 24)
        train_policy(arena, shuffle_rewards(said, people.rng), "kto", number)
        if number < ROUNDS - 1 and (anchored or number % 2 == 0):
            continue
        found = arena.judge_policy(len(said), people.utility, run=RunEnd())
        is_held = found.kl < settings.gate.kl_budget and found.perplexity_ratio < 1.05
        if not is_held:
            break
    assert is_held == anchored, (number, found.kl, found.perplexity_ratio)
    assert found.kl != 0
    arena.reset_policy()
    assert arena.judge_policy(0, people.utility, run=RunEnd()).kl == 0, "it is version 0 again"
    assert np.isfinite(found.perplexity_ratio)
