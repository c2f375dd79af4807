"""What an answer is like, and what answers like it earned."""

import numpy as np
import pytest

from learning.data.features import NAMED_FEATURES, extract_features, predict_rewards, ridge_influence

WORDS = ("tea", "bread", "rain", "a walk", "the garden", "an old song")


def answers(rng: np.random.Generator, count: int) -> list[str]:
    """Answers of some length, of which half ask back."""
    return [
        " ".join(rng.choice(WORDS, int(rng.integers(2, 12)))) + ("?" if rng.random() < 0.5 else ".") for _ in range(count)
    ]


def named(text: str) -> dict[str, float]:
    return dict(zip(NAMED_FEATURES, extract_features([text])[0], strict=True))


@pytest.mark.parametrize(
    ("text", "wanted", "other"),
    [
        ("And you?", {"asks back", "question", "you"}, {"exclamation", "list", "emoji"}),
        ("Is it so? I think it might be.", {"question", "hedging", "I"}, {"asks back", "you"}),
        ("1. flour\n2. milk", {"list", "number"}, {"question", "code"}),
        ("Great! 🎉", {"exclamation", "emoji"}, {"asks back", "I"}),
        ("use `pip` and **wait**", {"code", "emphasis", "small letters"}, {"emoji", "list"}),
        ("We're glad, thank you", {"we", "contractions", "thanks or regrets", "you"}, {"I", "number"}),
        ("", set(), {"question", "you", "small letters"}),
    ],
)
def test_features_say_what_people_would_say_of_an_answer(text, wanted, other):
    found = named(text)
    assert {name for name in wanted if found[name]} == wanted
    assert not {name for name in other if found[name]}


def test_longer_answers_are_longer_and_meaning_is_there_if_it_is_asked_for(embedder):
    assert named("one two three")["length"] < named("one two three four")["length"]
    assert extract_features(["a", "b"]).shape == (2, len(NAMED_FEATURES))
    assert extract_features(["a", "b"], embedder).shape == (2, len(NAMED_FEATURES) + embedder.encode(["a"]).shape[1])
    assert extract_features([]).shape == (0, len(NAMED_FEATURES))


def test_what_answers_like_it_earned_tells_more_of_an_answer_than_its_own_reaction():
    rng = np.random.default_rng(0)
    said = answers(rng, 200)
    taste = np.array([1.0 if text.endswith("?") else -1.0 for text in said])
    rewards = np.where(rng.random(200) < 0.3, -taste, taste)
    seen, alike = extract_features(said), np.ones(200)
    assert np.corrcoef(predict_rewards(rewards, seen, alike), taste)[0, 1] > 0.9 > 0.6 > np.corrcoef(rewards, taste)[0, 1]
    random = predict_rewards(rng.permutation(rewards), seen, alike)
    assert np.abs(random).mean() < np.abs(predict_rewards(rewards, seen, alike)).mean() / 2, (
        "the control: little is made of noise"
    )


def test_those_who_count_little_change_little_of_what_others_answers_are_worth():
    rng = np.random.default_rng(0)
    said = answers(rng, 120)
    taste = np.array([1.0 if text.endswith("?") else -1.0 for text in said])
    raided = np.concatenate([taste[:40], -taste[40:]])
    weights = np.concatenate([np.ones(40), np.full(80, 0.02)])
    assert np.corrcoef(predict_rewards(raided, extract_features(said), weights), taste)[0, 1] > 0.9
    assert np.corrcoef(predict_rewards(raided, extract_features(said), np.ones(120)), taste)[0, 1] < 0, "the control"
    assert not predict_rewards(raided, extract_features(said), np.zeros(120)).any()


def test_it_is_linear_in_the_rewards():
    rng = np.random.default_rng(0)
    seen = extract_features(answers(rng, 30))
    one, other = rng.normal(size=30), rng.normal(size=30)
    worth = [seen @ ridge_influence(seen).T @ rewards for rewards in (one, other, one + 2 * other)]
    assert worth[0] + 2 * worth[1] == pytest.approx(worth[2])
