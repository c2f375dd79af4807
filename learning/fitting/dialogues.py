"""Dialogues with questions: generate long conversations of several people, and the messages that answer each question.

Retrieval is fitted and tested on them. Each person mentions facts about their life; a question asks for one of them, in
other words or by its name. The texts are in `dialogues.json`; {x} stands for the subject, {y} for a time, {n} for a name.
"""

import json
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

TEXTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


@dataclass
class Dialogue:
    """One conversation and the questions about it, as `kibitz bench recall` reads them."""

    conversation: list[dict[str, str]] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)


def make_dialogue(seed: int, turns: int = 400, people: int = 6, fillers: list[str] | None = None) -> Dialogue:
    """Make a conversation of `turns` messages by `people` people, with a question about each fact that is stated."""
    rng = random.Random(seed)
    names = rng.sample(TEXTS["handles"], people)
    made, at = Dialogue(), datetime(2026, 1, 1, 9, tzinfo=UTC)
    told = [(name, fact) for name in names for fact in rng.sample(TEXTS["facts"], 15)]
    rng.shuffle(told)
    starts = sorted(rng.sample(range(0, turns, 4), min(len(told), turns // 8)))
    due = dict(zip(starts, told, strict=False))
    replies: list[tuple[str, str]] = []

    def chatter() -> str:
        return rng.choice(fillers or TEXTS["small_talk"]).format(n=rng.choice(names))

    for number in range(turns):
        at += timedelta(minutes=rng.choice([1, 2, 5, 600]))
        speaker, text = replies.pop(0) if replies else (rng.choice(names), chatter())
        if number in due:
            speaker, fact = due[number]
            thing = rng.choice(fact["x"])
            text = rng.choice(fact["said"]).format(x=thing, y=rng.choice(fact["y"] or [""]))
            question = rng.choice(rng.choice([fact["asked"], TEXTS["explicit"]])).format(n=speaker, x=thing)
            made.questions.append({"text": question, "evidence": [str(number)], "category": "stated"})
            other = rng.choice([name for name in names if name != speaker])
            replies = [(other, rng.choice(TEXTS["replies"])), (speaker, rng.choice(TEXTS["elaborations"]))][
                : rng.randint(0, 2)
            ]
            replies = [(name, said.format(n=speaker, x=thing)) for name, said in replies]
        for _ in range(rng.randint(0, 2)):  # people say several things at once
            text = rng.choice([f"{text} {chatter()}", f"{chatter()} {text}"])
        made.conversation.append({"id": str(number), "speaker": speaker, "at": at.isoformat(), "text": text})
    return made
