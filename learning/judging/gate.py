"""The gate: decide whether a candidate is sound, safe and better than the live version, and give the reasons.

"Better" rests on held-out opinions, which no run learned from. They are tested in two ways. Margin: did liked answers become
likelier, relative to disliked ones? In long answers noise hides this. Gain: are the candidate's own answers more like the
liked ones (`compute_gain`)? One of the two must be significant, at half of the level that `learning.judging.error_budget`
gives this verdict. Nobody's opinions weigh more than `rewards.person_cap`.

The opinions alone decide when to judge, never the candidate's figures on them: otherwise, waiting for more opinions would be
stopping at the luckiest moment. The smallest p-value that n opinions can give (1 / (n choose k) if k are likes) must be
HEADROOM times below the required one. Without that room only a perfect candidate would pass: five of each kind give p =
1/252 = 0.004, enough for the first verdict (p ≤ 0.0086), but two people of ten who slip would fail any candidate. So a
candidate that may wait is judged once, from seven of each kind on (1/3432), and earlier looks spend nothing. If values are
exchangeable given the opinions, the test is exact at whatever moment the opinions choose.

Pure functions of measurements. The probe (`learning.rollout.deployment`) checks that vLLM serves the same policy.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np

from bot.config import GateConfig
from bot.memory.embedder import Embedder
from bot.types import Metrics
from learning.data.features import extract_features, ridge_influence
from learning.data.selection import cap_people
from learning.judging.error_budget import compute_next_level
from learning.judging.evaluation import Sample
from learning.judging.permutation import least_p_value, permutation_p_value, sign_flip_p_value
from learning.judging.statistics import CONFIDENCE, Interval, bootstrap, margin

if TYPE_CHECKING:
    from learning.data.experience import Experience

HEADROOM = 20  # a factor; with 10 to 100, simulated people needed the fewest reactions until a promotion
MOST_WANTED = 256  # judged answers; the forecast ends there
OWN_STRATUM = 4  # judged questions from which on a person's opinions are compared only with each other
ROUGH_LEVEL = 0.01  # precision level of a p-value that is only reported and decides nothing


@dataclass(frozen=True)
class HeldOutOpinions:
    """People's opinions on held-out answers, one row per answer.

    `signs` is +1 for a liked answer and -1 for a disliked one. `kinds` is the kind of its question. `units` identifies the
    question, because answers to one question are not independent. Opinions in the same of the `strata` are exchangeable.
    `weights` (in (0, 1]) is how much each opinion counts. Nobody is named, because a version's record keeps these rows.
    """

    signs: list[int]
    kinds: list[int]
    units: list[str]
    strata: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Gain:
    """Gain of the candidate's answers over the live version's, estimated from the held-out opinions.

    `counts` has a coefficient for each opinion. The gain is the sum of their products with the opinions, after the mean of
    each kind of question is subtracted; its unit is that of rewards, in [-1, 1]. `by_prompt` has the gain on each prompt;
    its mean is the same gain.
    """

    counts: list[float]
    by_prompt: list[float]


@dataclass(frozen=True, kw_only=True)
class Soundness:
    """The measurements of a candidate that do not depend on reactions.

    `kl` is in nats per sampled token of the candidate, to the base. `change` is the mean distance (nats) of its
    log-probabilities from its parent's; `rounding` is how far the served number format moves them.
    """

    kl: float
    well_formed: float
    base_well_formed: float
    change: float = math.inf
    rounding: float = 0.0
    is_no_change: bool = False


@dataclass(frozen=True)
class Evidence(Soundness):
    """Measurements of a candidate and the live version, on the same held-out answers and the same prompts.

    `live` and `candidate` are the mean log-probability per token (nats) of each answer of the `opinions`. `faults` are
    problems that were found before, in its training or its files.
    """

    opinions: HeldOutOpinions
    live: list[float]
    candidate: list[float]
    gain: Gain
    faults: list[str] = field(default_factory=list)


class VerdictMetrics(Metrics):
    """The figures behind a verdict.

    Margins and gains are None unless there are liked and disliked answers. Fields `*_by_chance` and `*_by_luck` are
    p-values; they are None if the opinions were too few to show anything.
    """

    held_out_liked: int = 0
    held_out_disliked: int = 0
    well_formed: float | None = None
    base_well_formed: float | None = None
    level: float | None = None  # significance level of this verdict
    margin_before: float | None = None
    margin_after: float | None = None
    margin_gain: float | None = None
    margin_gain_low: float | None = None
    margin_gain_high: float | None = None
    margin_gain_by_chance: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    gain_by_chance: float | None = None
    gain_by_luck: float | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate may go live, the reasons if it may not, and the figures.

    If only evidence is missing, `answers_wanted` estimates how many more judged answers are needed; otherwise it is 0.
    """

    passed: bool
    reasons: list[str]
    figures: VerdictMetrics
    answers_wanted: int = 0


