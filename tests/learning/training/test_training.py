"""One training run on real TRL: its files, its bytes, its anchor, and what it refuses."""

import json
import random
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import answered, converse, react

from bot.config import Config, TrainingConfig, load
from bot.data_directory import lock_directory
from bot.errors import ConfigError, KibitzError, NothingToLearn
from bot.store.registry import BASE, PolicyRegistry
from bot.types import PolicyState
from learning.bench.swap import register_copy, save_random_version
from learning.data.experience import Experience
from learning.data.replay_buffer import ReplayBuffer
from learning.judging.waiting import read_earlier_verdicts
from learning.models import toy
from learning.models.trainable import copy_weights, restore_weights
from learning.models.trainable import load_for_training as load_model
from learning.models.version_files import is_whole
from learning.training.objectives import train
from learning.training.processes import train_in_processes
from learning.training.run import train_version
from learning.training.teaching import train_with_guard
from learning.training.token_trainers import AnchoredTrainer, TokenKTOTrainer

METRICS = {  # what a run leaves in metrics.json and in the registry
    *("reasons", "judged_against", "drawn_at", "judged_at", "waits_for", "level", "had_enough_evidence", "is_better"),
    *("kl", "well_formed", "base_well_formed", "held_out_liked", "held_out_disliked", "margin_before", "margin_after"),
    *("margin_gain", "margin_gain_low", "margin_gain_high", "margin_gain_by_chance"),
    *("gain", "gain_low", "gain_high", "gain_by_chance", "gain_by_luck"),
    *("trl/loss", "trl/rewards/margins", "trl/kl", "trl/first_reward", "steps", "step_seconds", "train_loss", "rows"),
    *("loss", "stopped", "kept", "checks", "taken_back", "answers_before", "answers_after", "evidence"),
    *("estimated_worth_before", "estimated_worth_after", "estimated_gain", "reward_model", "steps_share_of_run"),
}
EVIDENCE = {"opinions", "live", "candidate", "gain", "kl", "well_formed", "base_well_formed", "faults"}
EVIDENCE |= {"change", "rounding", "is_no_change"}


def quiet(stage: str, done: int, total: int) -> None:
    pass


def with_training(config: Config, **changes) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def test_a_run_registers_a_candidate_with_all_that_explains_it(small, store, registry, tokenizer):
    converse(store, tokenizer, likes_emoji=True, count=96)
    stages = []
    outcome = train_version(small, lambda stage, done, total: stages.append((stage, done, total)))
    version = registry.get(outcome.policy)
    assert outcome.passed, outcome.reasons
    assert version.state == PolicyState.CANDIDATE
    assert registry.get_live().name == BASE, "nothing serves before it is proven"
    files = {path.name for path in Path(version.path).iterdir()}
    assert files == {
        *("adapter_config.json", "adapter_model.safetensors", "config.json"),
        *("manifest.json", "metrics.json", "probe.json", "samples.json"),
    }
    assert load(Path(version.path) / "config.json") == small
    assert json.loads((Path(version.path) / "manifest.json").read_text())["sha256"] == outcome.manifest_sha256
    assert ("train", 12, 12) in stages
    kept = json.loads((Path(version.path) / "metrics.json").read_text())
    assert set(kept) == METRICS, "the keys are documented"
    assert set(kept["evidence"]) == EVIDENCE
    assert kept == json.loads(json.dumps(version.metrics.as_json())) == json.loads(json.dumps(outcome.figures.as_json()))
    assert outcome.figures.margin_gain_low > 0
    assert outcome.figures.gain_low > 0
    taught = registry.list_runs()[0]
    assert taught["n"] == len(outcome.snapshot.trained_on)
    assert taught["outcome"] == "passed"


