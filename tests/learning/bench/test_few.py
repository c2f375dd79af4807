"""The slice `few` of the learning benchmark: its cells, its figures, and that a taste is served and chance is not."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bot.config import Config
from learning.bench import few, few_figures
from learning.bench.few import FewCell, FewPoint
from learning.bench.grid import PEOPLE_KINDS, SEEDS
from learning.bench.simulated_people import LANGUAGES, read_prompts


def series(arm: str, rates: dict[int, float], candidates: int = 8, users: str = "brief") -> list[FewPoint]:
    return [FewPoint(arm, users, step, rate, candidates, 0.9, 1.0, 1.1, 0.1) for step, rate in rates.items()]


def test_every_kind_of_people_is_served_with_every_seed_and_each_arm_has_five_seeds():
    cells = few_figures.choose_cells(few_figures.choose_size(is_toy=True), None, seed=3)
    assert {(cell.users, cell.seed) for cell in cells if cell.arm == "served"} == {
        (PEOPLE_KINDS, 3 + number) for number in range(SEEDS)
    }
    for arm in ("weights", "placebo_weights"):
        assert {cell.users for cell in cells if cell.arm == arm} == {(kind,) for kind in PEOPLE_KINDS}
        assert len({cell.seed for cell in cells if cell.arm == arm}) >= SEEDS
    own = few_figures.choose_cells(few_figures.choose_size(is_toy=True), "mine.py", 0)
    assert {cell.users for cell in own} == {("mine.py",)}


def test_people_speak_each_of_two_languages_with_another_model_than_the_toy():
    cells = few_figures.choose_cells(few_figures.choose_size(is_toy=False), None, seed=3)
    served, trained = ([(cell.seed, cell.language) for cell in cells if cell.arm == arm] for arm in ("served", "weights"))
    assert sorted(served) == [(3 + number, language) for number in range(SEEDS) for language in LANGUAGES]
    assert trained == [*zip((3, 4), LANGUAGES, strict=True)], "without a GPU one series takes twenty minutes"
    prompts = [read_prompts(False, language) for language in LANGUAGES]
    every = [text for one in prompts for text in (*one.said, *one.held_out)]
    assert len(every) == len(set(every)), "what judges answers is never said"
    assert len({(len(one.said), len(one.held_out)) for one in prompts}) == 1


def test_figures_are_means_with_intervals_and_the_share_of_placebos_that_ever_chose():
    served, trained = {20: 0.8, 50: 0.9, 200: 1.0}, {20: 0.6, 50: 0.8, 100: 0.9}
    found = [series("served", {step: rate + number / 100 for step, rate in served.items()}) for number in range(-2, 3)]
    found += [series("placebo_served", dict.fromkeys(served, 0.5), candidates) for candidates in (1, 1, 1, 4)]
    found += [series("weights", trained), series("placebo_weights", dict.fromkeys(trained, 0.5), 1)]
    cells = {number: [replace(one, seed=number) for one in points] for number, points in enumerate(found)}
    figures = few_figures.compute_figures(cells)
    assert figures["served_win_rate_20"] == pytest.approx(0.8)
    assert figures["served_win_rate_20_low"] < 0.8 < figures["served_win_rate_20_high"]
    assert figures["placebo_switched_on_200"] == 0.25
    assert (figures["weights_win_rate_50"], figures["weights_win_rate_100"]) == (0.8, 0.9)
    assert figures["placebo_weights_win_rate_50"] == figures["placebo_served_win_rate_200"] == 0.5
    assert figures["oracle_win_rate"] == pytest.approx(0.9)
    assert (figures["served_reactions_to_80"], figures["weights_reactions_to_80"]) == (pytest.approx(20), pytest.approx(50))
    assert (figures["well_formed"], figures["perplexity_ratio"]) == (1.0, pytest.approx(1.1))
    json.dumps(figures)


def test_a_taste_is_served_after_a_few_reactions_and_reactions_by_lot_are_not(demo_model, monkeypatch):
    monkeypatch.setattr("learning.bench.arena.SAMPLES_PER_PROMPT", 1)
    cell = FewCell("served", ("casual", "brief", "curious"), 0, steps=(8, 40))
    points = few.run_cell(Config(), demo_model, cell)
    found = {(one.arm, one.reactions): one for one in points if one.users == "casual"}
    assert found["served", 8].candidates == 1, "too few to be sure of anything"
    assert found["served", 8].win_rate == pytest.approx(0.5, abs=0.1)
    assert found["served", 40].candidates > 1
    assert found["served", 40].win_rate > 0.8
    assert found["served", 40].win_rate > 0.85 * found["served", 40].oracle
    by_lot = [one.win_rate for one in points if (one.arm, one.reactions) == ("placebo_served", 40)]
    assert np.mean(by_lot) == pytest.approx(0.5, abs=0.1), "the control"
