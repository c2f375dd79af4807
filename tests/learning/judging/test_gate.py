"""The gate: what it lets through, what it stops, and that it can tell the two apart."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from bot.config import GateConfig
from learning.data.experience import Experience
from learning.judging.error_budget import compute_next_level
from learning.judging.evaluation import Sample
from learning.judging.gate import (
    HEADROOM,
    Evidence,
    Gain,
    HeldOutOpinions,
    can_suffice,
    collect_opinions,
    compute_allowed_p,
    compute_gain,
    compute_p_values,
    count_wanted,
    judge,
    select_newest_sufficient,
    subtract_kind_means,
)
from learning.judging.permutation import permutation_p_value, sign_flip_p_value
from learning.judging.statistics import bootstrap, margin
from learning.models import toy


def opinions(signs: list[int], kinds: list[int] | None = None) -> HeldOutOpinions:
    """HeldOutOpinions of people who judged one answer each."""
    count = len(signs)
    return HeldOutOpinions(signs, kinds or [0] * count, [str(row) for row in range(count)], [0] * count, [1.0] * count)


def by_chance(gain: Gain, signs: list[int]) -> float:
    """How often opinions at random would give as large a gain."""
    return permutation_p_value(np.array(gain.counts), np.array(signs), range(len(signs)), [0] * len(signs), seed=0)


def evidence(worth: float = 0.3, likelier: float = 0.3, signs=(1, 1, 1, -1, -1, -1) * 4, **changes) -> Evidence:
    signs = list(signs)
    rng = np.random.default_rng(0)
    live = rng.normal(-1, 0.3, len(signs))
    counts, moved = (value / 2 * np.array(signs) + rng.normal(0, 0.1, len(signs)) for value in (worth, likelier))
    gained = Gain((counts * 2 / len(signs)).tolist(), rng.normal(worth, 0.2, 24).tolist())
    found = {
        "opinions": opinions(signs),
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
    assert verdict.figures.gain == pytest.approx(0.3, abs=0.1)
    assert verdict.figures.margin_gain == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"worth": 0.0, "likelier": 0.0}, "not shown to be better"),
        ({"worth": -0.3, "likelier": -0.3}, "not shown to be better"),
        ({"kl": 0.9}, "too far from the base"),
        ({"kl": float("nan")}, "too far from the base"),
        ({"well_formed": 0.8}, "too few well-formed answers: 80%, required ≥ 95%"),
        ({"signs": [1] * 24}, "too little evidence: 24 liked and 0 disliked"),
        ({"gain": NO_NUMBER, "candidate": [float("nan")] * 24}, "not shown to be better"),
        ({"gain": LUCK, "likelier": 0.0}, "sign-flip test: p = 0."),
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
    verdict = judge(found, GateConfig(confidence=0.7), seed=0)
    p_value = getattr(verdict.figures, {"worth": "gain", "likelier": "margin_gain"}[way] + "_by_chance")
    assert p_value == pytest.approx(2 / 35, abs=0.015)
    assert verdict.figures.level == pytest.approx(compute_next_level(0.3, ()))
    assert verdict.figures.level / 2 < p_value < verdict.figures.level
    assert not verdict.passed, "it is more than half of the level"
    assert judge(found, GateConfig(confidence=0.6), seed=0).passed, "the control"


def test_where_no_opinions_could_show_it_that_is_what_is_said():
    few: dict = {"signs": [1, 1, 1, -1, -1, -1], "live": [-1.0] * 6, "candidate": [0.0] * 3 + [-2.0] * 3}
    few["gain"] = Gain([1.0] * 3 + [-1.0] * 3, [1.0] * 12)
    [reason] = judge(evidence(**few), GateConfig(), seed=0).reasons
    assert reason.startswith("too little evidence: 3 liked and 3 disliked held-out answers, best possible p = 0.05, ")
    assert "5 of each kind are enough" in reason
    enough = {name: values[:3] * 2 + values[3:] * 2 for name, values in few.items() if name != "gain"}
    enough["gain"] = Gain([1.0] * 6 + [-1.0] * 6, [1.0] * 12)
    assert judge(evidence(**enough), GateConfig(), seed=0).passed


def test_that_the_prompts_are_too_few_is_said_too():
    few, enough = (
        judge(evidence(likelier=0.0, gain=Gain([0.0] * 24, [0.0] * count)), GateConfig(), seed=0) for count in (5, 7)
    )
    assert "5 different prompts are too few for the sign-flip test" in few.reasons[0]
    assert "too few" not in enough.reasons[0]


@pytest.mark.parametrize("held_out", [6, 8, 24])
def test_opinions_at_random_pass_as_often_as_the_confidence_lets_them(held_out):
    rng = np.random.default_rng(0)
    draws = 300
    tests, intervals = 0, 0
    for _ in range(draws):
        gained, signs = rng.standard_t(3, held_out), rng.permutation([1, -1] * (held_out // 2))
        tests += by_chance(Gain(gained.tolist(), []), signs) <= 0.05
        lower = bootstrap(lambda times, g=gained, s=signs: margin(g, s, times), signs, 0.9, seed=0, draws=300)[1]
        intervals += lower > 0
    most = draws * 0.05 + 2 * (draws * 0.05 * 0.95) ** 0.5
    assert tests <= most
    if held_out < 10:
        assert intervals > most, "the control: an interval of so few is too narrow"


def test_what_people_do_mean_is_told_from_chance():
    signs = [1, -1] * 8
    rng = np.random.default_rng(0)
    gained = 0.1 * np.array(signs) + rng.normal(0, 0.05, len(signs))
    assert by_chance(Gain(gained.tolist(), []), signs) < 0.001
    assert by_chance(Gain((-gained).tolist(), []), signs) > 0.999
    assert by_chance(Gain([0.0] * 16, []), signs) == 1.0
    assert by_chance(Gain([float("nan")] * 16, []), signs) == 1.0


def test_where_the_base_itself_does_not_answer_well_a_candidate_is_held_to_the_base():
    assert judge(evidence(well_formed=0.7, base_well_formed=0.6), GateConfig(), seed=0).passed
    assert not judge(evidence(well_formed=0.5, base_well_formed=0.6), GateConfig(), seed=0).passed


def answers(rng: np.random.Generator, count: int, emoji: float) -> list[Sample]:
    """Answers of the toy policy's kind to twelve prompts; that share of them has an emoji."""
    found = []
    for number in range(count):
        styles = [style for style in toy.STYLES if style.emoji == (rng.random() < emoji)]
        intent = toy.INTENTS[int(rng.integers(len(toy.INTENTS)))]
        text = toy.compose_answer(intent, styles[int(rng.integers(len(styles)))])
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
    meant = liked_if_emoji(judged, rng)
    meaning = embedder if reads_meaning else None
    for after, sign in ((more, 1), (fewer, -1)):
        found = compute_gain([one.text for one in judged], opinions(meant), before, after, meaning)
        centred = subtract_kind_means(np.array(meant), [0] * 40)
        assert np.mean(found.by_prompt) == pytest.approx(np.dot(found.counts, centred))
        assert sign * np.mean(found.by_prompt) > 0.1
        assert len(found.by_prompt) == 12
    passed = compute_gain([one.text for one in judged], opinions(meant), before, more, meaning)
    assert by_chance(passed, meant) < 0.01
    assert sign_flip_p_value(np.array(passed.by_prompt), seed=0) < 0.01


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
        for name, after, said in (
            ("opinions at random", moved, rng.permutation(meant).tolist()),
            ("nothing moved", same, meant),
            ("both", moved, meant),
        ):
            if len(set(said)) == 1:
                continue
            found = compute_gain(texts, opinions(said), before, after, None)
            is_opinion = by_chance(found, said) <= 0.05
            is_answer = sign_flip_p_value(np.array(found.by_prompt), seed=0) <= 0.05
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
    said = opinions([-1, 1] * 6)
    before, longer, endless = ([Sample((0,), (), "word " * count, True)] for count in (3, 6, 6000))
    worth = compute_gain(judged, said, before, longer, None).by_prompt[0]
    assert worth > 0
    assert compute_gain(judged, said, before, endless, None).by_prompt[0] == pytest.approx(worth, abs=0.1)