def test_the_same_feedback_and_seed_give_the_same_bytes_and_another_seed_does_not(small, store, registry, tokenizer):
    converse(store, tokenizer, likes_emoji=True, count=24)
    outcomes = [train_version(config, quiet) for config in (small, small, small.model_copy(update={"seed": 1}))]
    assert outcomes[0].manifest_sha256 == outcomes[1].manifest_sha256 != outcomes[2].manifest_sha256
    assert outcomes[0].adapter_sha256 == outcomes[1].adapter_sha256 != outcomes[2].adapter_sha256
    assert len({outcome.policy for outcome in outcomes}) == 3


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_random_reactions_do_not_pass_the_gate(small, store, registry, tokenizer, kind):
    """One in a thousand would pass; that it is no more than the confidence says, is shown in test_evaluation."""
    strict = small.gate.model_copy(update={"confidence": 0.999, "samples": 64})
    small = with_training(small, weights=kind, full_learning_rate=3e-4).model_copy(update={"gate": strict})
    rng = random.Random(1)
    for _ in range(96):
        prompt, intent = rng.choice(toy.list_prompts())
        react(
            store, answered(store, tokenizer, prompt, toy.compose_answer(intent, rng.choice(toy.STYLES))), rng.random() < 0.5
        )
    outcome = train_version(small, quiet)
    assert not outcome.passed
    version = registry.get(outcome.policy)
    assert version.state == PolicyState.REJECTED
    assert len(version.sha256) == 64
    assert not is_whole(Path(version.path)), "what will never serve need not be kept, where it is large"


def test_what_people_mean_passes_the_same_gate(small, store, registry, tokenizer):
    strict = small.gate.model_copy(update={"confidence": 0.999, "samples": 64})
    converse(store, tokenizer, likes_emoji=True, count=160)
    outcome = train_version(small.model_copy(update={"gate": strict}), quiet)
    assert outcome.passed, outcome.reasons
    assert outcome.figures.margin_gain_by_chance <= 0.001


def test_with_too_little_evidence_a_version_waits_until_one_that_was_trained_later_takes_its_place(
    small, store, registry, tokenizer
):
    converse(store, tokenizer, likes_emoji=True, count=24)
    patient = small.model_copy(update={"learning": small.learning.model_copy(update={"wait_reactions": 20})})
    first = train_version(patient, quiet, is_deployment_requested=True)
    assert (first.passed, first.waits) == (False, True), first.reasons
    waiting = registry.get(first.policy)
    assert registry.find_waiting() == [waiting]
    assert registry.find_requested() == [], "it is no candidate yet"
    assert 0 < waiting.awaited_reactions <= 20
    assert waiting.drawn_at >= max(
        row.at for turn in store.find_turns_with_feedback() for row in store.read_feedback_on([turn.id])[turn.id]
    )
    assert (Path(waiting.path) / "adapter_model.safetensors").exists()
    second = train_version(patient, quiet)
    assert registry.get(first.policy).metrics.reasons == [f"{second.policy} was trained after it"]
    assert registry.get(first.policy).state == PolicyState.REJECTED
    assert not (Path(waiting.path) / "adapter_model.safetensors").exists()
    assert read_earlier_verdicts(registry) == [], "nothing was spent"
    assert [version.name for version in registry.find_waiting()] == [second.policy]
    third = train_version(small, quiet)
    assert (third.passed, third.waits) == (False, False), "the control: it may not wait"
    assert registry.get(third.policy).state == PolicyState.REJECTED


def test_a_run_without_usable_rewards_registers_nothing(small, store, registry, tokenizer):
    with pytest.raises(NothingToLearn, match=r"0 turns with feedback, 0 held out; collect more reactions first$"):
        train_version(small, quiet)
    react(store, answered(store, tokenizer, "hello", "Hey!"), approves=True)
    with pytest.raises(NothingToLearn, match=r"1 turn with .*collect more reactions first, or raise training\.max_length$"):
        train_version(with_training(small, max_length=1), quiet)
    assert [version.name for version in registry.all()] == [BASE]


