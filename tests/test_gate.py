"""The gate: what it lets through, what it stops, and that it can tell the two apart."""

import numpy as np
import pytest

from bot.config import GateConfig
from learning import demo
from learning.evaluation import Sample, bootstrap
from learning.gate import Evidence, Gain, by_chance, by_luck, gain_of, judge, less_usual, margin


def evidence(worth: float = 0.3, likelier: float = 0.3, **changes) -> Evidence:
    signs = [1, 1, 1, -1, -1, -1] * 4
    rng = np.random.default_rng(0)
    live = rng.normal(-1, 0.3, len(signs))
    counts, moved = (value / 2 * np.array(signs) + rng.normal(0, 0.1, len(signs)) for value in (worth, likelier))
    gained = Gain((counts * 2 / len(signs)).tolist(), rng.normal(worth, 0.2, 24).tolist())
    found = {
        "conversations": [str(n) for n in range(len(signs))],
        "signs": signs,
        "kinds": [0] * len(changes.get("signs", signs)),
        "live": live.tolist(),
        "gain": gained,
    }
    found |= {"candidate": (live + moved).tolist(), "kl": 0.1, "well_formed": 1.0, "base_well_formed": 1.0}
    return Evidence(**(found | changes))


NO_NUMBER = Gain([float("nan")] * 24, [0.3] * 24)
LUCK = Gain([0.3, 0.3, 0.3, -0.3, -0.3, -0.3] * 4, [0.3, -0.3] * 12)


def test_a_candidate_that_is_better_safe_and_sound_passes():
    verdict = judge(evidence(), GateConfig(), seed=0)
    assert verdict.passed
    assert verdict.figures["gain"] == pytest.approx(0.3, abs=0.1)
    assert verdict.figures["margin_gain"] == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"worth": 0.0, "likelier": 0.0}, "not shown to be better"),
        ({"worth": -0.3, "likelier": -0.3}, "not shown to be better"),
        ({"kl": 0.9}, "too far from the base"),
        ({"kl": float("nan")}, "too far from the base"),
        ({"well_formed": 0.8}, "answers break"),
        ({"signs": [1] * 24}, "too little evidence: 24 liked and 0 disliked"),
        ({"gain": NO_NUMBER, "candidate": [float("nan")] * 24}, "not shown to be better"),
        ({"gain": LUCK, "likelier": 0.0}, "answers by luck in"),
        ({"faults": ["adapter_model.safetensors: is missing"]}, "is missing"),
    ],
)
def test_no_evidence_no_promotion(changes, reason):
    verdict = judge(evidence(**changes), GateConfig(), seed=0)
    assert not verdict.passed
    assert reason in verdict.reasons[0]


@pytest.mark.parametrize("way", ["worth", "likelier"])
def test_either_way_to_ask_is_enough_and_each_may_be_luck_half_as_often(way):
    other = {"worth": "likelier", "likelier": "worth"}[way]
    assert judge(evidence(**{other: 0.0}), GateConfig(), seed=0).passed
    assert not judge(evidence(**{way: 0.0, other: 0.0}), GateConfig(), seed=0).passed
    values, nothing = [3.0, 3.0, 3.0, 1.0, 0.0, 0.0, 2.0], [0.0] * 7  # only one order of 35 is better
    for_way = {"worth": (values, nothing), "likelier": (nothing, values)}[way]
    gained = Gain(for_way[0], [1.0] * 12)
    found = evidence(signs=[1] * 4 + [-1] * 3, live=nothing, candidate=for_way[1], gain=gained)
    verdict = judge(found, GateConfig(confidence=0.9), seed=0)
    assert verdict.figures[{"worth": "gain", "likelier": "margin_gain"}[way] + "_by_chance"] == pytest.approx(2 / 35)
    assert not verdict.passed, "2 / 35 is more than half of what 0.9 leaves"
    assert judge(found, GateConfig(confidence=0.88), seed=0).passed, "the control"