def test_without_two_kinds_of_opinions_nothing_is_gained():
    before, after = [Sample((0,), (), "no", True)], [Sample((0,), (), "yes!", True)]
    assert compute_gain(["a", "b"], opinions([1, 1]), before, after, None) == Gain([0.0, 0.0], [0.0])
    assert compute_gain([], opinions([]), before, after, None) == Gain([], [0.0])
    assert sign_flip_p_value(np.zeros(1), seed=0) == 1.0, "one prompt shows nothing"


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
        said = [1 if rng.random() < (0.85, 0.2)[kind] else -1 for kind in kinds]
        before, after = by_question(rng, 36, 1.0)[0], by_question(rng, 36, 0.7)[0]
        for name, told in (("within kinds", kinds), ("over all", [0] * 40)):
            found = compute_gain([one.text for one in judged], opinions(said, told), before, after, None)
            is_answer = sign_flip_p_value(np.array(found.by_prompt), seed=seed) <= 0.05
            passes[name] += by_chance(found, said) <= 0.05 and is_answer
    assert passes["within kinds"] <= draws * 0.05 + 2 * (draws * 0.05 * 0.95) ** 0.5
    assert passes["over all"] > draws * 0.2, "the control"


def judged_by(*people: str, likes: bool = True, question: str = "", **details) -> Experience:
    """An answer that these people judged."""
    reward = 1.0 if likes else -1.0
    return Experience("", "", (), (), None, reward, (), opinion_holders=people, question_id=question, **details)


