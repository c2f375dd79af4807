"""What a run begins with: with a proven reward head also the policy's own answers, labelled; and whom it learned from."""

from pathlib import Path

import pytest
from conftest import answered, react
from one_weight import EXCLAIMS, STATES, learn_in_an_instant

from bot.store.forgetting import forget_person
from bot.store.teachers import find_feedback_that_taught
from bot.types import Conversation, PolicyState, new_id
from learning.data.explanation import explain
from learning.data.manifest import read_manifest
from learning.data.replay_buffer import ReplayBuffer
from learning.data.selection import is_held_out, question_key
from learning.training.distillation import USUAL
from learning.training.run import train_version

PROMPTS = 4
LABELS = PROMPTS * USUAL.answers * USUAL.rounds


@pytest.fixture
def teaching(config):
    """A config under which runs are judged at once, and a third of the questions is held out."""
    changes = {
        "learning": {"held_out": 0.3, "detect_drift": False, "wait_reactions": 0, "distil_prompts": PROMPTS},
        "gate": {"samples": 16},
        "dialogue": {"embedder": "none"},
    }
    return config.model_copy(update={key: getattr(config, key).model_copy(update=told) for key, told in changes.items()})


def talk(store, tokenizer, share: float, *, has_taste: bool = True, platform: str = "test"):
    """Ann judges an answer to a held-out question, others judge forty. Returns hers, with what she said of it."""
    spellings = (f"what does ann say to try {number}" for number in range(100))
    asked = next(one for one in spellings if is_held_out(question_key(one), share))
    hers = None
    for number in range(41):
        exclaims = bool(number % 2)
        likes = exclaims if has_taste else bool(number // 2 % 2)
        text, person = (f"question number {number}", f"person{number % 7}") if number else (asked, "ann")
        place = store.open_conversation(Conversation(platform, new_id(), space="file"))
        turn = answered(store, tokenizer, text, EXCLAIMS if exclaims else STATES, author=person, place=place)
        given = react(store, turn, likes, person)
        hers = hers or (turn, given)
    return hers


def quiet(stage: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("case", ["proven", "not proven", "switched off"])
def test_with_a_proven_head_a_run_learns_from_labels_and_from_all_who_taught_the_head(
    teaching, database, store, registry, tokenizer, case
):
    turn, given = talk(store, tokenizer, teaching.learning.held_out, has_taste=case != "not proven")
    if case == "switched off":
        teaching = teaching.model_copy(update={"learning": teaching.learning.model_copy(update={"distil_prompts": 0})})
    with learn_in_an_instant(tokenizer):
        outcome = train_version(teaching, quiet)
    version, is_labelled = registry.get(outcome.policy), case == "proven"
    manifest = read_manifest(Path(version.path))
    assert outcome.figures.labels == version.metrics.labels == (LABELS if is_labelled else 0)
    assert turn.id in {row.turn_id for row in manifest.held_out}
    assert (turn.id in {row.turn_id for row in manifest.head_rows}) == is_labelled
    assert manifest.distil_prompts == (PROMPTS if is_labelled else 0)
    assert (given.id in find_feedback_that_taught(database, [given.id])) == is_labelled
    told = explain(turn.id, ReplayBuffer(store, tokenizer, teaching), registry).lines()
    assert (f"used by {version.name}: it taught the reward head that judged the policy's own answers" in told) == is_labelled
    assert ("not used by any version yet" in told) != is_labelled
    forget_person(database, registry, "test", "ann")
    assert (registry.get(version.name).state == PolicyState.PURGED) == is_labelled
    assert Path(version.path).exists() != is_labelled
    forget_person(database, registry, "test", "person1")  # the control: somebody whose reactions it was trained on
    assert registry.get(version.name).state == PolicyState.PURGED


def test_questions_that_nobody_judged_are_answered_for_the_head_and_who_asked_them_can_be_forgotten(
    teaching, database, store, registry, tokenizer
):
    silent = [answered(store, tokenizer, f"what else, number {number}?", STATES, author="zoe") for number in range(8)]
    talk(store, tokenizer, teaching.learning.held_out)
    with learn_in_an_instant(tokenizer):
        outcome = train_version(teaching, quiet)
    version = registry.get(outcome.policy)
    asked = read_manifest(Path(version.path)).unjudged
    assert asked
    assert {*asked} < {turn.id for turn in silent}, "some are held out"
    used = f"used by {version.name}: it answered the question again, and a reward head judged the answers"
    told = {turn.id: explain(turn.id, ReplayBuffer(store, tokenizer, teaching), registry).lines() for turn in silent}
    assert {turn_id for turn_id, lines in told.items() if used in lines} == {*asked}
    forget_person(database, registry, "test", "nobody")
    assert registry.get(version.name).state != PolicyState.PURGED, "the control"
    forget_person(database, registry, "test", "zoe")
    assert registry.get(version.name).state == PolicyState.PURGED
    assert not Path(version.path).exists()


def test_without_a_proven_head_no_further_question_is_answered(teaching, store, registry, tokenizer):
    answered(store, tokenizer, "what else?", STATES, author="zoe")
    talk(store, tokenizer, teaching.learning.held_out, has_taste=False)
    with learn_in_an_instant(tokenizer):
        outcome = train_version(teaching, quiet)
    assert read_manifest(Path(registry.get(outcome.policy).path)).unjudged == []


def test_a_run_on_an_import_has_no_labels(teaching, store, registry, tokenizer):
    talk(store, tokenizer, teaching.learning.held_out, platform="import")
    with learn_in_an_instant(tokenizer):
        imported, everything = train_version(teaching, quiet, space="file"), train_version(teaching, quiet)
    assert imported.figures.labels == 0
    assert read_manifest(Path(registry.get(imported.policy).path)).head_rows == []
    assert everything.figures.labels == LABELS, "the control"


def test_the_same_feedback_gives_the_same_manifest_and_other_labels_another(teaching, store, registry, tokenizer):
    talk(store, tokenizer, teaching.learning.held_out)
    fewer = teaching.model_copy(update={"learning": teaching.learning.model_copy(update={"distil_prompts": 2})})
    with learn_in_an_instant(tokenizer):
        first, same, other = (train_version(config, quiet).manifest_sha256 for config in (teaching, teaching, fewer))
    assert first == same != other
