"""The question after 👎 why, the same on every platform: reasons to tick, and a comment.

The 👎 is recorded before; closing the question takes nothing back.
"""

from collections.abc import Collection
from dataclasses import replace

from bot.store.feedback import find_reasons
from bot.types import Feedback, FeedbackKind, Reason
from connectors.answers import Answers

TITLE = "What was wrong with it?"
TICK = "Tick what applies"
COMMENT = "In a few words"
MOST_CHARACTERS = 300  # of the comment


def make_acts(standing: Collection[Reason], ticked: Collection[str], turn_id: str, user_id: str) -> list[Feedback]:
    """Return the acts that change a person's reasons from `standing` to `ticked`: new ones are given, others retracted."""
    return [
        Feedback(turn_id, user_id, FeedbackKind.COMMENT, reason.signal, retracts=reason in standing, text=str(reason))
        for reason in Reason
        if (reason in ticked) != (reason in standing)
    ]


async def record_reasons(
    answers: Answers, turn_id: str, user_id: str, ticked: Collection[str], comment: str, event_id: str
) -> bool:
    """Record what a person ticked and wrote. Return False if it was dropped. All of it counts as one opinion."""
    standing = find_reasons(await answers.read_feedback(turn_id), user_id)
    acts = [replace(act, event_id=f"{event_id}:{act.signal}") for act in make_acts(standing, ticked, turn_id, user_id)]
    if comment.strip():
        acts.append(Feedback(turn_id, user_id, FeedbackKind.COMMENT, "reason", text=comment, event_id=event_id))

    async def store() -> None:
        for act in acts:
            await answers.dialogue.record_feedback(act)

    return not acts or await answers.record_opinion(acts[0], store)
