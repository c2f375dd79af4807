"""A candidate that waits for evidence: what judges it, when, and what becomes of it whatever happens meanwhile."""

import random
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import answered, react, succeeded

from bot.chat.texts import describe_status
from bot.config import Config
from bot.errors import RegistryError, TrainingError
from bot.records import Record
from bot.store.conversations import ConversationStore
from bot.store.forgetting import forget_person
from bot.store.registry import BASE, PolicyRegistry
from bot.store.weights import ADAPTER_FILES
from bot.types import Feedback, FeedbackKind, Metrics, PolicyState, PolicyVersion, Turn, now
from learning.bench import swap
from learning.data.replay_buffer import ReplayBuffer
from learning.data.selection import is_held_out, question_key
from learning.judging.error_budget import compute_next_level
from learning.judging.evaluation import batched_logprobs, means
from learning.judging.waiting import judge_waiting, read_earlier_verdicts
from learning.models import toy
from learning.models.trainable import load_served
from learning.rollout.loop import JUDGE_TRIES, OnlineLearner

APPROVAL = FeedbackKind.APPROVAL
MEASURED = {"kl": 0.1, "well_formed": 1.0, "base_well_formed": 1.0, "change": 1.0, "rounding": 0.0, "is_no_change": False}


def quiet(*told: object) -> None:
    pass


