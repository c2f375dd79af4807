"""The whole path of few reactions: people react, the next answers are chosen, and the taste outlives a restart.

All of kibitz but vLLM is the real code.
"""

import contextlib
import random
import shutil
from collections.abc import AsyncIterator

import pytest
from conftest import succeeded, until
from fake_vllm import FakeVllm

from bot import app
from bot.config import Config, load
from bot.types import Conversation, Feedback, FeedbackKind, Message, Turn, new_id
from learning.bench import simulated_people
from learning.judging.best_of_n import MANY
from learning.models import toy
from learning.rollout.heads import locate_heads

PEOPLE = ("ann", "bob", "cleo", "dora")
PLACE = Conversation("discord", "general", space="guild")
OFFERED = ["Good evening.", "Hey there! 👋", "Hello to you.", "How are you?"]


@pytest.fixture
def settings(tmp_path, demo_model):
    """The file of a config without an embedder, whose data directory is in `tmp_path`."""
    file = tmp_path / "config.toml"
    file.write_text(f'data_dir = "{tmp_path / "data"}"\n[policy]\nmodel = "{demo_model}"\n[dialogue]\nembedder = "none"\n')
    return file


@contextlib.asynccontextmanager
async def talking(config: Config, vllm: FakeVllm) -> AsyncIterator[app.Kibitz]:
    config = config.model_copy(update={"serving": config.serving.model_copy(update={"url": await vllm.start()})})
    async with app.running(config, config.policy.model, lambda text: None) as kibitz:
        yield kibitz
    await vllm.stop()


async def ask(kibitz: app.Kibitz, person: str, text: str) -> Turn:
    return await kibitz.dialogue.respond(Message("", person, text, event_id=new_id()), place=PLACE)


def likes_emoji(turn: Turn) -> bool:
    return simulated_people.emoji("", turn.text) > 0


async def react_to_answers(kibitz: app.Kibitz, vllm: FakeVllm, count: int, *, is_by_lot: bool) -> None:
    """People like answers with an emoji, or react by lot."""
    rng = random.Random(0)
    for number in range(count):
        person, style = PEOPLE[number % len(PEOPLE)], rng.choice(toy.STYLES)
        vllm.says = toy.compose_answer(rng.choice(toy.INTENTS), style)
        turn = await ask(kibitz, person, f"question {number}")
        likes = rng.random() < 0.5 if is_by_lot else likes_emoji(turn)
        kind = FeedbackKind.APPROVAL if likes else FeedbackKind.DISAPPROVAL
        await kibitz.dialogue.record_feedback(Feedback(turn.id, person, kind, signal="👍", event_id=new_id()))


async def ask_for_a_choice(kibitz: app.Kibitz, vllm: FakeVllm) -> list[Turn]:
    """Return ten answers, each to a question for which people are offered OFFERED."""
    vllm.says = OFFERED
    return [await ask(kibitz, PEOPLE[number % len(PEOPLE)], f"and {number}?") for number in range(10)]


async def test_a_taste_is_served_after_a_few_reactions_and_again_after_a_restart(settings, tokenizer, here):
    config, vllm = load(settings), FakeVllm(tokenizer)
    async with talking(config, vllm) as kibitz:
        assert not any(turn.is_selected for turn in await ask_for_a_choice(kibitz, vllm))
        await react_to_answers(kibitz, vllm, 24, is_by_lot=False)
        await until(lambda: kibitz.selector.plan("ann", MANY).count > 1)
        turns = await ask_for_a_choice(kibitz, vllm)
        assert kibitz.health.failures == {}
    chosen = [turn for turn in turns if turn.is_selected]
    assert len(chosen) >= 4, "one in ten stays plain"
    assert sum(map(likes_emoji, chosen)) >= len(chosen) - 1
    assert {len(turn.selection.candidates) for turn in chosen} <= {4, 8}
    assert not any(likes_emoji(turn) for turn in turns if not turn.is_selected), "the control"

    turn = next(turn for turn in chosen if likes_emoji(turn))
    told = here("why", turn.id, "--config", settings)
    succeeded(told)
    assert f"chosen from {len(turn.selection.candidates)} answers by {turn.selection.head}, with chance " in told.stdout
    assert "against the mean of these answers (log odds): emoji +" in told.stdout.replace("\n", " ")
    listed = here("policies", "--config", settings)
    succeeded(listed)
    assert turn.selection.head in listed.stdout
    assert "4 people" in listed.stdout

    shutil.rmtree(locate_heads(config.data))
    async with talking(config, vllm) as kibitz:  # from the database alone
        await until(lambda: kibitz.selector.plan("ann", MANY).count > 1)
        assert any(likes_emoji(turn) for turn in await ask_for_a_choice(kibitz, vllm))


async def test_reactions_by_lot_change_no_answer_and_kibitz_says_why(settings, tokenizer, here):
    vllm = FakeVllm(tokenizer)
    async with talking(load(settings), vllm) as kibitz:
        await react_to_answers(kibitz, vllm, 24, is_by_lot=True)
        await until(lambda: "not sure" in kibitz.selector.plan("ann", MANY).why)
        turns = await ask_for_a_choice(kibitz, vllm)
    assert not any(turn.is_selected for turn in turns)
    assert {turn.text for turn in turns} == {OFFERED[0]}
    told = here("why", turns[-1].id, "--config", settings)
    assert "not chosen from several answers: the reward head is not sure (e-value " in told.stdout.replace("\n", " ")
    assert "reward head" not in here("policies", "--config", settings).stdout
    (locate_heads(load(settings).data)).mkdir()
    (locate_heads(load(settings).data) / "head-123.json").write_text("{}")
    damaged = here("policies", "--config", settings)
    succeeded(damaged)
    assert "is no reward head (KeyError); delete it" in " ".join(damaged.stdout.split()), (
        "it is listed, and the versions too"
    )
    assert "policy-0" in damaged.stdout
