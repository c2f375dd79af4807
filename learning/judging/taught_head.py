"""TaughtHead: a reward head with the space of its features, fitted to answers that people judged.

Its name is the hash of its content. `learning.rollout.heads` has the files.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from bot.types import Reason
from learning.data.experience import Experience
from learning.data.feature_space import AnswerText, FeatureExtractor, FeatureSpace
from learning.data.selection import cap_people
from learning.judging.best_of_n import FEW_E_VALUE, LEAST_OF_A_KIND, LEAST_REACTIONS, PESSIMISM, Approval
from learning.judging.reward_head import RewardHead

NEWEST = 512  # judged answers that a head is fitted to, at most
# A proof in the past is looked for after each of so many reactions, then after every so many.
LOOKS_ALWAYS, LOOKS_EVERY = 64, 8
REASON_WEIGHT = 0.5  # of the answer that a reason asks for, beside the disliked one
# What each reason asks for, in standard deviations of features. The other reasons ask for nothing that a feature names.
WANTED_SHIFTS: dict[Reason, dict[str, float]] = {Reason.TOO_LONG: {"length": -1.0, "sentences": -1.0}}
ONE_EACH = (1.0, 0.0, 0.0)  # a person's own head has regressions on single features alone: it learns from few reactions


@dataclass(frozen=True)
class TaughtHead:
    """A fitted head, which everybody shares. `teachers` are the people whose opinions it was fitted to.

    `peak_e_value` is the highest e-value that it or one of the heads before it had. `own` are the heads of people whose
    taste differs from everybody's, by person: each adds to the log odds of the shared one.
    """

    head: RewardHead
    space: FeatureSpace
    teachers: tuple[str, ...]
    peak_e_value: float
    own: Mapping[str, RewardHead] = field(default_factory=dict)

    @cached_property
    def name(self) -> str:
        """Its name."""
        content = json.dumps(self.as_json(), sort_keys=True)
        return f"head-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    def find_e_value(self, person: str = "") -> float:
        """Return the evidence that it tells what everybody likes, or what a person likes."""
        return max(self.peak_e_value, self.own[person].e_value if person in self.own else 0.0)

    def predict(self, raw: np.ndarray, person: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and standard deviation (n,) of the log odds that answers with raw features (n × raw) are liked, by
        everybody or by a person.
        """
        places = self.space.place(raw)
        means, sds = zip(*(one.predict(places) for one in self._find_heads(person)), strict=True)
        return np.sum(means, axis=0), np.sqrt(np.sum(np.square(sds), axis=0))

    def score(self, raw: np.ndarray, pessimism: float = PESSIMISM, person: str = "") -> np.ndarray:
        """Return the pessimistic scores (n,) of answers with raw features (n × raw): `pessimism` standard deviations below
        the mean log odds that they are liked, by everybody or by a person.
        """
        mean, sd = self.predict(raw, person)
        return mean - pessimism * sd

    def compute_doubts(
        self, raw: np.ndarray, of_rival: np.ndarray, seed: int, person: str = "", draws: int = 64
    ) -> np.ndarray:
        """Return how unsure it is whether people, or a person, like each answer better than a rival (n,), from 0 to 1 for a
        toss-up.

        Each draw from the posterior has an opinion. Houlsby et al. (2011), "Bayesian Active Learning for Classification and
        Preference Learning", arXiv:1112.5745, ask for the pair on which such draws disagree most.
        """
        rng, places = np.random.default_rng(seed), self.space.place(np.concatenate([raw, of_rival]))
        heads = self._find_heads(person)
        drawn = np.array([sum(one.draw(places, rng) for one in heads) for _ in range(draws)])
        better = (drawn[:, :-1] > drawn[:, -1:]).mean(0)
        return 4 * better * (1 - better)

    def explain(self, raw: np.ndarray, row: int, person: str = "", most: int = 3) -> dict[str, float]:
        """Return the features that move one of the answers most against the mean of all of them, in log odds, for everybody
        or for a person.
        """
        places = self.space.place(raw)
        away = places[row] - places.mean(0)
        moved: dict[str, float] = defaultdict(float)
        for head in self._find_heads(person):
            for one, value in head.coefficients.items():
                moved[self.space.names[one]] += value * float(away[one])
        largest = sorted(moved, key=lambda name: -abs(moved[name]))[:most]
        return {name: moved[name] for name in largest if abs(moved[name]) >= 0.05}

    def as_json(self) -> dict[str, Any]:
        """Return the head as JSON values, without its name."""
        return {
            "head": self.head.as_json(),
            "space": self.space.as_json(),
            "teachers": [*self.teachers],
            "peak_e_value": self.peak_e_value,
            "own": {person: head.as_json() for person, head in sorted(self.own.items())},
        }

    def _find_heads(self, person: str) -> list[RewardHead]:
        return [self.head, *([self.own[person]] if person in self.own else [])]