def collect_opinions(rows: Sequence["Experience"], kinds: Sequence[int], person_cap: float) -> HeldOutOpinions:
    """Return people's opinions on held-out answers (n), whose questions are of these `kinds` (n,).

    A person who likes everything, or nothing, says nothing about a candidate, but would appear to if all their questions
    are alike. So a person's opinions on OWN_STRATUM questions or more are compared only with each other; all remaining
    opinions are compared together.
    """
    judges: list[tuple[str, ...]] = [row.opinion_holders if len(row.opinion_holders) == 1 else () for row in rows]
    questions = Counter(
        judge for judge, _ in {(judge, row.question_id) for judge, row in zip(judges, rows, strict=True)} if judge
    )
    often = {judge: number for number, judge in enumerate(sorted(questions), 1) if questions[judge] >= OWN_STRATUM}
    return HeldOutOpinions(
        signs=[1 if row.reward > 0 else -1 for row in rows],
        kinds=list(kinds),
        units=[row.question_id or row.unit for row in rows],
        strata=[often.get(judge, 0) for judge in judges],
        weights=cap_people([row.opinion_holders for row in rows], np.ones(len(rows)), person_cap).tolist(),
    )


def judge(evidence: Evidence, gate: GateConfig, seed: int, earlier: Sequence[bool] = (), headroom: float = 1.0) -> Verdict:
    """Judge a candidate by its evidence. Without enough evidence it does not pass.

    `earlier` are the verdicts that had enough evidence, oldest first: True for each that found its version better. A
    candidate that may wait is judged only when the opinions leave a `headroom` of HEADROOM.
    """
    reasons = list(evidence.faults)
    opinions = evidence.opinions
    liked, disliked = _count(opinions)
    level, allowed = compute_next_level(1 - gate.confidence, earlier), compute_allowed_p(gate, earlier)
    gains = _measure_gains(evidence, seed) if min(liked, disliked) >= 2 else None
    least = allowed / headroom
    p_values = compute_p_values(evidence, allowed, seed) if can_suffice(opinions, gate, least) else None
    if gains is None or p_values is None:
        reasons.append(explain_too_little(opinions, gate, least))
    elif not p_values.is_better:
        reasons.append(_explain_not_better(evidence, gains, p_values))
    if evidence.is_no_change:
        reasons.append(
            f"no change: log-probabilities differ from the parent's by {evidence.change:.4f} nats, the served number format "
            f"alone moves them by {evidence.rounding:.4f}; train again with more reactions"
        )
    if not evidence.kl <= gate.kl_budget:
        reasons.append(f"too far from the base: KL = {evidence.kl:.3f} nats per token, required ≤ {gate.kl_budget:g}")
    wanted = min(gate.well_formed, evidence.base_well_formed)
    if not evidence.well_formed >= wanted:
        reasons.append(f"too few well-formed answers: {evidence.well_formed:.0%}, required ≥ {wanted:.0%}")
    is_all = len(reasons) == 1 and p_values is None
    figures = VerdictMetrics(
        held_out_liked=liked,
        held_out_disliked=disliked,
        kl=evidence.kl,
        well_formed=evidence.well_formed,
        base_well_formed=evidence.base_well_formed,
        level=level,
        had_enough_evidence=p_values is not None,
        is_better=p_values is not None and p_values.is_better,
    )
    for found in (gains, p_values):
        figures = figures if found is None else figures | found.metrics
    return Verdict(not reasons, reasons, figures, count_wanted(opinions, gate, least) if is_all else 0)


def compute_allowed_p(gate: GateConfig, earlier: Sequence[bool]) -> float:
    """Return the largest p-value at which either test is significant, after the `earlier` verdicts."""
    return compute_next_level(1 - gate.confidence, earlier) / 2


