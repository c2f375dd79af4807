"""Selection: choose the experiences that a run learns from, their weights and their order. Pure functions.

Each function that leaves something out returns the counts by reason. Embeddings are passed in.
"""

import hashlib
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bot.config import TrainingConfig
from learning.data.rewards import advantages

if TYPE_CHECKING:
    from bot.memory.embedder import Embedder
    from learning.data.experience import Experience

DUPLICATE_SIMILARITY = 0.97  # cosine similarity of question and answer from which on two turns are duplicates
TURNS_PER_KIND = 24  # mean number of turns in one kind of prompt
KINDS = 16  # maximum number of kinds

Kept = tuple[list["Experience"], Counter[str]]


def is_held_out(key: str, share: float) -> bool:
    """Whether everything with this key is held out. The key alone decides, so the answer never changes."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64 < share


def question_key(text: str) -> str:
    """Return the key that a question is held out by: its words, so that the same words are never on both sides."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def split_held_out(found: Sequence["Experience"], share: float) -> tuple[list["Experience"], list["Experience"]]:
    """Split experiences into those for training and the share that is held out."""
    training: list[Experience] = []
    held_out: list[Experience] = []
    for one in found:
        (held_out if is_held_out(one.unit, share) else training).append(one)
    return training, held_out


def draw_fresh_and_old(found: Sequence["Experience"], limit: int, fresh: float) -> Kept:
    """Return at most `limit` experiences, oldest first: a share `fresh` of the newest, and the rest drawn from the older.

    The draw depends on the ids alone, so that the next run draws the same ones again as far as there is room.
    """
    if len(found) <= limit:
        return list(found), Counter()
    newest = count_fresh(limit, fresh)
    older = sorted(range(len(found) - newest), key=lambda row: draw_order_key(found[row].turn_id))
    rows = sorted(older[: limit - newest]) + list(range(len(found) - newest, len(found)))
    return [found[row] for row in rows], Counter({explain_not_drawn(limit): len(found) - limit})


def count_fresh(limit: int, fresh: float) -> int:
    """Return how many of `limit` experiences are taken from the newest."""
    return max(1, round(limit * fresh))


def draw_order_key(turn_id: str) -> bytes:
    """Return the sort key of older turns; the first ones in this order are drawn."""
    return hashlib.sha256(turn_id.encode()).digest()


def explain_not_drawn(limit: int) -> str:
    """Return the reason for turns that are left out because there are too many."""
    return f"not drawn: there are more than {limit} turns (learning.max_turns)"


def drop_near_duplicates(found: Sequence["Experience"], vectors: np.ndarray) -> Kept:
    """Keep only the newest of a person's near-duplicate turns with the same outcome.

    `vectors` (n × dimensions, unit length) are the embeddings of each question with its answer.
    """
    kept: list[int] = []
    of_person: dict[tuple, list[int]] = defaultdict(list)
    for row in reversed(range(len(found))):
        one = found[row]
        same = of_person[one.asker, one.reward > 0, one.logprobs is None, one.rejected_ids is None]
        if not same or float((vectors[same] @ vectors[row]).max()) < DUPLICATE_SIMILARITY:
            same.append(row)
            kept.append(row)
    reason = "near-duplicate of a newer turn of the same person, with the same outcome"
    return [found[row] for row in reversed(kept)], Counter(
        {reason: len(found) - len(kept)} if len(kept) < len(found) else {}
    )


