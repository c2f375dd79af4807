"""What people liked teaches retrieval: weights move towards what liked answers were reminded of, or stay as they are."""

import json
import random

import numpy as np
import pytest
from conftest import answered, react

from bot.config import PrivacyConfig, load
from bot.errors import ConfigError, DataError
from bot.memory.recall import load_retrieval_weights
from bot.memory.scope import Memory
from bot.store.users import Users
from bot.types import Conversation, Message
from learning.data.replay_buffer import ReplayBuffer
from learning.fitting.reminders import read_judged_examples
from learning.fitting.retrieval import PRIOR, Example, fit_and_validate, loss, move_weights

PLACES = 48
THINGS = ["train", "garden", "soup", "guitar", "river", "exam", "dog", "bread", "bike", "winter"]


def live(store, tokenizer, likes_questions) -> None:
    """In each place some things are said and some asked; an answer is reminded of the ones or the others, and judged."""
    rng = random.Random(0)
    for number in range(PLACES):
        place = store.open_conversation(Conversation("test", channel=str(number), id=f"place-{number:03}"))
        said = [
            Message(place.id, "bob", f"do you like my {thing}?" if row % 2 else f"i like my {thing} a lot")
            for row, thing in enumerate(rng.sample(THINGS, 6))
        ]
        for one in said:
            store.add_message(one)
        of_questions = rng.random() < 0.5
        shown = {one.id: 0.5 for one in said if one.text.endswith("?") == of_questions}
        turn = answered(store, tokenizer, "what about the weekend?", "Hey there!", place=place, shown=shown)
        react(store, turn, approves=of_questions == likes_questions(number))


def examples(store, tokenizer, database, embedder):
    rated = ReplayBuffer(store, tokenizer, load()).snapshot().rated
    return list(read_judged_examples(rated, store, Memory(database), embedder, lambda *_: None))


def test_what_liked_answers_were_reminded_of_counts_more_and_is_proven_on_others(store, database, tokenizer, embedder):
    live(store, tokenizer, likes_questions=lambda number: True)
    found = examples(store, tokenizer, database, embedder)
    assert len(found) == PLACES
    assert {one.reward for _, one in found} == {1.0, -1.0}
    learned, figures = fit_and_validate(found, load_retrieval_weights())
    assert learned["asks"] > load_retrieval_weights()["asks"] + 0.1
    assert figures["held_out_nats_after"] < figures["held_out_nats_before"]
    few = move_weights([one for _, one in found[:4]], load_retrieval_weights())  # little evidence moves little
    assert abs(few["asks"] - load_retrieval_weights()["asks"]) < abs(learned["asks"] - load_retrieval_weights()["asks"]) / 2


def test_what_does_no_better_on_others_and_what_is_too_little_moves_nothing(store, database, tokenizer, embedder):
    live(store, tokenizer, likes_questions=lambda number: number % 2 == 0)  # one half says the opposite of the other
    found = examples(store, tokenizer, database, embedder)
    with pytest.raises(DataError, match="are no better on held-out ones"):
        fit_and_validate(found, load_retrieval_weights())
    with pytest.raises(DataError, match="required 20 in 2"):
        fit_and_validate(found[:5], load_retrieval_weights())


def test_who_does_not_consent_teaches_nothing(store, database, tokenizer, embedder):
    live(store, tokenizer, likes_questions=lambda number: True)
    Users(database, PrivacyConfig()).record_consent("test", "bob", consent=False)
    assert examples(store, tokenizer, database, embedder) == []


def test_the_gradient_is_that_of_the_loss():
    rng = np.random.default_rng(0)
    rows = [Example(rng.normal(size=(9, len(PRIOR))), [1, 4], worth) for worth in (1.0, -0.7)]
    at = rng.normal(size=len(PRIOR))
    steps = np.eye(len(PRIOR)) * 1e-6
    slopes = [(loss(rows, at + step)[0] - loss(rows, at - step)[0]) / 2e-6 for step in steps]
    assert np.allclose(slopes, loss(rows, at)[1], atol=1e-6)


def test_weights_are_read_from_the_file_that_the_config_names(tmp_path):
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({"weights": load_retrieval_weights() | {"asks": 1.0}}))
    assert load_retrieval_weights(str(file)) == load_retrieval_weights() | {"asks": 1.0} != load_retrieval_weights()
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"dialogue\.retrieval_weights"):
        load_retrieval_weights(str(file))
