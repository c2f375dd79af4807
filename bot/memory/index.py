"""Retrieval: ranks the earlier messages of a scope by how much they bear on a new one.

The index keeps the newest messages of a scope in memory, in order, with their vectors, words and authors. The signals are
dense similarity, BM25 over messages and over windows of three messages, the speakers that the question names, and the kind
of message. Each is standardised over the scope, and they are added with learned weights. The index does not check consent:
its caller looks up the messages in the database, and shows only those that may be shown.

BM25 is that of Robertson and Zaragoza (2009), "The Probabilistic Relevance Framework: BM25 and Beyond".
"""

import math
import re
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bot.store.words import CHARACTERS, FUNCTION_WORDS, MIN_CONTENT_WORDS, WORD, extract_words

K1, B = 1.2, 0.75  # BM25
POOL = (1.0, 0.5, 0.25)  # weights of a message and the two before it in its pooled vector
NEAR = 0.3  # the least cosine, or share of the question's words weighted by rarity, of a message that bears on it
USUAL_SIMILARITY = 0.25  # the average cosine of neighbouring messages
TIMES = re.compile(
    r"\b(yesterday|today|tonight|tomorrow|ago|last|next|week\w*|month\w*|year\w*|weekend|morning|evening"
    r"|(?:mon|tues|wednes|thurs|fri|satur|sun)day|january|february|march|april|may|june|july|august|september|october"
    r"|november|december|\d{4}|\d{1,2}(?:st|nd|rd|th|:\d\d|am|pm))\b",
    re.IGNORECASE,
)
NUMBERS = re.compile(
    r"\b(\d+|one|two|three|four|five|six|seven|eight|nine|ten|dozen|couple|twice|once|several)\b", re.IGNORECASE
)
WHEN = re.compile(r"\b(when|what (?:time|date|day|year|month)|how long)\b", re.IGNORECASE)
HOW_MANY = re.compile(r"\b(how (?:many|much|old|often)|what number)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One message in the index; `vector` (1-D, of any length and type) is None until it is embedded."""

    id: str
    conversation: str
    speaker: str
    text: str
    vector: np.ndarray | None = None
    is_from_kibitz: bool = False


Weights = Mapping[str, float]


class ScopeIndex:
    """The newest messages that one scope may see, oldest first."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.rows: dict[str, int] = {}
        self.speakers: dict[str, int] = {}
        self._speaker = array("i")
        self._before = (array("i"), array("i"))  # rows of the two messages before, in its conversation; -1: none
        self._last: dict[str, tuple[int, int]] = {}
        self._postings = _no_postings()
        self._length = array("i")
        self._content = array("i")  # numbers of content words
        self._content_ids: dict[str, set[str]] = {}  # messages with content: people's under "", kibitz's by conversation
        self._kind = array("d")  # four values per message: is a question, log length, has a time, has a number
        self._vectors = np.zeros((0, 0), np.float32)
        self._has_vector = np.zeros(0, bool)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, entries: Iterable[Entry]) -> None:
        """Append messages, which must be newer than all in the index. One that is there already only gets its vector."""
        for entry in entries:
            if entry.id not in self.rows:
                self._append(entry)
            if entry.vector is not None:
                self._set_vector(self.rows[entry.id], entry.vector)

    def drop_oldest(self, count: int) -> None:
        """Remove the first `count` messages."""
        gone = set(self.ids[:count])
        del self.ids[:count], self._speaker[:count], self._length[:count], self._content[:count], self._kind[: 4 * count]
        self.rows = {message_id: row for row, message_id in enumerate(self.ids)}
        self._before = (_move_down(self._before[0][count:], count), _move_down(self._before[1][count:], count))
        last = {place: (row - count, max(-1, before - count)) for place, (row, before) in self._last.items()}
        self._last = {place: rows for place, rows in last.items() if rows[0] >= 0}
        postings = self._postings
        self._postings = _no_postings()
        for word, (rows, times) in postings.items():
            first = bisect_left(rows, count)
            if first < len(rows):
                self._postings[word] = (_move_down(rows[first:], count), times[first:])
        left = {place: ids - gone for place, ids in self._content_ids.items()}
        self._content_ids = {place: ids for place, ids in left.items() if ids}
        self._vectors, self._has_vector = self._vectors[count:].copy(), self._has_vector[count:].copy()
        numbers = sorted(set(self._speaker))
        names = {number: name for name, number in self.speakers.items()}
        self.speakers = {names[number]: new for new, number in enumerate(numbers)}
        self._speaker = array("i", np.searchsorted(numbers, self._speaker).astype(np.int32).tobytes())

    def with_older(self, entries: Sequence[Entry], question: str) -> "ScopeIndex":
        """Return a copy, for one question, with these older messages before all others."""
        found, count = ScopeIndex(), len(entries)
        found.speakers = dict(self.speakers)
        found.add(entries)
        found.ids += self.ids
        found._before = (
            found._before[0] + _move_down(self._before[0], -count),
            found._before[1] + _move_down(self._before[1], -count),
        )
        for word in set(extract_words(question)) & self._postings.keys():
            rows, times = self._postings[word]
            mine, how_often = found._postings[word]
            found._postings[word] = (mine + _move_down(rows, -count), how_often + times)
        found._speaker += self._speaker
        found._length += self._length
        found._content += self._content
        found._kind += self._kind
        if self._vectors.size or found._vectors.size:
            size = (self._vectors if self._vectors.size else found._vectors).shape[1]
            parts = [_copy_vectors(found, count, size), _copy_vectors(self, len(self), size)]
            found._vectors, found._has_vector = (np.concatenate(both) for both in zip(*parts, strict=True))
        return found

    def add_vectors(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Add the vectors of messages, as far as these are in the index."""
        for message_id in vectors.keys() & self.rows.keys():
            self._set_vector(self.rows[message_id], vectors[message_id])

    def is_missing(self, entry: Entry) -> bool:
        """Tell whether `add` would change anything for this message."""
        row = self.rows.get(entry.id)
        if row is None or entry.vector is None:
            return row is None
        return row >= len(self._has_vector) or not self._has_vector[row]

    def has_content_besides(self, conversation: str, but: Collection[str]) -> bool:
        """Tell whether there is a message with content, besides those in `but`, that a conversation may be shown.

        Answers of kibitz count only in their own conversation.
        """
        return any(one not in but for place in ("", conversation) for one in self._content_ids.get(place, ()))

    def find_unembedded(self) -> list[str]:
        """Return the ids of the messages without a vector."""
        missing = np.ones(len(self.ids), bool)
        missing[: len(self._has_vector)] &= ~self._has_vector[: len(self.ids)]
        return [self.ids[row] for row in np.flatnonzero(missing)]

    def rank(self, question: str, vector: np.ndarray | None, asker: str, weights: Weights) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of the messages (n), best first, and the score of each row (n)."""
        signals = self.compute_signals(question, vector, asker)
        total = sum(weights.get(name, 0.0) * values for name, values in signals.items())
        scores = np.asarray(total, np.float64) + np.zeros(len(self))
        return np.argsort(-scores, kind="stable"), scores

    def find_near(self, question: str, vector: np.ndarray | None, asker: str = "") -> np.ndarray:
        """Tell of each message (n, bool) whether it bears on the question at all, however it ranks.

        Such a message has a few content words, and it is similar to the question, shares its rarer words, or is by a speaker
        that the question names.
        """
        named, rest = self.extract_speakers(question, asker)
        shared, all_of_it = np.zeros(len(self)), 0.0
        for term in {word for word in extract_words(rest) if word not in FUNCTION_WORDS}:
            rows = np.frombuffer(self._postings[term][0], np.int32) if term in self._postings else np.zeros(0, np.int32)
            rarity = _rarity(len(self), len(rows))
            shared[rows] += rarity
            all_of_it += rarity
        near = shared >= NEAR * max(all_of_it, 1e-9)
        near |= np.isin(np.frombuffer(self._speaker, np.int32), list(named))
        if vector is not None and self._vectors.size:
            known = min(len(self), len(self._vectors))
            near[:known] |= self._vectors[:known] @ vector >= NEAR
        return near & (np.frombuffer(self._content, np.int32) >= MIN_CONTENT_WORDS)

    def compute_signals(self, question: str, vector: np.ndarray | None, asker: str = "") -> dict[str, np.ndarray]:
        """Return each signal for all messages (n), with zero mean and unit variance over the scope.

        `vector` is that of the question without names of speakers, because names find messages that only greet somebody.
        """
        named, rest = self.extract_speakers(question, asker)
        terms = [word for word in extract_words(rest) if word not in FUNCTION_WORDS] or extract_words(rest)
        turn, window, after = self._bm25(terms)
        found = {"bm25": turn, "bm25_window": window, "bm25_next": after}
        if vector is not None and self._vectors.size:
            found |= self._dense(vector)
        kind = np.frombuffer(self._kind, np.float64).reshape(-1, 4) if self.ids else np.zeros((0, 4))
        found["speaker"] = np.isin(np.frombuffer(self._speaker, np.int32), list(named)).astype(float)
        found["asks"], found["length"] = kind[:, 0], kind[:, 1]
        found["time"] = kind[:, 2] * bool(WHEN.search(question))
        found["number"] = kind[:, 3] * bool(HOW_MANY.search(question))
        return {name: _standardise(values) for name, values in found.items()}

    def extract_speakers(self, question: str, asker: str = "") -> tuple[set[int], str]:
        """Return the numbers of the speakers that a question names, and the question without their names.

        The asker is one of them if the question has "I", "my", "me" or "mine".
        """
        about: set[int] = set()
        rest = question[:CHARACTERS]
        folded = rest.casefold()
        for name, number in self.speakers.items():
            for form in _list_name_forms(name):
                if form.casefold() in folded:
                    pattern = rf"(?<!\w)@?{re.escape(form)}(?:['’]s)?(?!\w)"
                    rest, times = re.subn(pattern, " ", rest, flags=re.IGNORECASE)
                    if times:
                        about.add(number)
        if asker in self.speakers and re.search(r"\b(i|my|me|mine)\b", folded):
            about.add(self.speakers[asker])
        return about, rest if WORD.search(rest) else question

    def _append(self, entry: Entry) -> None:
        row = len(self.ids)
        self.ids.append(entry.id)
        self.rows[entry.id] = row
        self._speaker.append(self.speakers.setdefault(entry.speaker, len(self.speakers)))
        one, two = self._last.get(entry.conversation, (-1, -1))
        self._before[0].append(one)
        self._before[1].append(two)
        self._last[entry.conversation] = (row, one)
        counts = Counter(extract_words(entry.text))
        for word, count in counts.items():
            rows, times = self._postings[word]
            rows.append(row)
            times.append(count)
        content = len(counts.keys() - FUNCTION_WORDS)
        self._content.append(content)
        if content >= MIN_CONTENT_WORDS:
            self._content_ids.setdefault(entry.conversation if entry.is_from_kibitz else "", set()).add(entry.id)
        length = sum(counts.values())
        self._length.append(length)
        text = entry.text[:CHARACTERS]
        asks = 1.0 if text.rstrip().endswith(("?", "？")) else 0.0
        kinds = (asks, float(np.log1p(length)), float(bool(TIMES.search(text))), float(bool(NUMBERS.search(text))))
        self._kind.extend(kinds)

    def _set_vector(self, row: int, vector: np.ndarray) -> None:
        if row >= len(self._vectors) or not self._vectors.size:
            grown = np.zeros((max(64, 2 * row + 2), len(vector)), np.float32)
            has = np.zeros(len(grown), bool)
            if self._vectors.size:
                grown[: len(self._vectors)], has[: len(self._has_vector)] = self._vectors, self._has_vector
            self._vectors, self._has_vector = grown, has
        length = np.linalg.norm(vector.astype(np.float32))
        self._vectors[row], self._has_vector[row] = vector / (length or 1.0), True

    def _shift(self, values: np.ndarray, steps: int) -> np.ndarray:
        """Return for each message the value of the one `steps` (1 or 2) before it in its conversation; 0 without one."""
        before = np.frombuffer(self._before[steps - 1], np.int32)
        return np.where(before >= 0, values[before], 0.0)

    def _bm25(self, terms: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the BM25 score (n) of each message, of each with the two before it, and of the message after each."""
        count = len(self)
        length = np.frombuffer(self._length, np.int32).astype(float) if count else np.zeros(0)
        wide = length + self._shift(length, 1) + self._shift(length, 2) if count else length
        turn, window = np.zeros(count), np.zeros(count)
        for term, weight in Counter(terms).items():
            if term not in self._postings:
                continue
            rows, times = self._postings[term]
            frequency = np.zeros(count)
            frequency[np.frombuffer(rows, np.int32)] = np.frombuffer(times, np.int32)
            turn += weight * _score_term(frequency, length)
            window += weight * _score_term(frequency + self._shift(frequency, 1) + self._shift(frequency, 2), wide)
        after = np.zeros(count)
        if count:
            before = np.frombuffer(self._before[0], np.int32)
            after[before[before >= 0]] = turn[before >= 0]
        return turn, window, after

    def _dense(self, question: np.ndarray) -> dict[str, np.ndarray]:
        """Return the cosine similarity (n) of each message, and of each pooled with the two before it.

        A message without a vector gets the mean.
        """
        count = len(self)
        known = min(count, len(self._vectors))
        similar, has = np.zeros(count), np.zeros(count, bool)
        similar[:known], has[:known] = self._vectors[:known] @ question, self._has_vector[:known]
        similar = np.where(has, similar, similar[has].mean() if has.any() else 0.0)
        weights = [np.full(count, POOL[0])]
        weights += [POOL[step] * (np.frombuffer(self._before[step - 1], np.int32) >= 0) for step in (1, 2)]
        pooled = POOL[0] * similar + sum(POOL[step] * self._shift(similar, step) for step in (1, 2))
        # The length of the pooled vector, if neighbouring messages have the average similarity.
        square = sum(weight**2 for weight in weights)
        square = square + 2 * USUAL_SIMILARITY * (
            weights[0] * weights[1] + weights[0] * weights[2] + weights[1] * weights[2]
        )
        return {"dense": similar, "pooled": pooled / np.sqrt(square)}


def _no_postings() -> defaultdict[str, tuple["array[int]", "array[int]"]]:
    return defaultdict(lambda: (array("i"), array("i")))


def _move_down(rows: "array[int]", count: int) -> "array[int]":
    """Return row numbers minus `count`; -1 (none) for those that would be negative."""
    numbers = np.frombuffer(rows, np.int32) if rows else np.zeros(0, np.int32)
    return array("i", np.where(numbers < max(count, 0), -1, numbers - count).astype(np.int32).tobytes())


def _copy_vectors(index: ScopeIndex, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a copy of the vectors (count × size) of an index, and which messages have one (count, bool)."""
    vectors, has = np.zeros((count, size), np.float32), np.zeros(count, bool)
    known = min(count, len(index._vectors))
    if known:
        vectors[:known], has[:known] = index._vectors[:known], index._has_vector[:known]
    return vectors, has


def _score_term(frequency: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return the part of one word in the BM25 score of each document (n)."""
    count, holding = len(frequency), int(np.count_nonzero(frequency))
    rarity = _rarity(count, holding)
    mean = length.mean() or 1.0
    return rarity * frequency * (K1 + 1) / (frequency + K1 * (1 - B + B * length / mean))


def _rarity(count: int, holding: int) -> float:
    """Return the inverse document frequency of a word that `holding` of `count` documents contain."""
    return math.log1p((count - holding + 0.5) / (holding + 0.5))


def _standardise(values: np.ndarray) -> np.ndarray:
    spread = values.std() if len(values) else 0.0
    return (values - values.mean()) / spread if spread > 1e-9 else np.zeros(len(values))


def _list_name_forms(name: str) -> list[str]:
    """Return the forms of a speaker's name: the whole name, and its parts if it has spaces."""
    parts = [part for part in name.split() if len(part) > 2]
    return [name, *parts] if len(parts) > 1 else [name]