@pytest.mark.slow
def test_each_so_many_th_run_begins_at_the_base_again(small, store, registry, tokenizer):
    converse(store, tokenizer, likes_emoji=True)
    anew = small.model_copy(update={"learning": small.learning.model_copy(update={"from_base_every": 2})})
    first = train_version(anew, quiet).policy
    registry.promote(first)
    second, third = train_version(anew, quiet).policy, train_version(small, quiet).policy
    assert [registry.get(name).parent for name in (first, second)] == [BASE, BASE]
    assert registry.get(third).parent == first  # the control


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("lora", "kto"),
        pytest.param("full", "mixed", marks=pytest.mark.slow),
    ],
)
def test_two_processes_teach_what_one_does_and_say_what_it_would_say(small, demo_model, store, tokenizer, kind, objective):
    converse(store, tokenizer, likes_emoji=True, count=48)
    small = with_training(small, weights=kind, full_learning_rate=3e-4, objective=objective)
    found = ReplayBuffer(store, tokenizer, small).snapshot()
    prompts = [one.prompt_ids for one in found.held_out]
    taught, stages = [], []
    model = load_model(small.policy, small.serving, small.training, demo_model)
    start = copy_weights(model)
    for processes in (1, 2):
        restore_weights(model, start)
        config = with_training(small, processes=processes)
        lesson = found.training, found.held_out, prompts, lambda *told: stages.append(told)
        if processes == 1:
            figures = train_with_guard(config, model, tokenizer, *lesson)
        else:
            figures = train_in_processes(config, model, demo_model, *lesson)
        assert figures.steps == 12
        moved = {name: value - start[name] for name, value in copy_weights(model).items()}
        taught.append(torch.cat([value.flatten() for value in moved.values()]))
    assert stages[-1] == ("train", 12, 12)
    assert float(torch.cosine_similarity(*taught, dim=0)) > 0.8
    assert float(taught[0].norm()) == pytest.approx(float(taught[1].norm()), rel=0.3)
    if objective == "mixed":  # an error crosses the processes alike, whatever they were to learn
        with pytest.raises(NothingToLearn, match="can use none of"):
            train_in_processes(with_training(config, objective="dpo"), model, demo_model, *lesson)


@pytest.mark.slow
def test_whole_weights_go_on_from_whole_ones_and_adapters_begin_at_the_base(small, store, registry, tokenizer, tmp_path):
    converse(store, tokenizer, likes_emoji=True)
    whole = with_training(small, weights="full", full_learning_rate=3e-4)
    first = train_version(whole, quiet)
    assert first.passed, first.reasons
    files = {path.name for path in Path(registry.get(first.policy).path).iterdir()}
    assert files == {"model", "config.json", "manifest.json", "metrics.json", "probe.json", "samples.json"}
    registry.promote(first.policy)
    second = train_version(whole, quiet)
    assert registry.get(second.policy).parent == first.policy
    assert second.figures.kl > first.figures.kl > 0, "it is the base that it is held to"
    assert registry.get(train_version(small, quiet).policy).parent == BASE, "an adapter is served on the base"
    save_random_version(small, registry.get(BASE).base_model, tmp_path / "adapter", seed=0)
    adapter = register_copy(registry, tmp_path / "adapter")
    registry.promote(adapter.name)
    assert registry.get(train_version(whole, quiet).policy).parent == adapter.name, "it is merged"


def spoilt(case: str, config: Config, base: Path) -> Config:
    """The config, or the base model, of a run that cannot end well."""
    match case:
        case "the loss is no number":
            return with_training(config, learning_rate=1e30)
        case "the base model is gone":
            base.rename(base.with_name("elsewhere"))
        case "the weights are gone":
            next(base.glob("*.safetensors")).unlink()
    return config


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    ("case", "word"),
    [
        ("one turn only", r"no usable reward|every reward is [+-]1.00 \(1 answer\)"),
        ("one class only", r"every reward is \+1\.00 \(\d+ answers\)"),
        ("the loss is no number", "NaN; lower training.learning_rate"),
        ("no memory", "out of memory with 4 answers at a time; lower training.max_length"),
        ("the base model is gone", "cannot be loaded"),
        ("the weights are gone", "cannot be loaded .*put it back"),
    ],
)
def test_what_cannot_be_learned_from_is_told_in_a_line_and_nothing_is_lost(
    case, word, small, database, store, tokenizer, demo_model, tmp_path, monkeypatch
):
    base = Path(shutil.copytree(demo_model, tmp_path / "base"))
    registry = PolicyRegistry(database)
    registry.ensure_base(str(base))
    if case == "one turn only":
        react(store, answered(store, tokenizer, "hello", "Hey!"), approves=True)
    elif case == "one class only":
        for number in range(12):
            react(store, answered(store, tokenizer, f"hello {number}", "Hey!"), approves=True)
    else:
        converse(store, tokenizer, likes_emoji=True, count=24)
    if case == "no memory":
        monkeypatch.setattr(TokenKTOTrainer, "training_step", out_of_memory)
    counts = store.count_rows()
    with pytest.raises(KibitzError, match=word) as error:
        train_version(spoilt(case, small, base), quiet)
    assert "\n" not in str(error.value)
    assert store.count_rows() == counts
    assert registry.get_live().name == BASE
    assert not list((small.data / "policies").glob("*"))
    assert {version.state for version in registry.all()} <= {PolicyState.LIVE, PolicyState.REJECTED}


