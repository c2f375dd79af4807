"""The gate: is a candidate sound, safe and better than the live version? A Verdict with its reasons.

Better is what the held-out opinions say, those that no run learned from, and there are two ways to ask them. Margin: do the
answers that were liked become likelier than those that were not? In long answers chance is louder than taste. Gain: are the
candidate's own answers more like those that were liked (`compute_gain`)? One of the two must not be luck, and each has half
of the level that `learning.judging.error_budget` leaves to this verdict. Nobody's opinions count for more than
`rewards.person_cap`.

When to judge is decided by the opinions alone, never by what a candidate makes of them: or waiting for more would be
stopping at the luckiest moment. What n opinions can show at best, one in as many as there are ways to exchange them (1 / (n
choose k) where k are liked), must be ROOM times below what the verdict requires. At its limit a perfect candidate alone
would pass: five of each kind give p = 1/252 = 0.004, enough for the first verdict (p ≤ 0.0086), and two people of ten who
slip would fail any candidate. A candidate that may wait is therefore judged once, from seven of each kind on (1/3432), and
looks before that spend nothing. Where values are exchangeable given the opinions, the test is exact at whatever moment the
opinions choose.  Pure functions of what was measured; whether vLLM serves the same policy is the probe's question, in
`learning.rollout.deployment`.
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
from learning.judging.statistics import CONFIDENCE, Interval, bootstrap

if TYPE_CHECKING:
    from learning.data.experience import Experience

HEADROOM = 20  # times: simulated people needed the fewest reactions until a promotion with 10 to 100
MOST_WANTED = 256  # judged answers: more are not foreseen
OWN_STRATUM = 4  # questions that one person judged, from which on they are compared with each other alone
ROUGH_LEVEL = 0.01  # the level at which a p-value is precise that decides nothing, and is told to people alone


@dataclass(frozen=True)
class HeldOutOpinions:
    """What people said about held-out answers: a row for each answer.

    `signs` is +1 for an answer that was liked and -1 for one that was not, `kinds` the kind of its question, `units` what
    was asked (the answers to one question are not independent), `strata` within which opinions are exchangeable, `weights`
    (in (0, 1]) how much each opinion counts. They name nobody: a version's record keeps them.
    """

    signs: list[int]
    kinds: list[int]
    units: list[str]
    strata: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Gain:
    """What the candidate's answers gain over the live version's, by the held-out opinions.

    `counts` (one for each opinion) is how much each counts: the sum of their products with the opinions, less what is usual
    for such a question, is the gain, in units of rewards, which go from -1 to 1. `by_prompt` (one for each prompt) is the
    gain on each; its mean is the same.
    """

    counts: list[float]
    by_prompt: list[float]


@dataclass(frozen=True, kw_only=True)
class Soundness:
    """What a run measured of its candidate, and no reaction changes.

    `kl` is nats for each sampled token of the candidate, against the base. `change` is how far its log-probabilities are
    from its parent's, `rounding` how far the served number format moves them (mean, nats).
    """

    kl: float
    well_formed: float
    base_well_formed: float
    change: float = math.inf
    rounding: float = 0.0
    is_no_change: bool = False


@dataclass(frozen=True)
class Evidence(Soundness):
    """What was measured of a candidate against the live version, on the same held-out answers and the same prompts.

    `live` and `candidate` are the mean log-probability for each token (nats) of each answer of the `opinions`. `faults` are
    what is wrong already: with its training, with its files.
    """

    opinions: HeldOutOpinions
    live: list[float]
    candidate: list[float]
    gain: Gain
    faults: list[str] = field(default_factory=list)


class VerdictMetrics(Metrics):
    """The figures behind a verdict. Gains, and the margins that they are of, are None where there is no answer of each kind;
    what is `by_chance` or `by_luck` is a p-value, and None where the opinions could show nothing.
    """

    held_out_liked: int = 0
    held_out_disliked: int = 0
    well_formed: float | None = None
    base_well_formed: float | None = None
    level: float | None = None  # of significance, that was left to this verdict
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
    """Whether a candidate may go live, why not, and the figures behind it.

    `wanted` is about how many more judged answers it takes to tell, where nothing but evidence is missing; 0 otherwise.
    """

    passed: bool
    reasons: list[str]
    figures: VerdictMetrics
    answers_wanted: int = 0


def collect_opinions(rows: Sequence["Experience"], kinds: Sequence[int], person_cap: float) -> HeldOutOpinions:
    """Return what people said about held-out answers (n), whose questions are of these `kinds` (n,).

    Somebody who likes everything, or nothing, says nothing of a candidate, and would seem to where all that they ask is
    alike. So the opinions of one person on at least OWN_STRATUM questions are compared with each other, and all others with
    all others.
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