def test_one_voice_cannot_carry_a_candidate_that_is_worse_for_the_twelve_others():
    rng = np.random.default_rng(0)
    rows = [judged_by(f"user {number}", likes=number % 2 == 0, question=f"q{number}") for number in range(12)]
    loud = [judged_by("mallory", likes=number % 2 == 0, question=f"m{number}") for number in range(40)]
    quiet = [judged_by(f"other {number}", likes=number % 2 == 0, question=f"m{number}") for number in range(40)]
    signs = [1, -1] * 26
    moved = [-0.2 * sign for sign in signs[:12]] + [0.2 * sign for sign in signs[12:]]
    candidate = (np.array(moved) + rng.normal(0, 0.05, 52)).tolist()
    nothing = Gain([0.0] * 52, [0.0] * 12)
    for others, carried in ((loud, False), (quiet, True)):
        found = collect_opinions([*rows, *others], [0] * 52, person_cap=0.25)
        verdict = judge(evidence(opinions=found, live=[0.0] * 52, candidate=candidate, gain=nothing), GateConfig(), seed=0)
        assert verdict.passed == carried, "forty people of fifty-two may carry it: the control"
    assert verdict.figures.margin_gain == pytest.approx(2 * 0.2 * 28 / 52, abs=0.05)


def test_who_likes_everything_or_nothing_proves_nothing():
    """Each of eight people asks of one thing, and likes all answers or none; the candidate moves by what is asked of."""
    passes = {True: 0, False: 0}
    draws = 100
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        of_person, likes = rng.normal(0, 1, 8), rng.permutation([True] * 4 + [False] * 4)
        people = rng.integers(8, size=48).tolist()
        rows = [
            judged_by(str(person), likes=bool(likes[person]) != (rng.random() < 0.1), question=str(row))
            for row, person in enumerate(people)
        ]
        moved = of_person[people] + rng.normal(0, 0.2, 48)
        signs = np.array([1 if row.reward > 0 else -1 for row in rows])
        for knows_people in (True, False):
            strata = collect_opinions(rows, [0] * 48, person_cap=0.25).strata if knows_people else [0] * 48
            passes[knows_people] += permutation_p_value(moved, signs, range(48), strata, seed=0) <= 0.05
    most = draws * 0.05 + 2 * (draws * 0.05 * 0.95) ** 0.5
    assert passes[True] <= most < passes[False], "the control: people who are not told apart"


def test_the_answers_to_one_question_keep_their_opinions_together():
    rows = [judged_by(str(number), likes=bool(part), question=str(number)) for number in range(12) for part in range(2)]
    found = collect_opinions(rows, [0] * 24, person_cap=1.0)
    always_second = np.array([0.0, 1.0] * 12)  # what regenerated answers are like, whatever people said
    together, apart = (
        permutation_p_value(always_second, np.array(found.signs), units, found.strata, seed=0)
        for units in (found.units, range(24))
    )
    assert together == 1.0
    assert apart < 0.001, "the control"


def test_a_verdict_without_enough_evidence_spends_nothing():
    few = evidence(signs=[1, 1, 1, -1, -1, -1], live=[-1.0] * 6, candidate=[0.0] * 6, gain=Gain([0.0] * 6, [0.0] * 12))
    assert not judge(few, GateConfig(), seed=0).figures.had_enough_evidence
    nothing = evidence(worth=0.0, likelier=0.0)
    assert judge(nothing, GateConfig(), seed=0).figures.had_enough_evidence, "the control"


def test_after_many_verdicts_more_evidence_is_needed():
    weak = evidence(worth=0.0, likelier=0.1)
    assert judge(weak, GateConfig(), seed=0).passed
    assert not judge(weak, GateConfig(), seed=0, earlier=[False] * 60).passed
    assert judge(evidence(), GateConfig(), seed=0, earlier=[False] * 60).passed, "what is clear passes still"