def test_where_no_opinions_could_show_it_that_is_what_is_said():
    few = {"signs": [1, 1, 1, -1, -1, -1], "live": [-1.0] * 6, "candidate": [0.0] * 3 + [-2.0] * 3}
    few["gain"] = Gain([1.0] * 3 + [-1.0] * 3, [1.0] * 12)
    [reason] = judge(evidence(**few), GateConfig(), seed=0).reasons
    assert reason.startswith("too little evidence: of 3 liked and 3 disliked held-out answers")
    enough = {name: values[:3] * 2 + values[3:] * 2 for name, values in few.items() if name != "gain"}
    enough["gain"] = Gain([1.0] * 6 + [-1.0] * 6, [1.0] * 12)
    assert judge(evidence(**enough), GateConfig(), seed=0).passed


def test_that_the_prompts_are_too_few_is_said_too():
    few, enough = (
        judge(evidence(likelier=0.0, gain=Gain([0.0] * 24, [0.0] * count)), GateConfig(), seed=0) for count in (5, 6)
    )
    assert "5 different prompts are too few to tell its answers from luck" in few.reasons[0]
    assert "too few" not in enough.reasons[0]


@pytest.mark.parametrize("held_out", [6, 8, 24])
def test_opinions_at_random_pass_as_often_as_the_confidence_lets_them(held_out):
    rng = np.random.default_rng(0)
    draws = 300
    tests, intervals = 0, 0
    for _ in range(draws):
        gained, signs = rng.standard_t(3, held_out), rng.permutation([1, -1] * (held_out // 2))
        tests += by_chance(gained, signs, [0] * len(signs), seed=0) <= 0.05
        lower = bootstrap(lambda pick, g=gained, s=signs: margin(g[pick], s[pick]), signs, 0.9, seed=0, draws=300)[1]
        intervals += lower > 0
    most = draws * 0.05 + 2 * (draws * 0.05 * 0.95) ** 0.5
    assert tests <= most
    if held_out < 10:
        assert intervals > most, "the control: an interval of so few is too narrow"


def test_what_people_do_mean_is_told_from_chance():
    signs = np.array([1, -1] * 8)
    rng = np.random.default_rng(0)
    gained = 0.1 * signs + rng.normal(0, 0.05, len(signs))
    assert by_chance(gained, signs, [0] * len(signs), seed=0) < 0.001
    assert by_chance(-gained, signs, [0] * 16, seed=0) > 0.999
    assert by_chance(np.zeros(16), signs, [0] * 16, seed=0) == 1.0


def test_where_the_base_itself_does_not_answer_well_a_candidate_is_held_to_the_base():
    assert judge(evidence(well_formed=0.7, base_well_formed=0.6), GateConfig(), seed=0).passed
    assert not judge(evidence(well_formed=0.5, base_well_formed=0.6), GateConfig(), seed=0).passed


def answers(rng: np.random.Generator, count: int, emoji: float) -> list[Sample]:
    """Answers of the toy policy's kind to twelve prompts; that share of them has an emoji."""
    found = []
    for number in range(count):
        styles = [style for style in demo.STYLES if style.emoji == (rng.random() < emoji)]
        intent = demo.INTENTS[int(rng.integers(len(demo.INTENTS)))]
        text = demo.answer(intent, styles[int(rng.integers(len(styles)))])
        found.append(Sample((number % 12,), (), text, True))
    return found


def liked_if_emoji(judged: list[Sample], rng: np.random.Generator) -> list[int]:
    """What people say who like an emoji; one in ten says the opposite."""
    return [1 if any(ord(sign) > 0x1F000 for sign in one.text) != (rng.random() < 0.1) else -1 for one in judged]


@pytest.mark.parametrize("reads_meaning", [False, True])
def test_opinions_on_some_answers_tell_what_others_are_worth(reads_meaning, embedder):
    rng = np.random.default_rng(0)
    judged, before, more, fewer = (
        answers(rng, count, share) for count, share in ((40, 0.5), (36, 0.5), (36, 0.9), (36, 0.1))
    )
    opinions = liked_if_emoji(judged, rng)
    meaning = embedder if reads_meaning else None
    for after, sign in ((more, 1), (fewer, -1)):
        found = gain_of([one.text for one in judged], opinions, [0] * 40, before, after, meaning)
        assert np.mean(found.by_prompt) == pytest.approx(np.dot(found.counts, less_usual(np.array(opinions), [0] * 40)))
        assert sign * np.mean(found.by_prompt) > 0.1
        assert len(found.by_prompt) == 12
    passed = gain_of([one.text for one in judged], opinions, [0] * 40, before, more, meaning)
    assert by_chance(np.array(passed.counts), np.array(opinions), [0] * 40, seed=0) < 0.01
    assert by_luck(passed.by_prompt, seed=0) < 0.01


def test_neither_opinions_at_random_nor_answers_by_luck_pass_more_often_than_they_may():
    """Where nothing moved, real opinions alone would let luck pass: that is the control."""
    draws = 120
    passes = {"opinions at random": 0, "nothing moved": 0, "nothing moved, opinions alone": 0, "both": 0}
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        judged, before, same, moved = (
            answers(rng, count, share) for count, share in ((24, 0.5), (24, 0.5), (24, 0.5), (24, 0.9))
        )
        texts, meant = [one.text for one in judged], liked_if_emoji(judged, rng)
        for name, after, opinions in (
            ("opinions at random", moved, rng.permutation(meant).tolist()),
            ("nothing moved", same, meant),
            ("both", moved, meant),
        ):
            if len(set(opinions)) == 1:
                continue
            found = gain_of(texts, opinions, [0] * 24, before, after, None)
            is_opinion = by_chance(np.array(found.counts), np.array(opinions), [0] * len(opinions), seed=0) <= 0.05
            is_answer = by_luck(found.by_prompt, seed=0) <= 0.05
            passes[name] += is_opinion and is_answer
            if name == "nothing moved":
                passes["nothing moved, opinions alone"] += is_opinion
    most = draws * 0.05 + 2 * (draws * 0.05 * 0.95) ** 0.5
    assert passes["opinions at random"] <= most
    assert passes["nothing moved"] <= most
    assert passes["nothing moved, opinions alone"] > most
    assert passes["both"] > draws * 0.7


def test_an_answer_beyond_all_that_was_judged_is_worth_no_more_than_those():
    judged = ["one two three", "one two three four five six"] * 6
    opinions = [-1, 1] * 6
    before, longer, endless = ([Sample((0,), (), "word " * count, True)] for count in (3, 6, 6000))
    worth = gain_of(judged, opinions, [0] * 12, before, longer, None).by_prompt[0]
    assert worth > 0
    assert gain_of(judged, opinions, [0] * 12, before, endless, None).by_prompt[0] == pytest.approx(worth, abs=0.1)


def test_without_two_kinds_of_opinions_nothing_is_gained():
    before, after = [Sample((0,), (), "no", True)], [Sample((0,), (), "yes!", True)]
    assert gain_of(["a", "b"], [1, 1], [0, 0], before, after, None) == Gain([0.0, 0.0], [0.0])
    assert gain_of([], [], [], before, after, None) == Gain([], [0.0])
    assert by_luck([0.0], seed=0) == 1.0, "one prompt shows nothing"


def by_question(rng: np.random.Generator, count: int, chatty: float) -> tuple[list[Sample], list[int]]:
    """Answers to two kinds of questions: short ones to small talk, longer ones to hard ones, `chatty` times as long."""
    kinds = rng.integers(2, size=count).tolist()
    words = [int(rng.integers(3, 8) * (1 + 2 * kind) * chatty) for kind in kinds]
    return [Sample((row % 12,), (), "word " * many, True) for row, many in enumerate(words)], kinds


def test_who_likes_a_kind_of_question_whatever_is_answered_proves_no_style_of_answers():
    draws = 100
    passes = {"within kinds": 0, "over all": 0}
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        judged, kinds = by_question(rng, 40, 1.0)
        opinions = [1 if rng.random() < (0.85, 0.2)[kind] else -1 for kind in kinds]
        before, after = by_question(rng, 36, 1.0)[0], by_question(rng, 36, 0.7)[0]
        for name, told in (("within kinds", kinds), ("over all", [0] * 40)):
            found = gain_of([one.text for one in judged], opinions, told, before, after, None)
            is_opinion = by_chance(np.array(found.counts), np.array(opinions), told, seed=seed) <= 0.05
            passes[name] += is_opinion and by_luck(found.by_prompt, seed=seed) <= 0.05
    assert passes["within kinds"] <= draws * 0.05 + 2 * (draws * 0.05 * 0.95) ** 0.5
    assert passes["over all"] > draws * 0.2, "the control"