def can_suffice(opinions: HeldOutOpinions, gate: GateConfig, allowed: float) -> bool:
    """Whether these opinions could give a p-value of at most `allowed` for any candidate."""
    return _are_enough(*_count(opinions), gate) and _least_p(opinions) <= allowed


def _count(opinions: HeldOutOpinions) -> tuple[int, int]:
    """Count the liked and the disliked answers."""
    liked = sum(sign > 0 for sign in opinions.signs)
    return liked, len(opinions.signs) - liked


def _are_enough(liked: int, disliked: int, gate: GateConfig) -> bool:
    return liked + disliked >= gate.min_held_out and min(liked, disliked) >= 2


def _least_p(opinions: HeldOutOpinions) -> float:
    return least_p_value(np.array(opinions.signs), opinions.units, opinions.strata)


def count_wanted(opinions: HeldOutOpinions, gate: GateConfig, allowed: float) -> int:
    """Estimate how many more judged answers are needed, if the share of likes stays the same."""
    liked, disliked = _count(opinions)
    now = liked + disliked
    share = (liked + 1) / (now + 2)
    for more in range(1, MOST_WANTED):
        likely = round(share * (now + more))
        if _are_enough(likely, now + more - likely, gate) and 1 / math.comb(now + more, likely) <= allowed:
            return more
    return MOST_WANTED


def select_newest_sufficient(
    rows: Sequence["Experience"], since: datetime | None, gate: GateConfig, allowed: float, person_cap: float
) -> list["Experience"]:
    """Return the rows whose feedback was all given at `since` or later, if those can suffice; otherwise all rows.

    Earlier feedback helped to choose the live version, so it is biased in its favour.
    """
    newer = [row for row in rows if since is not None and row.said_at >= since]
    is_enough = can_suffice(collect_opinions(newer, [0] * len(newer), person_cap), gate, allowed)
    return newer if is_enough else list(rows)


def compute_gain(
    judged: Sequence[str],
    opinions: HeldOutOpinions,
    before: Sequence[Sample],
    after: Sequence[Sample],
    embedder: Embedder | None,
) -> Gain:
    """Return the gain of the answers `after` over those `before` to the same prompts, from `opinions` on `judged` answers.

    It uses the direct method of off-policy evaluation (Dudík, Langford and Li, 2011, "Doubly Robust Policy Evaluation and
    Learning", arXiv:1103.4601): a ridge regression of the opinions on features of the judged answers predicts the worth of
    other answers. The prediction is linear in the opinions, so a permutation of them needs no second fit. Answers are
    compared only within a kind of question; otherwise a candidate would gain by the style of popular subjects. Features are
    clipped to the range of the judged answers, because nobody judged anything beyond it.
    """
    signs = subtract_kind_means(np.array(opinions.signs, dtype=float), opinions.kinds)
    if not before or not signs.any():
        return Gain([0.0] * len(signs), [0.0] * len({one.prompt_ids for one in before}))
    seen = extract_features(list(judged), embedder)
    low, high = seen.min(0), seen.max(0)
    old, new = (extract_features([one.text for one in answers], embedder).clip(low, high) for answers in (before, after))
    asked = {prompt: row for row, prompt in enumerate(dict.fromkeys(one.prompt_ids for one in before))}
    row_of = np.array([asked[one.prompt_ids] for one in before])
    moved = np.array([(new - old)[row_of == row].mean(0) for row in range(len(asked))])  # prompts × features
    by_opinion = moved @ ridge_influence(subtract_kind_means(seen, opinions.kinds), np.array(opinions.weights)).T
    return Gain(counts=by_opinion.mean(0).tolist(), by_prompt=(by_opinion @ signs).tolist())


def subtract_kind_means(values: np.ndarray, kinds: Sequence[int]) -> np.ndarray:
    """Return values (n × …) minus the mean of their kind (n,)."""
    found = np.array(values, dtype=float)
    for kind in np.unique(kinds):
        found[np.asarray(kinds) == kind] -= found[np.asarray(kinds) == kind].mean(0)
    return found


def margin_interval(values: np.ndarray, signs: np.ndarray, seed: int, weights: np.ndarray | None = None) -> Interval:
    """Return the margin of `values` with its bootstrap interval."""
    of = np.ones(len(values)) if weights is None else weights
    return bootstrap(lambda times: margin(values, signs, of * times), signs, CONFIDENCE, seed)


