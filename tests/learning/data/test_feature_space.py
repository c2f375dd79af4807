"""Answers as places: standardised, bounded, and finite for any text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learning.data import feature_space
from learning.data.feature_space import COMPONENTS, LEAST_ANSWERS, LIMIT, NAMED, AnswerText, FeatureExtractor, FeatureSpace
from learning.models import toy

TEXTS = [toy.compose_answer(intent, style) for intent in toy.INTENTS[:6] for style in toy.STYLES]
ANSWERS = [AnswerText(text, number % 5 > 0, -0.5 - number % 7 / 10) for number, text in enumerate(TEXTS)]
LOGPROB, ENDED = NAMED.index("log-probability"), NAMED.index("ended")


@pytest.fixture(scope="module")
def raw() -> np.ndarray:
    return FeatureExtractor(None).extract(ANSWERS)


@pytest.fixture(scope="module")
def embedded(embedder) -> np.ndarray:
    return FeatureExtractor(embedder).extract(ANSWERS)


def test_the_usual_answers_have_mean_zero_and_standard_deviation_one_unless_a_feature_hardly_varies(embedded):
    space = FeatureSpace.fit(embedded)
    places = space.place(embedded)
    assert places.shape == (len(TEXTS), len(NAMED) + COMPONENTS)
    assert space.group_sizes == (len(NAMED), COMPONENTS)
    assert space.names[:3] == NAMED[:3]
    assert space.names[-1] == f"topic {COMPONENTS}"
    within = (np.abs(places) < LIMIT).all(0) & (space.sd > feature_space.SMALLEST_SD)
    assert within.sum() > len(NAMED) // 2
    assert places[:, within].mean(0) == pytest.approx(0, abs=1e-9)
    assert places[:, within].std(0) == pytest.approx(1)
    assert (places[:, space.sd == 0] == 0).all()


def test_a_place_is_cut_at_the_limit_and_near_ones_are_not(raw):
    space = FeatureSpace.fit(raw)
    extractor = FeatureExtractor(None)
    long, usual = space.place(extractor.extract([AnswerText("word " * 5000), AnswerText(TEXTS[0])]))
    assert long[NAMED.index("length")] == LIMIT
    assert abs(usual[NAMED.index("length")]) < LIMIT
    surprising, likely = space.place(extractor.extract([AnswerText("Hi", True, -900.0), AnswerText("Hi", True, 900.0)]))
    assert (surprising[LOGPROB], likely[LOGPROB]) == (-LIMIT, LIMIT)


def test_an_unknown_log_probability_counts_as_the_usual_one(raw):
    space = FeatureSpace.fit(raw)
    unknown, known = space.place(FeatureExtractor(None).extract([AnswerText("Hi"), AnswerText("Hi", True, -0.5)]))
    assert unknown[LOGPROB] == 0 != known[LOGPROB]
    without = raw.copy()
    without[:, LOGPROB] = np.nan
    assert (FeatureSpace.fit(without).place(without)[:, LOGPROB] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, LOGPROB, len(NAMED), -1])
def test_values_that_are_not_finite_have_finite_places_also_in_the_fit(embedded, value, column):
    broken = embedded.copy()
    broken[3, column] = value
    found = FeatureSpace.fit(broken).place(np.vstack([broken, embedded]))
    assert np.isfinite(found).all()
    if 0 <= column < len(NAMED):
        assert found[3, column] == 0
    assert len(np.unique(found[:, 0])) > 5, "the others are told apart"


USUAL = FeatureSpace.fit(FeatureExtractor(None).extract(ANSWERS))


@settings(max_examples=60)
@given(st.text(max_size=300), st.booleans(), st.none() | st.floats())
def test_any_text_has_a_finite_place(text, is_finished, logprob):
    place = USUAL.place(FeatureExtractor(None).extract([AnswerText(text, is_finished, logprob)]))
    assert np.isfinite(place).all()
    assert (np.abs(place) <= LIMIT).all()


def test_the_same_text_has_the_same_place_whatever_stands_beside_it(embedder, embedded):
    space = FeatureSpace.fit(embedded)
    alone = space.place(FeatureExtractor(embedder).extract(ANSWERS[5:6]))[0]
    among = space.place(FeatureExtractor(embedder).extract(ANSWERS[:9]))
    assert among[5] == pytest.approx(alone, abs=0.5), "the eight-bit embedder rounds by batch"
    assert among[6] != pytest.approx(alone, abs=0.5), "the control"
    again = FeatureExtractor(embedder)
    assert (again.extract(ANSWERS[:9]) == again.extract(ANSWERS[:9])).all()


def test_few_answers_have_no_components(embedded):
    assert FeatureSpace.fit(embedded[: LEAST_ANSWERS - 1]).group_sizes == (len(NAMED), 0)
    assert FeatureSpace.fit(embedded[:LEAST_ANSWERS]).group_sizes == (len(NAMED), COMPONENTS)


@pytest.mark.parametrize("count", [8, 60], ids=["without components", "with components"])
@pytest.mark.parametrize("has_embedder", [True, False])
def test_a_space_that_is_written_and_read_places_the_same(raw, embedded, count, has_embedder):
    answers = embedded if has_embedder else raw
    space = FeatureSpace.fit(answers[:count])
    again = FeatureSpace.from_json(json.loads(json.dumps(space.as_json())))
    assert again.place(answers) == pytest.approx(space.place(answers), abs=1e-9)
    assert (again.names, again.group_sizes) == (space.names, space.group_sizes)


def test_an_extractor_computes_each_text_once_remembers_the_latest_and_forgets_them(monkeypatch):
    computed: list[str] = []

    def extract(texts, embedder):
        computed.extend(texts)
        return np.zeros((len(texts), len(NAMED) - 2))

    monkeypatch.setattr(feature_space, "extract_features", extract)
    extractor = FeatureExtractor(None, size=2)
    hello, hi, hey = (AnswerText(text) for text in ("hello", "hi", "hey"))
    assert len(extractor.extract([hello, hello, hi])) == 3
    extractor.extract([hi, hello])
    assert computed == ["hello", "hi"]
    assert len(extractor.extract([hello, hi, hey])) == 3, "also of more texts than it remembers"
    extractor.extract([hi, hey])
    assert computed == ["hello", "hi", "hey"]
    extractor.extract([hello])
    assert computed[3:] == ["hello"]
    extractor.forget()
    extractor.extract([hello])
    assert computed[4:] == ["hello"]


def test_what_is_forgotten_while_features_are_computed_disturbs_nothing(monkeypatch):
    extractor = FeatureExtractor(None)

    def extract(texts, embedder):
        extractor.forget()
        return np.zeros((len(texts), len(NAMED) - 2))

    extractor.extract([AnswerText("hello", False)])
    monkeypatch.setattr(feature_space, "extract_features", extract)
    found = extractor.extract([AnswerText("hello", False), AnswerText("hi", False)])
    assert found[:, ENDED].tolist() == [0, 0]
