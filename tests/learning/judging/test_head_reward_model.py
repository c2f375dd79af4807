"""The reward head as a judge: it finds what people like on unseen units, and is compared with length and log-probability."""

import random
from dataclasses import replace

import numpy as np
import pytest

from bot.config import Config, PolicyConfig, ServingConfig
from learning.data.experience import Experience
from learning.judging.evaluation import Sample, answer_logprobs, token_rows
from learning.judging.evidence import with_mean_logprobs
from learning.judging.head_comparison import compare_head
from learning.judging.head_reward_model import HeadRewardModel
from learning.judging.off_policy import Answers, estimate_worth
from learning.judging.reward_model import make_reward_model
from learning.judging.reward_scores import score
from learning.models.trainable import load_served


def rated(likes, count: int = 96, seed: int = 0) -> list[Experience]:
    """Return judged answers, two in a unit: some ask back, some are long, and some were likely."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        text = " ".join(["word"] * rng.randint(3, 30)) + rng.choice("?.")
        one = Experience(str(number), str(number // 2), (), (), None, 1.0, (), answer=text, mean_logprob=rng.gauss(-2, 1))
        found.append(replace(one, reward=1.0 if likes(one, rng) else -1.0))
    return found


def asks_back(one: Experience, rng: random.Random) -> bool:
    return one.answer.endswith("?") != (rng.random() < 0.1)


def by_lot(one: Experience, rng: random.Random) -> bool:
    return rng.random() < 0.5


def test_a_head_finds_a_taste_on_units_that_it_did_not_see_and_nothing_by_lot():
    model = make_reward_model(Config(reward_model={"kind": "head"}), None, "unused")
    assert isinstance(model, HeadRewardModel)
    judged = rated(asks_back)
    found = score(model.fit(judged), seed=0, draws=200)
    assert found.reward_model_auc_low > 0.7
    asks, tells = (Experience("", "", (), (), None, 0.0, (), answer=f"a word or two{end}") for end in "?.")
    liked, disliked = model.predict_chances([asks, tells])
    assert liked > 0.7 > 0.3 > disliked
    found = [score(model.fit(rated(by_lot, seed=seed)), seed=0, draws=20).reward_model_auc for seed in range(6)]
    assert sum(found) / 6 == pytest.approx(0.5, abs=0.1), "the control"


def test_a_head_reads_no_correction_and_needs_enough_of_both_kinds_in_several_units():
    judged = rated(asks_back, count=60)
    wanted = [replace(one, is_correction=True, reward=1.0, answer="a wish") for one in judged[:5]]
    found = HeadRewardModel(None, 0.25, seed=0).fit([*judged, *wanted])
    assert found.chances.tolist() == HeadRewardModel(None, 0.25, seed=0).fit(judged).chances.tolist()
    assert HeadRewardModel(None, 0.25, seed=0).fit(judged[:30]) is None
    liked = [replace(one, reward=1.0) for one in judged]
    disliked = [replace(one, reward=-1.0, unit="one unit") for one in judged[:20]]
    assert HeadRewardModel(None, 0.25, seed=0).fit([*liked, *disliked]) is None
    found = compare_head([*liked, *disliked], None, 0.25, seed=0)
    assert found.head_auc is not None, "where no model can be fitted, it ranks all answers alike"


def test_an_estimate_reads_whether_the_answers_of_the_policy_ended_themselves():
    judged = [replace(one, is_finished=one.reward > 0) for one in rated(by_lot)]
    held_out = [replace(judged[n], prompt_ids=(n,), unit=f"unseen {n}") for n in range(8)]
    cut, ended = (
        Answers({(n,): Sample((), (), "word", is_finished) for n in range(8)}, [np.zeros(1)] * 8)
        for is_finished in (False, True)
    )
    found = estimate_worth(judged, held_out, HeadRewardModel(None, 0.25, seed=0), cut, ended, seed=0)
    assert found.estimated_gain.low > 0.5


def test_what_a_head_knows_beyond_length_and_log_probability_is_told():
    found = compare_head(rated(asks_back), None, 0.25, seed=0)
    assert found.head_auc_low > 0.75 > found.length_and_logprob_auc_high
    assert found.length_alone_auc_low < 0.5 < found.length_alone_auc_high


def test_what_a_head_does_not_know_beyond_them_is_told_as_well():
    """The second half is the control of both figures beside the head."""
    likely = rated(lambda one, rng: one.mean_logprob > -2)
    found = compare_head(likely, None, 0.25, seed=0)
    assert found.head_auc <= found.length_and_logprob_auc
    assert found.length_and_logprob_auc_low > 0.9 > found.length_alone_auc_high
    long = [replace(one, reward=1.0 if len(one.answer) > 80 else -1.0, mean_logprob=None) for one in likely]
    found = compare_head(long, None, 0.25, seed=0)
    assert found.length_and_logprob_auc == found.length_alone_auc == 1.0, "folds cost a model nothing that it knows"
    assert compare_head(long[:20], None, 0.25, seed=0) is None


def test_answers_without_a_recorded_log_probability_get_that_of_the_model(demo_model, tokenizer):
    texts = ["Hey there!", "Good night, and sleep well.", "Yes.", "Good day to you."]
    prompt = tuple(tokenizer.prompt_ids([{"role": "user", "content": "hello"}]))
    answers = [
        Experience(text, text, prompt, tuple(tokenizer.completion_ids(text)), None, 1.0, (), answer=text) for text in texts
    ]
    answers[2] = replace(answers[2], mean_logprob=-9.0)
    model = load_served(PolicyConfig(), ServingConfig(), demo_model)
    found = with_mean_logprobs(model, answers, longest=answers[3].length)
    assert [one.answer for one in found] == texts
    first, _, _, last = (float(row.mean()) for row in answer_logprobs(model, token_rows(answers)))
    assert [one.mean_logprob for one in found] == [pytest.approx(first, abs=1e-4), None, -9.0, pytest.approx(last, abs=1e-4)]
    assert first != pytest.approx(last, abs=1e-2), "the control"