def test_a_candidate_that_may_wait_is_judged_once_there_is_room_to_show_anything():
    few = {"live": [-1.0] * 10, "candidate": [0.0] * 5 + [-2.0] * 5, "gain": Gain([0.2] * 5 + [-0.2] * 5, [1.0] * 12)}
    barely = evidence(signs=[1] * 5 + [-1] * 5, **few)
    assert judge(barely, GateConfig(), seed=0).passed, "the control: it cannot wait"
    verdict = judge(barely, GateConfig(), seed=0, headroom=HEADROOM)
    assert not verdict.passed
    assert not verdict.figures.had_enough_evidence, "it spends nothing"
    assert verdict.reasons[0].startswith("too little evidence: 5 liked and 5 disliked held-out answers")
    assert "7 of each kind are enough" in verdict.reasons[0]
    assert verdict.answers_wanted == 4
    assert judge(evidence(), GateConfig(), seed=0, headroom=HEADROOM).passed


def test_what_is_wrong_for_another_reason_does_not_wait():
    few = {"signs": [1] * 5 + [-1] * 5, "live": [0.0] * 10, "candidate": [0.0] * 10, "gain": Gain([0.0] * 10, [0.0] * 12)}
    assert judge(evidence(**few), GateConfig(), seed=0, headroom=HEADROOM).answers_wanted > 0, "the control"
    for changes in ({"kl": 0.9}, {"well_formed": 0.5}, {"faults": ["broken"]}, {"is_no_change": True}):
        assert judge(evidence(**few, **changes), GateConfig(), seed=0, headroom=HEADROOM).answers_wanted == 0
    enough = evidence(worth=0.0, likelier=0.0)
    assert judge(enough, GateConfig(), seed=0, headroom=HEADROOM).answers_wanted == 0


def test_how_many_answers_are_wanted_is_foreseen_from_how_many_are_liked():
    gate, allowed = GateConfig(), compute_allowed_p(GateConfig(), ())
    for signs in ([], [1], [1, -1] * 2, [1] * 6 + [-1]):
        more = count_wanted(opinions(signs), gate, allowed)
        share = (signs.count(1) + 1) / (len(signs) + 2)
        for count, suffices in ((len(signs) + more, True), (len(signs) + more - 1, False)):
            liked = round(share * count)
            assert can_suffice(opinions([1] * liked + [-1] * (count - liked)), gate, allowed) == suffices
    assert count_wanted(opinions([1] * 20), gate, allowed) > count_wanted(opinions([1, -1] * 4), gate, allowed)


def test_opinions_that_are_newer_than_the_last_promotion_judge_where_there_are_enough():
    then = datetime(2026, 1, 1, tzinfo=UTC)
    gate, allowed = GateConfig(), compute_allowed_p(GateConfig(), ())
    old = [judged_by(str(row), likes=row % 2 == 0, question=f"old {row}", said_at=then) for row in range(20)]
    new = [
        judged_by(str(row), likes=row % 2 == 0, question=f"new {row}", said_at=then + timedelta(hours=2))
        for row in range(10)
    ]
    promoted = then + timedelta(hours=1)
    assert select_newest_sufficient([*old, *new], promoted, gate, allowed, 1.0) == new
    assert select_newest_sufficient([*old, *new[:8]], promoted, gate, allowed, 1.0) == [*old, *new[:8]], "too few"
    assert select_newest_sufficient([*old, *new], None, gate, allowed, 1.0) == [*old, *new], "nothing was promoted"


def placebo(rng: np.random.Generator, rows: list[Experience], prompts: int = 48) -> Evidence:
    """A candidate that people's opinions have nothing to do with: what it moves depends on who asked, and on luck."""
    of_person = {row.opinion_holders: rng.normal() for row in rows}
    likelier, counts = ([of_person[row.opinion_holders] + rng.normal() for row in rows] for _ in range(2))
    gain = Gain(counts, rng.normal(0.5, 1, prompts).tolist())
    return evidence(
        opinions=collect_opinions(rows, [0] * len(rows), 0.25), live=[0.0] * len(rows), candidate=likelier, gain=gain
    )


def first_of(found: Evidence, rows: list[Experience], count: int) -> Evidence:
    """What the first `count` of the rows say of a candidate."""
    opinions = collect_opinions(rows[:count], [0] * count, 0.25)
    counts = subtract_kind_means(np.array(found.gain.counts[:count]), opinions.kinds).tolist()
    changes = {"live": found.live[:count], "candidate": found.candidate[:count]}
    return replace(found, opinions=opinions, gain=replace(found.gain, counts=counts), **changes)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "waits_often"), [(48, False), (16, True)])