@dataclass(frozen=True)
class PValues:
    """The p-values of the margin and of the gain by permutation, and of the gain by sign flips (`by_luck`).

    `allowed` is the largest one that is significant.
    """

    by_margin: float
    by_gain: float
    by_luck: float
    allowed: float

    @property
    def is_better(self) -> bool:
        """Whether the p-values show that the candidate is better."""
        return min(self.by_margin, max(self.by_gain, self.by_luck)) <= self.allowed

    @property
    def metrics(self) -> VerdictMetrics:
        """The p-values as metrics of a version."""
        return VerdictMetrics(margin_gain_by_chance=self.by_margin, gain_by_chance=self.by_gain, gain_by_luck=self.by_luck)


@dataclass(frozen=True)
class Gains:
    """Both gains with their 95% intervals, and the margins before and after."""

    margin_before: float
    margin_after: float
    by_margin: Interval
    by_gain: Interval

    @property
    def metrics(self) -> VerdictMetrics:
        """The gains as metrics of a version."""
        return VerdictMetrics(
            margin_before=self.margin_before,
            margin_after=self.margin_after,
            margin_gain=self.by_margin.value,
            margin_gain_low=self.by_margin.low,
            margin_gain_high=self.by_margin.high,
            gain=self.by_gain.value,
            gain_low=self.by_gain.low,
            gain_high=self.by_gain.high,
        )


def compute_p_values(evidence: Evidence, allowed: float, seed: int) -> PValues:
    """Test the margin and the gain on the held-out opinions."""
    opinions, gain = evidence.opinions, evidence.gain
    signs, of = np.array(opinions.signs), (opinions.units, opinions.strata)
    likelier = subtract_kind_means(np.subtract(evidence.candidate, evidence.live), opinions.kinds)
    likelier *= np.array(opinions.weights)
    by_margin = permutation_p_value(likelier, signs, *of, seed, allowed)
    by_gain = permutation_p_value(np.array(gain.counts), signs, *of, seed, allowed)
    at = allowed if by_gain <= allowed else ROUGH_LEVEL
    return PValues(by_margin, by_gain, sign_flip_p_value(np.array(gain.by_prompt), seed, at), allowed)


def _measure_gains(evidence: Evidence, seed: int) -> Gains:
    live, candidate, counts = np.array(evidence.live), np.array(evidence.candidate), np.array(evidence.gain.counts)
    opinions = evidence.opinions
    signs, weights = np.array(opinions.signs), np.array(opinions.weights)
    worth = counts * subtract_kind_means(signs, opinions.kinds)
    return Gains(
        margin_before=float(margin(live, signs, weights)),
        margin_after=float(margin(candidate, signs, weights)),
        by_margin=margin_interval(candidate - live, signs, seed, weights),
        by_gain=bootstrap(lambda times: times @ worth, signs, CONFIDENCE, seed),
    )


def explain_too_little(opinions: HeldOutOpinions, gate: GateConfig, allowed: float) -> str:
    """Return why opinions cannot give a p-value of at most `allowed`, and how many would."""
    liked, disliked = _count(opinions)
    said = f"too little evidence: {liked} liked and {disliked} disliked held-out answers"
    if not _are_enough(liked, disliked, gate):
        return f"{said}, required ≥ {gate.min_held_out} with at least two of each kind"
    each = next(count for count in range(2, 64) if 1 / math.comb(2 * count, count) <= allowed)
    return (
        f"{said}, best possible p = {_least_p(opinions):.2g}, required ≤ {allowed:.2g}; {each} of each kind are enough, or "
        "a few more if one person judged most of them"
    )


def _explain_not_better(evidence: Evidence, gains: Gains, p_values: PValues) -> str:
    allowed, (gain, low, high) = p_values.allowed, gains.by_gain
    prompts = len(evidence.gain.by_prompt)
    too_few = f"; {prompts} different prompts are too few for the sign-flip test" if 2.0**-prompts > allowed else ""
    return (
        f"not shown to be better: reward gain {gain:+.3f}, 95% interval {low:+.3f} to {high:+.3f} "
        f"(permutation test: p = {p_values.by_gain:.2g}, sign-flip test: p = {p_values.by_luck:.2g}); "
        f"margin gain {gains.by_margin.value:+.4f} nats per token (permutation test: p = {p_values.by_margin:.2g}); "
        f"required p ≤ {allowed:.2g}{too_few}"
    )