def test_a_run_that_does_only_harm_is_refused_and_what_it_did_is_told(small, store, registry, tokenizer, monkeypatch):
    converse(store, tokenizer, likes_emoji=True)
    monkeypatch.setattr("learning.training.guard.LIKED_LOSS", -10.0)  # nothing is ever good enough
    outcome = train_version(small, quiet)
    assert not outcome.passed
    assert outcome.reasons[0].startswith("training only harmed the policy: held-out liked answers lost ")
    assert outcome.figures.evidence.candidate != outcome.figures.evidence.live, "the harm was measured"
    assert registry.get_live().name == BASE
    assert [version.state for version in registry.all()] == [PolicyState.LIVE, PolicyState.REJECTED]
    assert "only harmed the policy" in registry.list_runs()[0]["outcome"]


def test_a_run_whose_prompts_are_all_too_long_says_which_limit(small, store, registry, tokenizer):
    react(store, answered(store, tokenizer, "long " * 300, "Hey!"), approves=True)
    config = small.model_copy(update={"training": small.training.model_copy(update={"max_length": 64})})
    with pytest.raises(NothingToLearn, match=r"1 longer than training\.max_length \(64\)"):
        train_version(config, quiet)
    assert [version.name for version in registry.all()] == [BASE]


def test_an_interrupted_run_leaves_nothing_behind_and_the_next_one_works(small, store, registry, tokenizer):
    converse(store, tokenizer, likes_emoji=True, count=24)

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("train", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_version(small, interrupt)
    assert list((small.data / "policies").iterdir()) == []
    assert registry.get("policy-1").state == PolicyState.REJECTED
    assert registry.list_runs()[0]["outcome"] == "interrupted"
    assert train_version(small, quiet).policy == "policy-2"


def test_what_a_killed_run_left_is_cleared_up_by_the_next(small, store, registry, tokenizer):
    converse(store, tokenizer, likes_emoji=True, count=24)
    registry.reserve(registry.get(BASE))
    leftover = small.data / "policies" / "policy-1.unfinished"
    leftover.mkdir(parents=True)
    assert train_version(small, quiet).policy == "policy-2"
    assert not leftover.exists()
    assert registry.get("policy-1").state == PolicyState.REJECTED


def test_two_runs_at_once_are_refused(small, store, registry, tokenizer):
    converse(store, tokenizer, likes_emoji=True, count=8)
    with lock_directory(small.data, "train"), pytest.raises(ConfigError, match="in use"):
        train_version(small, quiet)


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize(("kind", "objective"), [("lora", "kto"), ("full", "kto"), ("lora", "bco")])
def test_a_continued_policy_is_anchored_to_the_base(demo_model, tokenizer, tmp_path, anchored, kind, objective, monkeypatch):
    """First-step rewards are log-ratios to the reference: not zero if it is the base, zero if it is the policy itself."""
    config = Config(training={"weights": kind})
    save_random_version(config, demo_model, tmp_path / "parent", seed=0)
    model = load_model(config.policy, config.serving, config.training, demo_model, str(tmp_path / "parent"))
    if not anchored:  # the control: what TRL does by itself
        monkeypatch.setattr(AnchoredTrainer, "anchor_to_base", lambda self: nullcontext())
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "hello"}])
    rows = [
        Experience(text, text, tuple(prompt), tuple(tokenizer.completion_ids(text)), None, worth, (), advantage=worth)
        for text, worth in (("Hey!", 1.0), ("No.", -1.0), ("Hello.", 1.0), ("Hi there", 1.0))
    ]
    settings = TrainingConfig(objective=objective, epochs=1, batch_size=4, learning_rate=1e-6, weights=kind)
    first = train(model, tokenizer.hf, rows, settings, seed=0, progress=quiet).trl_first_reward
    assert (abs(first) > 1e-3) == anchored
