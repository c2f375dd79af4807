"""Selection: which experiences one run learns from, how much each counts, and in which order. Pure functions.

Whatever is left out is left out under a reason. It knows no database and no model; vectors of meanings are given.
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

DUPLICATE_SIMILARITY = 0.97  # cosine similarity of question and answer from which two turns are the same thing said twice
TURNS_PER_KIND = 24  # turns, on average, in one kind of prompt
KINDS = 16  # at most

Kept = tuple[list["Experience"], Counter[str]]


def is_held_out(key: str, share: float) -> bool:
    """Whether all that has this key is kept for the gate: decided by the key alone, so for ever."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64 < share


def question_key(text: str) -> str:
    """Return what a question is held out by: its letters and digits, so that the same words are never on both sides."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def split_held_out(found: Sequence["Experience"], share: float) -> tuple[list["Experience"], list["Experience"]]:
    """What is for training, and the share that is held out."""
    training: list[Experience] = []
    held_out: list[Experience] = []
    for one in found:
        (held_out if is_held_out(one.unit, share) else training).append(one)
    return training, held_out


def draw_fresh_and_old(found: Sequence["Experience"], limit: int, fresh: float) -> Kept:
    """At most `limit` experiences (oldest first): a share of them the newest, the rest drawn from all that is older.

    The draw goes by id, so that a run that follows draws the same ones again, as far as there is room.
    """
    if len(found) <= limit:
        return list(found), Counter()
    newest = count_fresh(limit, fresh)
    older = sorted(range(len(found) - newest), key=lambda row: draw_order_key(found[row].turn_id))
    rows = sorted(older[: limit - newest]) + list(range(len(found) - newest, len(found)))
    return [found[row] for row in rows], Counter({explain_not_drawn(limit): len(found) - limit})


def count_fresh(limit: int, fresh: float) -> int:
    """How many of `limit` experiences are the newest."""
    return max(1, round(limit * fresh))


def draw_order_key(turn_id: str) -> bytes:
    """What the older turns are sorted by, of which the first are drawn."""
    return hashlib.sha256(turn_id.encode()).digest()


def explain_not_drawn(limit: int) -> str:
    """The reason why a turn is left out that is one of too many."""
    return f"more than {limit} turns (learning.max_turns): not drawn from the older ones"


def drop_near_duplicates(found: Sequence["Experience"], vectors: np.ndarray) -> Kept:
    """Of what one person asked and was answered again and again, with the same reward, only the newest.

    `vectors` (n × dimensions, unit length) are those of each question with its answer.
    """
    kept: list[int] = []
    of_person: dict[tuple, list[int]] = defaultdict(list)
    for row in reversed(range(len(found))):
        one = found[row]
        same = of_person[one.asker, one.reward > 0, one.logprobs is None, one.rejected_ids is None]
        if not same or float((vectors[same] @ vectors[row]).max()) < DUPLICATE_SIMILARITY:
            same.append(row)
            kept.append(row)
    reason = "said before by the same person, with the same outcome"
    return [found[row] for row in reversed(kept)], Counter(
        {reason: len(found) - len(kept)} if len(kept) < len(found) else {}
    )


def cluster_questions(questions: Sequence[str], embedder: "Embedder | None", seed: int) -> np.ndarray:
    """The kind of each prompt (n,): clusters of the questions' embeddings by k-means; one kind without an embedder."""
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
    """The experiences (oldest first) with their advantages, and with less weight for those of somebody who says more than
    their share. `smooth` makes other advantages (n,) of those and the weights (n,).
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
    """A weight in (0, 1] for each turn (n,), so that nobody's opinions make up more than a share `cap` of all that counts.

    `opinions` names whose opinions each turn's reward is made of, who share it evenly. Where there are fewer than 1/cap
    people nobody is limited: there is nobody to be outvoted. Where the cap cannot be kept, since somebody spoke wherever
    others did, it is kept as far as it can be. The largest weight is 1.
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
    for _ in range(100):  # who is limited makes the others' share larger, and some of them come to be limited too
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
    """The experiences that an objective can learn from."""
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
    """Which of the experiences (oldest first) a run reads: those that its objective can use, and of those the newest, where
    its steps are too few to read them all.

    TRL's DPO has no weights: there whoever counts less is drawn less often, so many in all as the weights add up to.
    """
    usable = select_usable(found, training.objective)
    most = training.max_steps * training.batch_size
    reasons = {f"of no use to training.objective '{training.objective}'": len(found) - len(usable)}
    if training.objective == "dpo":
        begun = random.Random(seed).random() + np.cumsum([0.0, *(one.weight for one in usable)])
        drawn = [one for one, is_next in zip(usable, np.diff(np.floor(begun)), strict=True) if is_next]
        reasons["not drawn: it counts less, and 'dpo' has no weights"] = len(usable) - len(drawn)
        usable = drawn
    reasons[f"more than {most} answers (training.max_steps times training.batch_size)"] = max(0, len(usable) - most)
    return usable[-most:], Counter({reason: count for reason, count in reasons.items() if count})


def draw_batches(count: int, batch: int, steps: int, rng: random.Random) -> list[int]:
    """Draw the rows (of so many) of each step's batch, one batch after the other.

    Every row comes once in each epoch, in an order that is drawn anew; where an epoch ends inside a batch, those come first
    that the batch does not have yet. So no row is twice in a batch, unless there are fewer rows than that.
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
    """The rows in an `order` in which those of about the same length are in a batch together: sorted inside each quarter of
    an epoch, the longest first, so that memory runs out at once or not at all. `lengths` has one for each row.
    """
    window = batch * max(1, len(lengths) // (4 * batch))
    parts = (order[start : start + window] for start in range(0, len(order), window))
    return [row for part in parts for row in sorted(part, key=lambda row: -lengths[row])]