def test_of_placebo_runs_in_a_row_at_most_one_series_in_twenty_promotes_anything(window, waits_often):
    """Two hundred runs, with four more held-out opinions each; people like more or less of what they are answered. Where
    the opinions that are held out are few, candidates wait for up to 24 more, as they do in the loop.
    """
    series, runs, gate, wait = 25, 200, GateConfig(), 24
    budget = 1 - gate.confidence
    most = series * budget + 2 * (series * budget * (1 - budget)) ** 0.5
    promoted, at_one_level, peeked, waited = 0, 0, 0, 0
    for seed in range(series):
        rng = np.random.default_rng(seed)
        tends = rng.uniform(0.2, 0.8, 10)

        def said(name: str, rng=rng, tends=tends) -> Experience:
            person = int(rng.integers(10))
            return judged_by(str(person), likes=rng.random() < tends[person], question=name)

        rows: list[Experience] = []
        earlier: list[bool] = []
        lucky = has_peeked = False
        for run in range(runs):
            rows = [*rows, *(said(f"{run} {number}") for number in range(4))][-window:]
            all_rows = [*rows, *(said(f"{run} later {number}") for number in range(wait))]
            found, allowed = placebo(rng, all_rows), compute_allowed_p(gate, earlier)
            looks = range(len(rows), len(all_rows) + 1)
            enough = (
                at for at in looks if can_suffice(collect_opinions(all_rows[:at], [0] * at, 0.25), gate, allowed / HEADROOM)
            )
            at = next(enough, looks[-1])
            waited += at > looks[0]
            on = first_of(found, all_rows, at)
            if not can_suffice(on.opinions, gate, allowed):
                continue
            asked = compute_p_values(on, allowed, seed=run)
            earlier.append(asked.is_better)
            lucky |= min(asked.by_margin, asked.by_gain) <= budget / 2
            # whoever looks at each reaction what it does to the candidate; until that has shown its point
            if waits_often and run < 20 and not has_peeked and peeked <= most:
                each = (first_of(found, all_rows, at) for at in looks)
                has_peeked = any(
                    can_suffice(one.opinions, gate, allowed) and compute_p_values(one, allowed, seed=run).is_better
                    for one in each
                )
        promoted += any(earlier)
        at_one_level += lucky
        peeked += has_peeked
    assert promoted <= most
    assert at_one_level > series / 2, "the control: the same level at every run"
    if waits_often:
        assert waited > runs * series / 4
        assert peeked > most, "the control: judged anew at each reaction, at the price of one verdict"


def reactions_until_promotion(seed: int, room: float, effect: float, min_reactions: int = 24) -> int:
    """How many reactions come until a better candidate goes live: each run makes one, which waits with `room` > 0.

    A quarter of the questions is held out. The liked answers of a candidate gain `effect` standard deviations over the
    others; eight people in ten like what they are answered.
    """
    rng, gate, wait, most = np.random.default_rng(seed), GateConfig(), 24, 600
    signs = np.where(rng.random(most) < 0.8, 1, -1)
    is_held_out = rng.random(most) < 0.25
    earlier: list[bool] = []
    now = 0
    while (begun := now + min_reactions) + wait < most:
        moved, allowed = effect / 2 * signs + rng.normal(0, 1, most), compute_allowed_p(gate, earlier)

        def rows_at(now: int, begun=begun) -> np.ndarray:
            return np.flatnonzero(is_held_out[:now] | (np.arange(now) >= begun))

        def suffices(now: int, level: float, rows_at=rows_at) -> bool:
            return can_suffice(opinions(signs[rows_at(now)].tolist()), gate, level)

        now = begun
        while room and now < begun + wait and not suffices(now, allowed / room):
            now += 1
        if suffices(now, allowed):
            rows = rows_at(now)
            p_value = permutation_p_value(moved[rows], signs[rows], rows.tolist(), [0] * len(rows), seed, allowed)
            earlier.append(p_value <= allowed)
            if earlier[-1]:
                return now
    return most


@pytest.mark.slow
@pytest.mark.parametrize("effect", [1.0, 2.0])
def test_a_better_candidate_needs_fewer_reactions_where_it_may_wait_for_room_to_show_it(effect):
    """Where it waits only until a perfect candidate could pass (a room of 1), it wins little or loses."""
    at_once, barely, with_room = (
        np.array([reactions_until_promotion(seed, room, effect) for seed in range(120)]) for room in (0, 1, HEADROOM)
    )
    print(f"effect {effect}: median reactions {np.median(at_once)}, {np.median(barely)}, {np.median(with_room)}")
    assert np.median(with_room) < 0.95 * np.median(at_once)
    assert with_room.mean() < 0.9 * min(at_once.mean(), barely.mean())