def judge(evidence: Evidence, gate: GateConfig, seed: int, earlier: Sequence[bool] = (), may_wait: bool = False) -> Verdict:
    """Weigh the evidence: no evidence, no promotion.

    `earlier` are the verdicts that had enough evidence, oldest first: True for each that found its version better. A
    candidate that `may_wait` is not judged before there is room for it to show anything.
    """
    reasons = list(evidence.faults)
    opinions = evidence.opinions
    liked, disliked = _count(opinions)
    level, allowed = compute_next_level(1 - gate.confidence, earlier), compute_allowed_p(gate, earlier)
    gains = _measure_gains(evidence, seed) if min(liked, disliked) >= 2 else None
    least = allowed / HEADROOM if may_wait else allowed
    p_values = compute_p_values(evidence, allowed, seed) if can_suffice(opinions, gate, least) else None
    if gains is None or p_values is None:
        reasons.append(explain_too_little(opinions, gate, least))
    elif not p_values.is_better:
        reasons.append(_explain_not_better(evidence, gains, p_values))
    if evidence.is_no_change:
        reasons.append(
            f"no change: log-probabilities are {evidence.change:.4f} nats from its parent's, and the number format that is "
            f"served moves them by {evidence.rounding:.4f}; more reactions will tell them apart"
        )
    if not evidence.kl <= gate.kl_budget:
        reasons.append(f"too far from the base: KL {evidence.kl:.3f} nats a token, budget {gate.kl_budget:g}")
    wanted = min(gate.well_formed, evidence.base_well_formed)
    if not evidence.well_formed >= wanted:
        reasons.append(f"answers break: {evidence.well_formed:.0%} well-formed, {wanted:.0%} wanted")
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
    """Return the p-value that either way of asking may have at most, after the `earlier` verdicts."""
    return compute_next_level(1 - gate.confidence, earlier) / 2


def can_suffice(opinions: HeldOutOpinions, gate: GateConfig, allowed: float) -> bool:
    """Whether these opinions could show anything at the `allowed` level, whatever a candidate does to their answers."""
    return _are_enough(*_count(opinions), gate) and _least_p(opinions) <= allowed


def _count(opinions: HeldOutOpinions) -> tuple[int, int]:
    """Count the answers that were liked and those that were not."""
    liked = sum(sign > 0 for sign in opinions.signs)
    return liked, len(opinions.signs) - liked


def _are_enough(liked: int, disliked: int, gate: GateConfig) -> bool:
    return liked + disliked >= gate.min_held_out and min(liked, disliked) >= 2


def _least_p(opinions: HeldOutOpinions) -> float:
    return least_p_value(np.array(opinions.signs), opinions.units, opinions.strata)


