"""The gate: is a candidate sound, safe and better than the live version? A Verdict with its reasons.

Better is what the held-out opinions say, those that no run learned from, and there are two ways to ask them. Margin: do the
answers that were liked become likelier than those that were not? Where answers are long, chance is louder there than taste.
Gain: are the candidate's own answers more like those that were liked (`gain_of`)? One of the two must not be luck, and each
may be with half the probability that `gate.confidence` leaves. Pure functions of what was measured; whether vLLM serves the
same policy is the probe's question, in `learning.deployment`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import permutation_test

from bot.config import GateConfig
from bot.embeddings import Embedder
from learning.evaluation import CONFIDENCE, Sample, bootstrap
from learning.features import features, ridge

DRAWS = 4000  # at random, where there are more ways than that


@dataclass(frozen=True)
class Gain:
    """What the candidate's answers gain over the live version's, by the held-out opinions.

    `counts` (one for each opinion) is how much each counts: the sum of their products with the opinions, less what is usual
    for such a question, is the gain, in units of rewards, which go from -1 to 1. `by_prompt` (one for each prompt) is the
    gain on each; its mean is the same.
    """

    counts: list[float]
    by_prompt: list[float]


@dataclass(frozen=True)
class Evidence:
    """What was measured of a candidate against the live version, on the same held-out answers and the same prompts.

    `signs` is +1 for an answer that was liked and -1 for one that was not, `kinds` the kind of its question; `live` and
    `candidate` are its mean log-probability for each token (nats). `kl` is nats for each sampled token of the candidate,
    against the base.
    `faults` are what is wrong already: with its training, with its files.
    `change` is how far its log-probabilities are from its parent's, `rounding` how far the served number format moves them
    (mean, nats).
    """

    conversations: list[str]
    signs: list[int]
    kinds: list[int]
    live: list[float]
    candidate: list[float]
    gain: Gain
    kl: float
    well_formed: float
    base_well_formed: float
    faults: list[str] = field(default_factory=list)
    change: float = math.inf
    rounding: float = 0.0
    is_no_change: bool = False


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate may go live, why not, and the figures behind it."""

    passed: bool
    reasons: list[str]
    figures: dict[str, Any]


def judge(evidence: Evidence, gate: GateConfig, seed: int) -> Verdict:
    """Weigh the evidence: no evidence, no promotion."""
    reasons = list(evidence.faults)
    signs = np.array(evidence.signs)
    liked, disliked = int((signs > 0).sum()), int((signs < 0).sum())
    figures: dict[str, Any] = {"held_out_liked": liked, "held_out_disliked": disliked, "kl": evidence.kl}
    figures |= {"well_formed": evidence.well_formed, "base_well_formed": evidence.base_well_formed}
    if liked + disliked < gate.min_held_out or min(liked, disliked) < 2:
        reasons.append(
            f"too little evidence: {liked} liked and {disliked} disliked answers are held out; "
            f"{gate.min_held_out} are needed, two at least of each kind"
        )
    else:
        figures |= _shown(evidence, signs, seed)
        allowed = (1 - gate.confidence) / 2
        by_margin = figures["margin_gain"] > 0 and figures["margin_gain_by_chance"] <= allowed
        by_gain = figures["gain"] > 0 and max(figures["gain_by_chance"], figures["gain_by_luck"]) <= allowed
        if not by_margin and not by_gain:
            reasons.append(_not_shown(figures, liked, disliked, len(evidence.gain.by_prompt), allowed))
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
    return Verdict(passed=not reasons, reasons=reasons, figures=figures)


def gain_of(
    judged: Sequence[str],
    signs: Sequence[int],
    kinds: Sequence[int],
    before: Sequence[Sample],
    after: Sequence[Sample],
    embedder: Embedder | None,
) -> Gain:
    """What the answers `after` gain over those `before` to the same prompts, by opinions (±1) on other, `judged` answers.

    The direct method of off-policy evaluation (Dudík, Langford and Li, 2011, "Doubly Robust Policy Evaluation and Learning",
    arXiv:1103.4601): a ridge regression of the opinions on features of the judged answers says what other answers are worth.
    It is linear in the opinions, so the gain is a sum of what each of them counts, and needs no second fit for a permutation
    of them. Answers are compared with others to the same kind of question alone: or a candidate would gain by speaking as
    one speaks of what people like to speak of. Features beyond those of all judged answers are cut: what nobody saw,
    nobody judged.
    """
    opinions = less_usual(np.array(signs, dtype=float), kinds)
    if not before or not opinions.any():
        return Gain([0.0] * len(opinions), [0.0] * len({one.prompt_ids for one in before}))
    seen = features(list(judged), embedder)
    low, high = seen.min(0), seen.max(0)
    old, new = (features([one.text for one in answers], embedder).clip(low, high) for answers in (before, after))
    asked = {prompt: row for row, prompt in enumerate(dict.fromkeys(one.prompt_ids for one in before))}
    row_of = np.array([asked[one.prompt_ids] for one in before])
    moved = np.array([(new - old)[row_of == row].mean(0) for row in range(len(asked))])  # prompts × features
    by_opinion = moved @ ridge(less_usual(seen, kinds)).T
    return Gain(counts=by_opinion.mean(0).tolist(), by_prompt=(by_opinion @ opinions).tolist())