def fit_head(
    rated: Sequence[Experience],
    usual: Sequence[AnswerText],
    extractor: FeatureExtractor,
    cap: float,
    earlier_peak: float = 0.0,
) -> TaughtHead | None:
    """Fit a head to the newest of the `rated` answers (oldest first), corrections apart.

    `usual` are other answers of the policy, which nobody judged; they tell what its answers are usually like. No person
    counts for more than a share `cap`. `earlier_peak` is the highest e-value so far. Returns None
    if there are too few reactions, or none of one kind.
    """
    judged = [one for one in rated if not one.is_correction][-NEWEST:]
    liked = np.array([one.reward > 0 for one in judged])
    if len(judged) < LEAST_REACTIONS or min(liked.sum(), (~liked).sum()) < LEAST_OF_A_KIND:
        return None
    raw, space = _place(judged, usual, extractor)
    places, weights = space.place(raw), _weigh(judged, cap)
    head = RewardHead.fit(places, liked, weights, space.group_sizes)
    shifted, behind = _shift_by_reasons(judged, places, space.names)
    if behind:
        # What would be liked is no reaction, so it is no evidence that the head is right.
        told = (
            np.vstack([places, shifted]),
            np.r_[liked, [True] * len(behind)],
            np.r_[weights, REASON_WEIGHT * weights[behind]],
        )
        head = replace(RewardHead.fit(*told, space.group_sizes), e_value=head.e_value)
    own = _fit_own(judged, places, weights, head, space.group_sizes)
    return TaughtHead(head, space, find_teachers(judged), max(earlier_peak, head.e_value), own)


def find_teachers(judged: Sequence[Experience]) -> tuple[str, ...]:
    """Return the people whose opinions answers have, sorted."""
    return tuple(sorted({person for one in judged for person in one.opinion_holders}))


def _fit_own(
    judged: Sequence[Experience], places: np.ndarray, weights: np.ndarray, shared: RewardHead, groups: Sequence[int]
) -> dict[str, RewardHead]:
    """Fit a head of their own to the opinions of each person for whom it explains them better than the shared one alone.

    The evidence for it is an e-value too, against the shared head with another rate of approval. The shared head has learned
    from the same opinions, so there is the less left to explain. If one person taught it alone, it is theirs already.
    """
    found: dict[str, RewardHead] = {}
    people = find_teachers(judged)
    for person in people if len(people) > 1 else ():
        rows = [row for row, one in enumerate(judged) if person in one.opinion_holders]
        liked = np.array([judged[row].reward > 0 for row in rows])
        if len(rows) >= LEAST_REACTIONS and min(liked.sum(), (~liked).sum()) >= LEAST_OF_A_KIND:
            offset, _ = shared.predict(places[rows])
            head = RewardHead.fit(places[rows], liked, weights[rows], groups, offset, ONE_EACH)
            if head.e_value >= FEW_E_VALUE:
                found[person] = head
    return found


def find_peak_e_value(
    rated: Sequence[Experience], extractor: FeatureExtractor, cap: float, enough: float = math.inf
) -> float:
    """Return the highest e-value that a head ever had, as reactions came in, or one of at least `enough`.

    By luck it exceeds 1/p at any time with a chance of about p (Ville's inequality). So what was proven stays proven, though
    answers that became alike tell nothing more.
    """
    judged = [one for one in rated if not one.is_correction][-NEWEST:]
    if len(judged) < LEAST_REACTIONS:
        return 0.0
    raw, space = _place(judged, (), extractor)
    places, weights = space.place(raw), _weigh(judged, cap)
    liked = np.array([one.reward > 0 for one in judged])
    ends = [*range(LEAST_REACTIONS, len(judged) + 1)]
    ends = [end for end in ends if end <= LOOKS_ALWAYS or not end % LOOKS_EVERY or end == len(judged)]
    usable = [end for end in ends if min(liked[:end].sum(), (~liked[:end]).sum()) >= LEAST_OF_A_KIND]
    peak = 0.0
    for end in reversed(usable):  # the latest head knows most
        peak = max(peak, RewardHead.fit(places[:end], liked[:end], weights[:end], space.group_sizes).e_value)
        if peak >= enough:
            break
    return peak


def count_approval(rated: Iterable[Experience]) -> Approval:
    """Count the liked and the disliked answers, corrections apart."""
    judged = [one for one in rated if not one.is_correction]
    liked = sum(one.reward > 0 for one in judged)
    return Approval(liked, len(judged) - liked)


def _shift_by_reasons(
    judged: Sequence[Experience], places: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, list[int]]:
    """Return the places of answers that would be better by the reasons that people gave (n × features), and the numbers of
    the disliked answers behind them.
    """
    shifted, behind = [], []
    for row, one in enumerate(judged):
        for reason in sorted(WANTED_SHIFTS.keys() & one.reasons) if one.reward < 0 else ():
            away = [WANTED_SHIFTS[reason].get(name, 0.0) for name in names]
            shifted.append(places[row] + away)
            behind.append(row)
    return np.array(shifted).reshape(-1, len(names)), behind


def describe_answer(one: Experience) -> AnswerText:
    """Return an experience's answer as the head sees it."""
    return AnswerText(one.answer, one.is_finished, one.mean_logprob)


def _place(
    judged: Sequence[Experience], usual: Sequence[AnswerText], extractor: FeatureExtractor
) -> tuple[np.ndarray, FeatureSpace]:
    """Return the raw features of judged answers, and the space fitted to them and to the `usual` ones."""
    raw = extractor.extract([describe_answer(one) for one in judged])
    others = [extractor.extract(usual)] if usual else []
    with threadpool_limits(1, "blas"):  # beside a busy vLLM two threads wait for each other: 3 s in place of 0.03 s
        return raw, FeatureSpace.fit(np.concatenate([raw, *others]))


def _weigh(judged: Sequence[Experience], cap: float) -> np.ndarray:
    """Return how much each answer counts (n,): the size of its reward, limited for people who say more than their share."""
    size = np.abs([one.reward for one in judged])
    return size * cap_people([one.opinion_holders for one in judged], size, cap)
