"""The toy dialogues: everyday messages, and sixteen ways to answer each.

Every intent has a few phrasings of the user's message and, for a formal and a casual voice, a core sentence, an extra
sentence and a question back. Four switches (long, casual, emoji, question) choose the answer, so that simulated people have
something to like or dislike, and a program can tell from a text whether they like it.

Run: ``python -m learning.models.toy`` prints a few pairs.
"""

import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

# Five lines an intent: its name; what users say; the formal and the casual voice (core | extra | question); an emoji.
TEXTS = Path(__file__).with_name("toy.txt").read_text(encoding="utf-8")
HELD_OUT_PHRASINGS = 2  # the last phrasings of each intent are held out: simulated users never say them


@dataclass(frozen=True)
class Voice:
    """The sentences of one tone of voice for one intent."""

    core: str
    extra: str
    question: str


@dataclass(frozen=True)
class Intent:
    """Something that a user may want: phrasings of it, and answers in a formal and a casual voice."""

    name: str
    phrasings: tuple[str, ...]
    formal: Voice
    casual: Voice
    emoji: str


@dataclass(frozen=True)
class Style:
    """The four switches of an answer."""

    long: bool
    casual: bool
    emoji: bool
    question: bool


STYLES = tuple(Style(*switches) for switches in product((False, True), repeat=4))


def compose_answer(intent: Intent, style: Style) -> str:
    """Return the answer to `intent` in `style`."""
    voice = intent.casual if style.casual else intent.formal
    parts = [voice.core]
    if style.long:
        parts.append(voice.extra)
    if style.question:
        parts.append(voice.question)
    if style.emoji:
        parts.append(intent.emoji)
    return " ".join(parts)


def list_answers(intent: Intent) -> set[str]:
    """Return all sixteen valid answers to `intent`."""
    return {compose_answer(intent, style) for style in STYLES}


def list_prompts() -> list[tuple[str, Intent]]:
    """Return the phrasings that simulated users say, with their intent."""
    return [(phrasing, intent) for intent in INTENTS for phrasing in intent.phrasings[:-HELD_OUT_PHRASINGS]]


def list_held_out_prompts() -> list[tuple[str, Intent]]:
    """Return the held-out phrasings with their intent."""
    return [(phrasing, intent) for intent in INTENTS for phrasing in intent.phrasings[-HELD_OUT_PHRASINGS:]]


def make_dialogues(count: int, seed: int) -> list[list[dict[str, str]]]:
    """Make `count` conversations in the `messages` form of the OpenAI API, each ending with an assistant's answer.

    About an eighth have an earlier exchange and a tenth a system message, so that the policy learns to handle history, a
    persona and remembered lines.
    """
    rng = random.Random(seed)

    def exchange() -> list[dict[str, str]]:
        intent = rng.choice(INTENTS)
        said = _vary_typing(rng.choice(intent.phrasings), rng)
        return [
            {"role": "user", "content": said},
            {"role": "assistant", "content": compose_answer(intent, rng.choice(STYLES))},
        ]

    found = []
    for _ in range(count):
        messages: list[dict[str, str]] = []
        if rng.random() < 0.10:
            remembered = rng.choice(INTENTS)
            line = rng.choice(["You are kibitz.", f"Said earlier: {rng.choice(remembered.phrasings)}"])
            messages.append({"role": "system", "content": line})
        for _ in range(rng.choices((1, 2), weights=(88, 12))[0]):
            messages += exchange()
        found.append(messages)
    return found


def _vary_typing(text: str, rng: random.Random) -> str:
    """Vary the capital letter and the final punctuation of a message, as people do."""
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip("?!.")
    return text


def _read_intents() -> tuple[Intent, ...]:
    found = []
    for block in TEXTS.strip().split("\n\n"):
        name, phrasings, formal, casual, emoji = block.split("\n")
        found.append(
            Intent(
                name=name,
                phrasings=tuple(phrasings.split(" | ")),
                formal=Voice(*formal.split(" | ")),
                casual=Voice(*casual.split(" | ")),
                emoji=emoji,
            )
        )
    return tuple(found)


INTENTS = _read_intents()


if __name__ == "__main__":
    for conversation in make_dialogues(8, seed=0):
        print(*(f"{message['role']}: {message['content']}" for message in conversation), sep="\n", end="\n\n")