def less_usual(values: np.ndarray, kinds: Sequence[int]) -> np.ndarray:
    """Values (n × …) less the mean of those of the same kind (n,)."""
    found = np.array(values, dtype=float)
    for kind in np.unique(kinds):
        found[np.asarray(kinds) == kind] -= found[np.asarray(kinds) == kind].mean(0)
    return found


def margin(values: np.ndarray, signs: np.ndarray) -> float:
    """Mean of `values` over liked answers less that over disliked ones."""
    return float(values[signs > 0].mean() - values[signs < 0].mean())


def margin_interval(values: np.ndarray, signs: np.ndarray, seed: int) -> tuple[float, float, float]:
    """The margin of `values` with its bootstrap interval."""
    return bootstrap(lambda pick: margin(values[pick], signs[pick]), signs, CONFIDENCE, seed)


def by_chance(values: np.ndarray, signs: np.ndarray, kinds: Sequence[int], seed: int) -> float:
    """How often the same opinions, given at random to answers to the same kind of question, would have as large a sum of
    products with `values` (one-sided). Within a kind that is their margin.

    A permutation test (Fisher, 1935, "The Design of Experiments"): exact however few answers there are, where a bootstrap
    interval of so few is too narrow. With several kinds it is drawn.
    """
    if len(set(kinds)) > 1:
        rng, of = np.random.default_rng(seed), np.asarray(kinds)
        drawn = np.zeros(DRAWS)
        for kind in np.unique(of):
            drawn += rng.permuted(np.tile(signs[of == kind], (DRAWS, 1)), axis=1) @ values[of == kind]
        return float((1 + (drawn >= signs @ values - 1e-9).sum()) / (1 + DRAWS))
    found = permutation_test(
        (values[signs > 0], values[signs < 0]),
        lambda liked, disliked, axis: liked.mean(axis) - disliked.mean(axis),
        vectorized=True,
        alternative="greater",
        n_resamples=DRAWS,
        rng=seed,
    )
    return float(found.pvalue)


def by_luck(gained: Sequence[float], seed: int) -> float:
    """How often the mean of gains (one for each prompt) would be as large if each had either sign as likely (one-sided)."""
    if len(gained) < 2:
        return 1.0
    found = permutation_test(
        (np.array(gained),),
        lambda rows, axis: rows.mean(axis),
        permutation_type="samples",
        vectorized=True,
        alternative="greater",
        n_resamples=DRAWS,
        rng=seed,
    )
    return float(found.pvalue)


def _shown(evidence: Evidence, signs: np.ndarray, seed: int) -> dict[str, float]:
    """Both ways to ask the held-out opinions, with what chance and luck would give."""
    live, candidate = np.array(evidence.live), np.array(evidence.candidate)
    counts, kinds = np.array(evidence.gain.counts), evidence.kinds
    worth = counts * less_usual(signs, kinds)
    found = {"margin_before": margin(live, signs), "margin_after": margin(candidate, signs)}
    for name, values, (value, low, high) in (
        ("margin_gain", candidate - live, margin_interval(candidate - live, signs, seed)),
        ("gain", counts, bootstrap(lambda pick: float(worth[pick].sum()), signs, CONFIDENCE, seed)),
    ):
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
        found[f"{name}_by_chance"] = by_chance(values, signs, kinds, seed)
    return found | {"gain_by_luck": by_luck(evidence.gain.by_prompt, seed)}


def _not_shown(found: dict[str, Any], liked: int, disliked: int, prompts: int, allowed: float) -> str:
    least = 1 / math.comb(liked + disliked, liked)
    too_few = f"; {prompts} different prompts are too few to tell its answers from luck" if 2.0**-prompts > allowed else ""
    if least > allowed:
        return (
            f"too little evidence: of {liked} liked and {disliked} disliked held-out answers opinions at random show as "
            f"much as any could in {least:.2%} of all cases, {allowed:.2%} may; more reactions are needed, of both kinds"
        )
    return (
        f"not shown to be better: by the held-out opinions its answers gain {found['gain']:+.3f} of a reward, 95% interval "
        f"{found['gain_low']:+.3f} to {found['gain_high']:+.3f} (opinions at random give as much in "
        f"{found['gain_by_chance']:.1%} of all cases, answers by luck in {found['gain_by_luck']:.1%}); liked over disliked "
        f"gains {found['margin_gain']:+.4f} nats a token (at random in {found['margin_gain_by_chance']:.1%}); "
        f"{allowed:.1%} may{too_few}"
    )