def cluster_questions(questions: Sequence[str], embedder: "Embedder | None", seed: int) -> np.ndarray:
    """Return the kind of each question (n,): its k-means cluster by embedding. Without an embedder there is one kind."""
    from sklearn.cluster import KMeans

    count = min(KINDS, len(questions) // TURNS_PER_KIND)
    if embedder is None or count < 2:
        return np.zeros(len(questions), int)
    return KMeans(count, n_init=1, random_state=seed).fit_predict(embedder.encode(questions))


def assign_advantages(
    found: Sequence["Experience"],
    kind_of: np.ndarray,
    prior: float,
    cap: float,
    smooth: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> list["Experience"]:
    """Return the experiences with advantages, and with weights that cap each person's share at `cap`.

    `kind_of` (n,) is the kind of each prompt. `smooth` maps advantages (n,) and weights (n,) to other advantages (n,).
    """
    worth = advantages(np.array([one.reward for one in found]), kind_of, prior)
    opinions = [one.opinion_holders for one in found]
    if smooth is not None:
        worth = smooth(worth, cap_people(opinions, np.ones(len(found)), cap))
    weights = cap_people(opinions, np.abs(worth), cap)
    return [
        replace(one, advantage=float(value), weight=float(weight))
        for one, value, weight in zip(found, worth, weights, strict=True)
    ]


def cap_people(opinions: Sequence[tuple[str, ...]], worth: np.ndarray, cap: float) -> np.ndarray:
    """Return a weight in (0, 1] for each turn (n,), so that no person has more than a share `cap` of the total `worth`.

    `opinions` names the people behind each turn's reward; they share it evenly. With fewer than 1/cap people nobody is
    limited, because the cap cannot hold. If one person spoke wherever others did, the cap is approached as far as possible.
    The largest weight is 1.
    """
    weights = np.ones(len(worth))
    people = sorted({person for those in opinions for person in those})
    if len(people) < math.ceil(1 / cap):
        return weights
    shares = np.zeros((len(people), len(worth)))
    rows = {person: row for row, person in enumerate(people)}
    for turn, those in enumerate(opinions):
        for person in those:
            shares[rows[person], turn] += worth[turn] / len(those)
    for _ in range(100):  # limiting one person raises the others' shares, so more people may have to be limited
        given = shares @ weights
        over = given > cap * given.sum() * (1 + 1e-6)
        if not over.any():
            break
        most = int(np.argmax(given))
        rest = given.sum() - given[most]
        factor = max(rest * cap / (1 - cap) / given[most], 1e-6)
        weights[shares[most] > 0] *= min(factor, 1.0)
        weights /= weights.max()
    return weights


def select_usable(found: Sequence["Experience"], objective: str) -> list["Experience"]:
    """Return the experiences that an objective can learn from."""
    match objective:
        case "dpo":
            return [one for one in found if one.rejected_ids is not None]
        case "sft":
            return [one for one in found if one.advantage > 0]
        case "pg":
            return [one for one in found if one.advantage and (one.logprobs is not None or one.advantage > 0)]
        case _:
            return [one for one in found if one.advantage]


def select_for_training(found: Sequence["Experience"], training: TrainingConfig, seed: int) -> Kept:
    """Return the experiences (oldest first) that a run trains on: those that its objective can use, and of those the
    newest if it has too few steps for all.

    TRL's DPO has no weights, so rows are drawn in proportion to their weights, as many as the weights add up to.
    """
    usable = select_usable(found, training.objective)
    most = training.max_steps * training.batch_size
    reasons = {f"not usable with training.objective '{training.objective}'": len(found) - len(usable)}
    if training.objective == "dpo":
        begun = random.Random(seed).random() + np.cumsum([0.0, *(one.weight for one in usable)])
        drawn = [one for one, is_next in zip(usable, np.diff(np.floor(begun)), strict=True) if is_next]
        reasons["not drawn: lower weight, which 'dpo' can only apply by drawing"] = len(usable) - len(drawn)
        usable = drawn
    reasons[f"more than {most} answers (training.max_steps times training.batch_size)"] = max(0, len(usable) - most)
    return usable[-most:], Counter({reason: count for reason, count in reasons.items() if count})


def draw_batches(count: int, batch: int, steps: int, rng: random.Random) -> list[int]:
    """Draw row numbers (of `count` rows) for all batches, one batch after the other.

    Each epoch has every row once, in a new random order. If an epoch ends inside a batch, rows that the batch does not have
    yet come first. So no row is twice in a batch, unless there are fewer rows than a batch needs.
    """
    order: list[int] = []
    due: list[int] = []
    while len(order) < steps * batch:
        if len(due) < batch:
            due += sorted(rng.sample(range(count), count), key=set(due).__contains__)
        order += due[:batch]
        del due[:batch]
    return order[: steps * batch]


def group_by_length(order: Sequence[int], lengths: Sequence[int], batch: int) -> list[int]:
    """Reorder row numbers so that each batch has rows of similar length (`lengths`, one per row).

    Rows are sorted within each quarter of an epoch, the longest first, so that memory runs out at once or not at all.
    """
    window = batch * max(1, len(lengths) // (4 * batch))
    parts = (order[start : start + window] for start in range(0, len(order), window))
    return [row for part in parts for row in sorted(part, key=lambda row: -lengths[row])]