@dataclass
class Waiting:
    """A version of random weights that waits, and people who may come to like what it likes."""

    config: Config
    store: ConversationStore
    registry: PolicyRegistry
    tokenizer: object
    version: PolicyVersion

    @property
    def state(self) -> PolicyState:
        return self.registry.get(self.version.name).state

    @property
    def reason(self) -> str:
        return self.registry.get(self.version.name).metrics.reasons[0]

    @property
    def has_weights(self) -> bool:
        return any((Path(self.version.path) / name).exists() for name in ADAPTER_FILES)

    def say(self, count: int, name: str = "new") -> list[Turn]:
        """So many questions with their answers."""
        rng = random.Random(name)
        made = [toy.compose_answer(rng.choice(toy.INTENTS), rng.choice(toy.STYLES)) for _ in range(count)]
        asked = (f"{name} {number}" for number in range(count))
        return [answered(self.store, self.tokenizer, *both) for both in zip(asked, made, strict=True)]

    def like(self, turns: list[Turn], sign: int = 1, *, dislikes: bool = True) -> None:
        """People like the half of these answers that the version makes likelier than the base (or less likely), and dislike
        the rest, or say nothing of it.
        """
        rows = [(turn.prompt_ids, turn.completion_ids) for turn in turns]
        base = self.registry.get_base().base_model
        models = (
            load_served(self.config.policy, self.config.serving, base, weights) for weights in (None, self.version.path)
        )
        before, after = (means(batched_logprobs(model, rows)) for model in models)
        gained = [sign * (new - old) for old, new in zip(before, after, strict=True)]
        middle = sorted(gained)[len(gained) // 2]
        for turn, value in zip(turns, gained, strict=True):
            if dislikes or value >= middle:
                react(self.store, turn, approves=value >= middle)

    def judge(self):
        return judge_waiting(self.config, quiet)


@pytest.fixture
def waiting(config, store, registry, tokenizer, source) -> Waiting:
    changes = {"dialogue": config.dialogue.model_copy(update={"embedder": "none"})}
    changes |= {"gate": config.gate.model_copy(update={"samples": 8})}
    version = swap.register_copy(registry, source)
    drawn = Metrics(drawn_at=now(), waits_for=10, reasons=["too few"])
    metrics = version.metrics | drawn | Record(evidence=MEASURED)
    registry.begin_run(version.name, {}, "", [])
    version = registry.move(version.name, PolicyState.WAITING, metrics=metrics)
    return Waiting(config.model_copy(update=changes), store, registry, tokenizer, version)


def test_what_came_after_its_rows_were_drawn_promotes_a_better_one(waiting):
    waiting.registry.request_deployment(waiting.version.name)
    assert waiting.registry.find_requested() == [], "it is no candidate yet"
    waiting.like(waiting.say(24))
    judgement = waiting.judge()
    assert judgement.passed, judgement.reasons
    found = waiting.registry.get(waiting.version.name)
    assert (found.state, waiting.registry.find_requested()) == (PolicyState.CANDIDATE, [found])
    assert found.metrics.held_out_liked == found.metrics.held_out_disliked == 12
    assert found.judged_at > found.drawn_at
    assert waiting.registry.list_runs()[0]["outcome"] == "passed"
    assert read_earlier_verdicts(waiting.registry) == [True]
    with pytest.raises(RegistryError, match="no version is waiting"):
        waiting.judge()


def test_one_that_people_like_less_is_rejected_for_a_price(waiting):
    waiting.like(waiting.say(24), sign=-1)
    assert "not shown to be better" in waiting.judge().reasons[0]
    assert waiting.state == PolicyState.REJECTED
    assert not waiting.has_weights
    assert read_earlier_verdicts(waiting.registry) == [False]


def test_what_earlier_verdicts_spent_is_not_there_for_one_that_waited(waiting):
    level_of_first = compute_next_level(1 - waiting.config.gate.confidence, [])
    spent = waiting.registry.reserve(waiting.registry.get_live())
    verdict = Metrics(had_enough_evidence=True, is_better=False, judged_at=now())
    waiting.registry.complete(spent.name, "hash", verdict)
    waiting.registry.move(spent.name, PolicyState.REJECTED)
    waiting.like(waiting.say(24))
    waiting.judge()
    level = waiting.registry.get(waiting.version.name).metrics.level
    assert level == compute_next_level(1 - waiting.config.gate.confidence, [False]) < level_of_first


def test_looks_that_cannot_suffice_spend_nothing_and_end_with_the_limit(waiting):
    waiting.like(waiting.say(8))
    judgement = waiting.judge()
    assert judgement.waits
    assert "too little evidence: 4 liked and 4 disliked" in judgement.reasons[0]
    found = waiting.registry.get(waiting.version.name)
    assert 8 < found.awaited_reactions <= waiting.config.learning.wait_reactions
    assert waiting.has_weights
    text = describe_status(waiting.store, waiting.registry, waiting.config.data)
    assert f"{found.name} waits for about {found.awaited_reactions - 8} more reactions before it is judged" in text
    waiting.like(waiting.say(32, "liked by all"), dislikes=False)
    for turn in waiting.say(2, "not judged"):
        react(waiting.store, turn, approves=True, user="who never wrote there")
    assert waiting.judge().passed, "at the limit what could suffice must do"


def test_at_the_limit_too_little_is_rejected_and_spends_nothing(waiting):
    for turn in waiting.say(24):
        react(waiting.store, turn, approves=True)
    judgement = waiting.judge()
    assert not judgement.waits
    assert judgement.reasons[0].endswith("it has waited for 24 reactions (learning.wait_reactions)")
    assert waiting.state == PolicyState.REJECTED
    assert not waiting.has_weights
    assert read_earlier_verdicts(waiting.registry) == []


def test_nothing_judges_it_that_it_or_its_parent_learned_from(waiting):
    drawn_at, buffer = waiting.version.drawn_at, ReplayBuffer(waiting.store, waiting.tokenizer, waiting.config)
    share = waiting.config.learning.held_out

    def ask(name: str) -> Turn:
        texts = (f"{name} {number}" for number in range(99))
        text = next(text for text in texts if is_held_out(question_key(text), share) == (name == "held out"))
        return answered(waiting.store, waiting.tokenizer, text, "Hey there!")

    learned, changed, kept, thinned, new = map(ask, ("learned", "changed", "held out", "thinned", "new"))
    before = drawn_at - timedelta(seconds=5)
    given = [Feedback(turn.id, "asker", APPROVAL, "test", at=before) for turn in (learned, changed, kept, thinned)]
    for one in given:
        waiting.store.add_feedback(one)
    waiting.registry.begin_run(BASE, {}, "", [one.id for one in given[:2]])
    waiting.store.add_feedback(Feedback(changed.id, "asker", APPROVAL, "test", retracts=True))
    react(waiting.store, new, approves=True)
    for turn in (learned, changed, thinned, new, kept):
        question = waiting.store.read_message(turn.message_id).text
        again = answered(waiting.store, waiting.tokenizer, f"{question.upper()}!", "No.")  # the same words
        react(waiting.store, again, approves=False)
    judged = [
        waiting.store.read_message(one.question_id).text.lower().rstrip("!") for one in buffer.find_unseen("", drawn_at)
    ]
    assert sorted(judged) == sorted(2 * [waiting.store.read_message(turn.message_id).text for turn in (new, kept)])
    assert next(one.turn_id for one in buffer.find_unseen(new.id, drawn_at)) == new.id, (
        "not what was said before a change of taste"
    )


@pytest.mark.parametrize("case", ["another version is live", "its weights were changed", "its files are gone"])
def test_what_cannot_be_judged_any_more_says_why(waiting, case):
    waiting.like(waiting.say(24))
    path = Path(waiting.version.path)
    match case:
        case "another version is live":
            other = waiting.registry.reserve(waiting.registry.get_live())
            waiting.registry.complete(other.name, "hash", Metrics())
            waiting.registry.promote(other.name)
            reason = f"{waiting.version.name} was judged against {BASE}, but {other.name} is live now"
        case "its weights were changed":
            swap.save_random_version(waiting.config, waiting.registry.get_base().base_model, path.with_name("other"), 7)
            (path.with_name("other") / "adapter_model.safetensors").rename(path / "adapter_model.safetensors")
            reason = "its weights are not those that were registered"
        case _:
            (path / "manifest.json").unlink()
            reason = "its files are gone"
    judgement = waiting.judge()
    assert not judgement.passed
    assert not judgement.waits
    assert reason in waiting.reason
    assert waiting.state == PolicyState.REJECTED
    assert read_earlier_verdicts(waiting.registry) == []


def test_one_that_learned_from_somebody_who_is_forgotten_is_purged_as_any_other(waiting, database):
    turn = answered(waiting.store, waiting.tokenizer, "hello", "Hey!", author="ann")
    given = react(waiting.store, turn, approves=True, user="ann")
    waiting.registry.begin_run(waiting.version.name, {}, "", [given.id])
    forget_person(database, waiting.registry, "test", "bob")
    assert waiting.state == PolicyState.WAITING, "the control"
    forget_person(database, waiting.registry, "test", "ann")
    assert waiting.state == PolicyState.PURGED
    assert not Path(waiting.version.path).exists()
    assert waiting.registry.find_waiting() == []


def test_another_base_model_ends_its_waiting(waiting):
    waiting.registry.set_base("/models/another")
    assert waiting.state == PolicyState.REJECTED
    assert not waiting.has_weights, "what never serves need not be kept"


def test_kibitz_deploy_asks_for_it_in_advance(waiting, here):
    waiting.config.save(waiting.config.data / "config.json")
    succeeded(here("deploy", waiting.version.name, "--config", waiting.config.data / "config.json"))
    waiting.like(waiting.say(24))
    waiting.judge()
    assert [version.name for version in waiting.registry.find_requested()] == [waiting.version.name]


async def test_a_running_kibitz_judges_it_and_takes_it_live(waiting, stage):
    """With a real training process; the loop begins as it does after a restart."""
    told: list[str] = []
    learner = OnlineLearner(waiting.store, stage.deployment, waiting.config, told.append)
    waiting.registry.request_deployment(waiting.version.name)
    turns = waiting.say(24)
    assert await learner.judge_waiting(), "it holds the next run back"
    assert told == [], "too few came to look at all"
    waiting.like(turns)
    waiting.registry.toggle_learning()
    await learner._learn_if_enough()
    assert told == []
    waiting.registry.toggle_learning()
    await learner._learn_if_enough()
    name = waiting.version.name
    assert told == [f"judging {name} again with the reactions that it waited for", f"{name} waited and passed"]
    assert waiting.state == PolicyState.LIVE, stage.told
    assert not await learner.judge_waiting()


async def test_one_that_cannot_be_judged_holds_no_run_back_for_ever(waiting, stage, monkeypatch):
    async def fails(*_):
        raise TrainingError("out of memory")

    monkeypatch.setattr("learning.rollout.loop.train_in_child", fails)
    told: list[str] = []
    learner = OnlineLearner(waiting.store, stage.deployment, waiting.config, told.append)
    turns = waiting.say(9 + JUDGE_TRIES)
    for turn in turns[:9]:
        react(waiting.store, turn, approves=True)
    for number, turn in enumerate(turns[9:], 1):
        react(waiting.store, turn, approves=True)
        for _ in range(2):  # the second look waits for another reaction
            assert await learner.judge_waiting() == (waiting.state == PolicyState.WAITING or number == JUDGE_TRIES)
            if number == JUDGE_TRIES:
                break
        assert sum("cannot be judged (the chat is not affected): out of memory" in text for text in told) == number
    assert waiting.state == PolicyState.REJECTED
    assert waiting.reason == "it cannot be judged: out of memory"
    assert not await learner.judge_waiting()
