"""The probe in the arithmetic of the number format that is served: what is sound passes, what is swapped does not."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bot.config import Config
from learning.bench.swap import save_random_version
from learning.judging import probe
from learning.judging.evaluation import next_logprobs
from learning.judging.gate import Evidence, Gain, HeldOutOpinions, judge
from learning.models.trainable import copy_weights, load_for_training, load_served, restore_weights
from learning.rollout.deployment import ProbeResult

NARROW = Config(serving={"dtype": "bfloat16"})


def asked_of_server(config: Config, base: str, version: str, places: list[probe.ProbePlace]) -> list[float]:
    """What a server that holds `version` in bfloat16 gives at the places of a probe."""
    found = next_logprobs(load_served(config.policy, config.serving, base, version), [place.prompt_ids for place in places])
    return [float(row[token]) for row, place in zip(found, places, strict=True) for token in place.tokens]


def probed(answers: list[float], places: list[probe.ProbePlace], least: float = 0.05) -> ProbeResult:
    candidate, parent = ([one for place in places for one in getattr(place, name)] for name in ("candidate", "parent"))
    distance, from_parent = probe.mean_distance(answers, candidate), probe.mean_distance(answers, parent)
    return ProbeResult(
        distance=distance, from_parent=from_parent, tolerance=probe.compute_distances(places).tolerance(least)
    )


@pytest.fixture(scope="module")
def versions(demo_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions")
    for seed in (0, 1):
        save_random_version(NARROW, demo_model, folder / str(seed), seed)
    return [str(folder / str(seed)) for seed in (0, 1)]


def test_a_version_that_is_served_in_bfloat16_passes_and_a_swapped_one_is_caught(demo_model, versions, tmp_path):
    places = [probe.read(Path(version)) for version in versions]
    for number in (0, 1):
        own, other = (asked_of_server(NARROW, demo_model, versions[one], places[number]) for one in (number, 1 - number))
        assert probed(own, places[number], least=1e-6).passed, "the tolerance is that of the number format"
        assert not probed(other, places[number], least=1e-6).passed
        assert not probed(other, places[number], least=10.0).passed, "the ratio to the parent is the real test"


def test_the_tolerance_follows_the_number_format(demo_model, versions, tmp_path):
    narrow = probe.compute_distances(probe.read(Path(versions[0])))
    save_random_version(Config(), demo_model, tmp_path / "wide", 0)
    wide = probe.compute_distances(probe.read(tmp_path / "wide"))
    assert wide.rounding == 0.0
    assert wide.tolerance(0.05) == 0.05
    assert narrow.rounding > 1e-4
    assert narrow.tolerance(0.0) == probe.TOLERATED_ROUNDINGS * narrow.rounding


def test_what_rounding_hides_is_no_change_and_not_promoted(demo_model, tmp_path):
    model = load_for_training(NARROW.policy, NARROW.serving, NARROW.training, demo_model)
    start = copy_weights(model)
    places = [list(range(3, 3 + length)) for length in (8, 12, 16)]
    parent = probe.measure(model, places)
    found = {}
    for name, scale in (("tiny", 1e-6), ("large", 0.05)):
        torch.manual_seed(0)
        for key, value in model.named_parameters():
            if value.requires_grad and "lora_A" not in key:
                value.data.add_(torch.randn_like(value), alpha=scale)
        (tmp_path / name).mkdir()
        found[name] = probe.compute_distances(
            probe.write(tmp_path / name, places, probe.measure(model, places), parent, 1.0)
        )
        restore_weights(model, start)
    assert found["tiny"].is_no_change
    assert not found["large"].is_no_change
    gain = Gain([0.025, -0.025] * 20, [0.9, 1.1] * 10)
    opinions = HeldOutOpinions([1, -1] * 20, [0] * 40, [str(row) for row in range(40)], [0] * 40, [1.0] * 40)
    good = Evidence(opinions, [0.0] * 40, [0.5, -0.5] * 20, gain, kl=0.1, well_formed=1.0, base_well_formed=1.0)
    told = {name: (one.change, one.rounding, one.is_no_change) for name, one in found.items()}
    verdicts = {}
    for name, (change, rounding, is_no_change) in told.items():
        evidence = Evidence(**{**good.__dict__, "change": change, "rounding": rounding, "is_no_change": is_no_change})
        verdicts[name] = judge(evidence, Config().gate, seed=0)
    assert verdicts["large"].passed
    assert not verdicts["tiny"].passed
    assert verdicts["tiny"].reasons[0].startswith("no change: ")


def test_a_server_that_is_as_near_as_it_may_be_passes_wherever_the_candidate_is_a_change():
    """HIDDEN is large enough: one rounding from a candidate is at most half as far as from its parent."""
    for rounding, change in ((0.01, 0.031), (0.05, 0.151), (0.0, 0.001)):
        found = probe.Distances(rounding, change)
        assert not found.is_no_change
        assert ProbeResult(distance=rounding, from_parent=change - rounding, tolerance=found.tolerance(0.0)).passed


def test_a_probe_of_an_older_kibitz_is_read(versions, tmp_path):
    shutil.copytree(versions[0], tmp_path / "old")
    rows = json.loads((tmp_path / "old" / probe.FILE).read_text())
    (tmp_path / "old" / probe.FILE).write_text(
        json.dumps([{k: v for k, v in row.items() if k != "rounded"} for row in rows])
    )
    assert probe.compute_distances(probe.read(tmp_path / "old")).rounding == 0.0
