"""The built-in model on a vLLM of its own, in bfloat16: what holds for a real model and not only for the toy.

One server serves every test here; it takes minutes, and so is run by `make test-slow`.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from bot import app as kibitz
from bot.chat.dialogue import ReplyOptions
from bot.config import load
from bot.errors import ProbeFailed
from bot.types import Conversation, Message, PolicyState, new_id
from learning.bench import swap
from learning.judging.evaluation import answer_logprobs
from learning.judging.probe import mean_distance
from learning.models.trainable import load_served
from learning.training.choice import prepare_model

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vLLM")]  # two servers would wait for each other

EVERYDAY = [
    *("hello, how are you?", "what should i cook tonight?", "how do i make tea?", "i am tired today.", "tell me a joke."),
    *(
        "what is a good name for a cat?",
        "how do i clean a window?",
        "my friend is sad.",
        "do you like music?",
        "good night!",
    ),
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def real(builtin_model, tmp_path_factory) -> AsyncIterator[kibitz.Kibitz]:
    config, model = prepare_model(load(data_dir=str(tmp_path_factory.mktemp("real"))), lambda text: None)
    assert model == builtin_model
    async with kibitz.running(config, model, lambda text: None) as running:
        yield running


async def say(real: kibitz.Kibitz, text: str, seed: int = 1):
    place = await real.dialogue.open(Conversation("test", new_id()))
    return await real.dialogue.respond(Message(place.id, "ann", text), ReplyOptions(seed=seed))


async def version_of(real: kibitz.Kibitz, source: Path, seed: int) -> str:
    base = real.registry.get_base().base_model
    await asyncio.to_thread(swap.save_random_version, real.config, base, source, seed)
    return swap.register_copy(real.registry, source).name


async def test_everyday_questions_get_answers_that_end_by_themselves(real):
    turns = [await say(real, text) for text in EVERYDAY]
    assert all(len(turn.text.split()) >= 3 for turn in turns), [turn.text for turn in turns]
    assert sum(turn.finish_reason == "stop" for turn in turns) >= 8
    assert not any("SmolLM" in turn.text for turn in turns)


async def test_log_probabilities_are_those_of_the_trainer_at_the_policys_temperature(real):
    assert real.config.policy.temperature != 1.0
    turn = await say(real, "tell me about your day")
    base = real.registry.get_base().base_model
    policy, serving = real.config.policy, real.config.serving
    model = await asyncio.to_thread(load_served, policy, serving, base)
    (own,) = answer_logprobs(model, [(turn.prompt_ids, turn.completion_ids)])
    plain = await asyncio.to_thread(load_served, policy.model_copy(update={"temperature": 1.0}), serving, base)
    (other,) = answer_logprobs(plain, [(turn.prompt_ids, turn.completion_ids)])
    assert mean_distance(own.tolist(), turn.logprobs) < 0.2
    assert mean_distance(other.tolist(), turn.logprobs) > 2 * mean_distance(own.tolist(), turn.logprobs), "the control"


async def test_a_version_is_proven_in_bfloat16_and_a_swapped_one_is_caught(real, tmp_path):
    names = [await version_of(real, tmp_path / "0", 0)]
    await real.deployment.deploy(names[0])
    names.append(await version_of(real, tmp_path / "1", 1))
    assert (await say(real, "hello")).policy_version == names[0]
    figures = real.registry.get(names[0]).metrics
    assert figures.probe_distance <= figures.probe_from_parent / 2
    await real.policy.admin.load_adapter(names[1], real.registry.get(names[0]).path)  # the other's weights under its name
    with pytest.raises(ProbeFailed, match="failed its probe"):
        await real.deployment.deploy(names[1])
    assert real.registry.get(names[1]).state == PolicyState.REJECTED
    assert (await say(real, "hello")).policy_version == names[0]


async def test_swaps_under_load_mix_nothing_and_rounding_is_not_taken_for_a_mix(real, tmp_path, monkeypatch):
    monkeypatch.setattr(swap, "PROMPTS", 2)  # each is asked one at a time of each version, for what it says alone
    monkeypatch.setattr(swap, "LENGTH", 16)
    sources = [tmp_path / "one", tmp_path / "two"]
    for seed, source in enumerate(sources):
        await asyncio.to_thread(swap.save_random_version, real.config, real.registry.get_base().base_model, source, seed)
    tokenizer = real.dialogue.tracker.tokenizer
    figures = await swap.measure_swaps(real.deployment, tokenizer, sources, 2, 4, 4, lambda *_: None)
    assert (figures["swaps"], figures["failed"], figures["mixed"]) == (2, 0, 0)
    assert 0 < figures["rounding_nats"] < figures["versions_apart_nats"] / 2