def count_wanted(opinions: HeldOutOpinions, gate: GateConfig, allowed: float) -> int:
    """Return about how many more judged answers it takes until they can suffice, if as many are liked as so far."""
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
    """Return the rows on which all was said `since`, where those can suffice; otherwise all.

    What was said before helped to choose the version that is live now, and flatters it.
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
    """Return what the answers `after` gain over those `before` to the same prompts, by `opinions` on `judged` answers.

    The direct method of off-policy evaluation (Dudík, Langford and Li, 2011, "Doubly Robust Policy Evaluation and Learning",
    arXiv:1103.4601): a ridge regression of the opinions on features of the judged answers says what other answers are worth.
    It is linear in the opinions, so the gain is a sum of what each of them counts, and needs no second fit for a permutation
    of them. Answers are compared with others to the same kind of question alone: or a candidate would gain by speaking as
    one speaks of what people like to speak of. Features beyond those of all judged answers are cut: what nobody saw,
    nobody judged.
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
    """Return values (n × …) less the mean of those of the same kind (n,)."""
    found = np.array(values, dtype=float)
    for kind in np.unique(kinds):
        found[np.asarray(kinds) == kind] -= found[np.asarray(kinds) == kind].mean(0)
    return found


def margin(values: np.ndarray, signs: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the mean of `values` over liked answers less that over disliked ones; all of them (n,)."""
    weights = np.ones(len(values)) if weights is None else weights
    liked, disliked = signs > 0, signs < 0
    return float(np.average(values[liked], weights=weights[liked]) - np.average(values[disliked], weights=weights[disliked]))


def margin_interval(values: np.ndarray, signs: np.ndarray, seed: int, weights: np.ndarray | None = None) -> Interval:
    """Return the margin of `values` with its bootstrap interval."""
    of = np.ones(len(values)) if weights is None else weights
    return bootstrap(lambda pick: margin(values[pick], signs[pick], of[pick]), signs, CONFIDENCE, seed)


@dataclass(frozen=True)
class PValues:
    """How often chance does as well, in both ways of asking, and `by_luck` of the answers; what is `allowed` of each."""

    by_margin: float
    by_gain: float
    by_luck: float
    allowed: float

    @property
    def is_better(self) -> bool:
        """Whether they show that the candidate is better."""
        return min(self.by_margin, max(self.by_gain, self.by_luck)) <= self.allowed

    @property
    def metrics(self) -> VerdictMetrics:
        """The same, for the record of a version."""
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
        """The same, for the record of a version."""
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
    """Ask the held-out opinions in both ways."""
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
        margin_before=margin(live, signs, weights),
        margin_after=margin(candidate, signs, weights),
        by_margin=margin_interval(candidate - live, signs, seed, weights),
        by_gain=bootstrap(lambda pick: float(worth[pick].sum()), signs, CONFIDENCE, seed),
    )


def explain_too_little(opinions: HeldOutOpinions, gate: GateConfig, allowed: float) -> str:
    """Say why opinions could show nothing at the `allowed` level, and how many could."""
    liked, disliked = _count(opinions)
    said = f"too little evidence: {liked} liked and {disliked} disliked answers are held out"
    if not _are_enough(liked, disliked, gate):
        return f"{said}; {gate.min_held_out} are needed, two at least of each kind"
    each = next(count for count in range(2, 64) if 1 / math.comb(2 * count, count) <= allowed)
    return (
        f"{said}, which give p = {_least_p(opinions):.2g} at best, required p ≤ {allowed:.2g}; {each} of each would do, or "
        "a few more where one person judged most"
    )


def _explain_not_better(evidence: Evidence, gains: Gains, p_values: PValues) -> str:
    allowed, (gain, low, high) = p_values.allowed, gains.by_gain
    prompts = len(evidence.gain.by_prompt)
    too_few = f"; {prompts} different prompts are too few to tell its answers from luck" if 2.0**-prompts > allowed else ""
    return (
        f"not shown to be better: by the held-out opinions its answers gain {gain:+.3f} of a reward, 95% interval "
        f"{low:+.3f} to {high:+.3f} (permutation test p = {p_values.by_gain:.2g}, "
        f"sign-flip test p = {p_values.by_luck:.2g}); liked over disliked gains {gains.by_margin.value:+.4f} nats a "
        f"token (permutation test p = {p_values.by_margin:.2g}); required p ≤ {allowed:.2g}{too_few}"
    )
