"""A head that is fitted to judged answers: what it needs, whom it names, and what it says of an answer."""

import random
from dataclasses import replace

import numpy as np
import pytest

from bot.types import Reason
from learning.data.experience import Experience
from learning.data.feature_space import AnswerText, FeatureExtractor
from learning.judging.best_of_n import FEW_E_VALUE, LEAST_OF_A_KIND, LEAST_REACTIONS, MANY_E_VALUE
from learning.judging.taught_head import TaughtHead, describe_answer, find_peak_e_value, fit_head
from learning.models import toy

CAP = 0.25


def judge(count: int, seed: int = 0, people: int = 5, *, is_by_lot: bool = False) -> list[Experience]:
    """Return answers that people judged: they like those with an emoji, or by lot."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        style = rng.choice(toy.STYLES)
        answer = toy.compose_answer(rng.choice(toy.INTENTS), style)
        likes = rng.random() < 0.5 if is_by_lot else style.emoji
        one = Experience(f"turn {number:04}", "", (), (), None, 1.0 if likes else -1.0, (f"feedback {number}",))
        found.append(replace(one, answer=answer, opinion_holders=(f"person {number % people}",), mean_logprob=-0.5))
    return found


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor(None)


def test_a_head_says_which_feature_moved_an_answer(extractor):
    head = fit_head(judge(30), (), extractor, CAP)
    assert head.head.e_value > MANY_E_VALUE
    assert head.teachers == tuple(f"person {number}" for number in range(5))
    raw = extractor.extract([AnswerText("Hey there! 👋"), AnswerText("Hey there!")])
    mean, _ = head.predict(raw)
    assert mean[0] > mean[1]
    assert next(iter(head.explain(raw, 0))) == "emoji"
    assert head.explain(raw, 0)["emoji"] > 0 > head.explain(raw, 1)["emoji"]
    assert len(head.explain(raw, 0, most=1)) == 1
    assert head.explain(raw[:1], 0) == {}, "beside itself alone an answer is as usual"


def divide(rated: list[Experience], contrary: tuple[str, ...]) -> list[Experience]:
    """Have some people like what the others dislike."""
    return [replace(one, reward=-one.reward) if {*one.opinion_holders} & {*contrary} else one for one in rated]


def test_people_of_opposite_tastes_each_have_a_head_of_their_own(extractor):
    rated = divide(judge(60, people=2), ("person 1",))
    head = fit_head(rated, (), extractor, CAP)
    assert head.peak_e_value < FEW_E_VALUE, "together they want nothing"
    assert set(head.own) == {"person 0", "person 1"}
    assert min(map(head.find_e_value, head.own)) > MANY_E_VALUE
    assert head.find_e_value() == head.find_e_value("somebody else") == head.peak_e_value
    raw = extractor.extract([AnswerText("Hey there! 👋"), AnswerText("Hey there!")])
    likes, contrary = (head.score(raw, person=one) for one in ("person 0", "person 1"))
    assert likes[0] > likes[1]
    assert contrary[0] < contrary[1]
    assert head.explain(raw, 0, "person 0")["emoji"] > 0 > head.explain(raw, 0, "person 1")["emoji"]
    assert head.compute_doubts(raw[:1], raw[1:], 0, "person 0")[0] < head.compute_doubts(raw[:1], raw[1:], 0)[0]
    assert head.predict(raw, "somebody else")[0] == pytest.approx(head.predict(raw)[0])


def test_one_of_another_taste_than_the_rest_has_a_head_of_their_own(extractor):
    head = fit_head(divide(judge(100), ("person 3",)), (), extractor, CAP)
    assert set(head.own) == {"person 3"}, "the others' taste is the shared one"
    raw = extractor.extract([AnswerText("Hey there! 👋"), AnswerText("Hey there!")])
    shared, own = head.score(raw), head.score(raw, person="person 3")
    assert shared[0] > shared[1]
    assert own[0] < own[1]


def test_who_likes_what_all_like_or_reacts_by_lot_has_no_head_of_their_own(extractor):
    assert fit_head(judge(100), (), extractor, CAP).own == {}
    found = [fit_head(judge(100, seed, is_by_lot=True), (), extractor, CAP) for seed in range(12)]
    assert sum(len(one.own) for one in found) <= 0.1 * 12 * 5
    few = divide(judge(5 * (LEAST_REACTIONS - 1)), ("person 3",))
    assert fit_head(few, (), extractor, CAP).own == {}
    assert fit_head(judge(30, people=1), (), extractor, CAP).own == {}, "the shared head is theirs"


def test_a_head_has_the_name_of_its_content(extractor):
    first, same, other = (fit_head(judge(30, seed), (), extractor, CAP) for seed in (0, 0, 1))
    assert first.name == same.name != other.name
    assert first.name.startswith("head-")
    assert replace(first, teachers=("somebody else",)).name != first.name


def test_of_two_answers_that_are_as_good_the_surer_one_scores_higher(extractor):
    head = fit_head(judge(30), (), extractor, CAP)
    raw = extractor.extract([AnswerText("Hey there! 👋"), AnswerText("Hey there! " * 40 + "👋")])
    mean, sd = head.predict(raw)
    assert sd[0] < sd[1], "nobody judged an answer as long as that"
    assert head.score(raw, pessimism=0.0) == pytest.approx(mean)
    lost = mean - head.score(raw)
    assert 0 < lost[0] < lost[1]


@pytest.mark.parametrize(
    "said",
    [
        judge(LEAST_REACTIONS - 1),
        [replace(one, reward=1.0) for one in judge(40)],
        [replace(one, reward=-1.0) for one in judge(40)],
        [replace(one, reward=1.0 if number < LEAST_OF_A_KIND - 1 else -1.0) for number, one in enumerate(judge(40))],
        [replace(one, is_correction=True) for one in judge(40)],
        [],
    ],
    ids=["too few", "all liked", "none liked", "hardly one liked", "corrections", "nothing"],
)
def test_without_enough_reactions_of_both_kinds_there_is_no_head(extractor, said):
    assert fit_head(said, (), extractor, CAP) is None
    assert find_peak_e_value(said, extractor, CAP) == 0.0
    assert fit_head(judge(LEAST_REACTIONS), (), extractor, CAP) is not None, "the control"


def test_answers_that_are_all_alike_prove_nothing(extractor):
    said = [replace(one, answer="Hey!") for one in judge(40)]
    assert fit_head(said, (), extractor, CAP).head.e_value < FEW_E_VALUE
    assert find_peak_e_value(said, extractor, CAP) < FEW_E_VALUE


def test_a_person_who_says_more_than_their_share_proves_less_than_many_people(extractor):
    said = judge(60)
    loud = [
        replace(one, opinion_holders=("loud",) if number < 50 else one.opinion_holders) for number, one in enumerate(said)
    ]
    many, one = (find_peak_e_value(given, extractor, CAP) for given in (said, loud))
    assert one < many
    assert find_peak_e_value(loud, extractor, cap=1.0) == pytest.approx(find_peak_e_value(said, extractor, cap=1.0))


def test_what_was_proven_stays_proven_though_answers_became_alike(extractor):
    said = judge(40)
    alike = [
        replace(one, answer="Hey there! 👋", reward=1.0 if number % 5 else -1.0) for number, one in enumerate(judge(80))
    ]
    peak = find_peak_e_value(said, extractor, CAP)
    assert peak >= MANY_E_VALUE
    assert find_peak_e_value([*said, *alike], extractor, CAP) >= MANY_E_VALUE
    assert find_peak_e_value(judge(40, is_by_lot=True), extractor, CAP) < MANY_E_VALUE, "the control"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_log_probabilities_that_are_not_finite_spoil_no_head(extractor, value):
    said = [replace(one, mean_logprob=value if number % 3 else -0.5) for number, one in enumerate(judge(30))]
    head = fit_head(said, [AnswerText("Hey!", True, value)], extractor, CAP)
    assert head.head.e_value > MANY_E_VALUE
    assert all(np.isfinite(one).all() for one in head.predict(extractor.extract([describe_answer(one) for one in said])))


def test_a_head_with_another_embedding_predicts_nothing_and_says_so(extractor, embedder):
    head = fit_head(judge(30), (), FeatureExtractor(embedder), CAP)
    with pytest.raises(ValueError, match="broadcast"):
        head.predict(extractor.extract([AnswerText("Hey!")]))


def test_a_head_reads_the_newest_answers_alone(extractor, monkeypatch):
    monkeypatch.setattr("learning.judging.taught_head.NEWEST", 30)
    old = [replace(one, opinion_holders=("long ago",), reward=-one.reward) for one in judge(60, seed=3)]
    found = fit_head([*old, *judge(30)], (), extractor, CAP)
    assert found.name == fit_head(judge(30), (), extractor, CAP).name
    assert "long ago" not in found.teachers
    assert isinstance(found, TaughtHead)


def test_a_reason_moves_what_it_names_at_once_and_proves_nothing(extractor):
    rng = random.Random(0)
    said = [replace(one, reward=rng.choice([1.0, -1.0])) for one in judge(24)]
    reasoned = [replace(one, reasons=frozenset({Reason.TOO_LONG, Reason.TONE})) for one in said]
    without, with_reasons = (fit_head(given, (), extractor, CAP) for given in (said, reasoned))
    assert with_reasons.head.e_value == without.head.e_value
    raw = extractor.extract([AnswerText("Hello."), AnswerText("Hello. " + "And then there is more to say. " * 6)])
    short_is_better = [head.predict(raw)[0] @ [1, -1] for head in (without, with_reasons)]
    assert short_is_better[1] > short_is_better[0] + 0.5
    toned = [replace(one, reasons=frozenset({Reason.TONE})) for one in said]
    assert fit_head(toned, (), extractor, CAP).as_json() == without.as_json(), "the control: it names no feature"
