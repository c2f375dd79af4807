"""What a training run costs: that it is measured against the plain script, not how fast this machine is."""

import pytest

from bot.config import load
from learning.bench import train
from learning.data.experience import Experience


@pytest.mark.slow
def test_each_objective_is_measured_beside_the_plain_script(demo_model, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "OBJECTIVES", ("mixed",))
    monkeypatch.setattr(train, "SIZE", train.Size(rows=64, steps=2, rounds=1))
    stages = []
    config = load(data_dir=str(tmp_path), training={"max_steps": 6}, gate={"samples": 12})
    figures = train.measure(config, demo_model, lambda *told: stages.append(told))
    compared = {"mixed_tokens_per_s", "mixed_tokens_per_s_ratio", "mixed_peak_memory_ratio"}
    assert set(figures) == compared | {"steps_share_of_run"}
    assert all(value > 0 for value in figures.values())
    assert figures["steps_share_of_run"] < 1
    assert stages == [("mixed", 0, 2), ("mixed", 1, 2), ("one whole run", 0, 1)]
    assert not list(tmp_path.iterdir()), "the run's own data is gone"


def test_tokens_that_are_read_are_counted():
    row = Experience("", "", (1, 2, 3), (4, 5), None, 1.0, (), rejected_ids=(6,))
    assert train._count_tokens(row) == 5
    assert train._count_pair_tokens(row) == 9
