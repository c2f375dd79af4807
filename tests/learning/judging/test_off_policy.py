"""The doubly robust estimate: right where either the reward model or the weights are, and wrong where neither is."""

import numpy as np
import torch
from test_reward_model import rated

from learning.data.experience import Experience
from learning.judging.evaluation import Sample
from learning.judging.off_policy import MAX_IMPORTANCE, Answers, Estimate, doubly_robust, estimate_worth, importance_weights
from learning.judging.reward_model import RewardModel


def drawn(seed: int = 0, count: int = 200_000) -> dict[str, np.ndarray]:
    """Two answers, liked in 30% and 80%; the first was given in 60%, the policy now gives it in 30%."""
    rng = np.random.default_rng(seed)
    chance = np.array([0.3, 0.8])
    given, now = rng.random(count) > 0.6, rng.random(count) > 0.3
    liked = rng.random(count) < chance[given.astype(int)]
    weights = np.where(given, 0.7 / 0.4, 0.3 / 0.6)
    return {"chance": chance, "given": given.astype(int), "now": now.astype(int), "liked": liked, "weights": weights}


def test_it_is_right_where_the_model_or_the_weights_are():
    found = drawn()
    true = 0.3 * 0.3 + 0.7 * 0.8
    perfect, useless = found["chance"], np.array([0.5, 0.5])

    def estimate(model: np.ndarray, weights: np.ndarray) -> float:
        return float(doubly_robust(model[found["now"]], weights, found["liked"], model[found["given"]]).mean())

    no_weights = np.zeros(len(found["given"]))
    assert abs(estimate(perfect, no_weights) - true) < 0.01
    assert abs(estimate(useless, found["weights"]) - true) < 0.01
    assert abs(estimate(perfect, np.ones(len(found["given"]))) - true) < 0.01
    assert abs(estimate(useless, no_weights) - true) > 0.1  # the control


def test_weights_are_cut_and_what_was_not_recorded_has_none():
    rows = [Experience("", "", (), (1, 2), logprobs, 1.0, ()) for logprobs in ((-1.0, -1.0), (-3.0, -3.0), None)]
    now = [torch.tensor([-1.5, -1.0])] * 3
    assert importance_weights(now, rows).round(3).tolist() == [round(float(np.exp(-0.5)), 3), MAX_IMPORTANCE, 0.0]


def test_a_policy_that_says_what_people_like_is_worth_more(embedder):
    liked = rated(lambda about, rng: (about == "cats") != (rng.random() < 0.1))
    held_out = [Experience(str(n), str(n), (n,), (1,), None, 1.0, (), question="tell me", answer="cats") for n in range(8)]
    logprobs = [torch.zeros(1)] * 8
    before, after = (
        Answers({(n,): Sample((), (), text, True) for n in range(8)}, logprobs)
        for text in ("income tax is due every year", "my cat sleeps all day")
    )
    model = RewardModel(embedder, seed=0)
    found = estimate_worth(liked, held_out, model, before, after, seed=0)
    assert found.estimated_gain.low > 0.5
    assert found.reward_model.calibration
    same = estimate_worth(liked, held_out, model, before, before, seed=0)
    assert same.estimated_gain == (0.0, 0.0, 0.0)  # the control
    assert estimate_worth(liked[:8], held_out, model, before, after, seed=0) == Estimate(), "too little is rated"
