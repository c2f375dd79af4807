"""Reminders: what the bot was reminded of in answers that people judged, as examples for retrieval.

A liked answer says that what it was shown from long ago bore on the question, a disliked one that it may not have. Only
what the ranking of that time chose was ever shown, so that feedback moves the weights that are there and does not find new
ones from nothing. Who does not consent teaches nothing here either: the answers are those of the replay buffer.

Run: ``kibitz fit-retrieval --from-feedback``.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from bot.conversations import ConversationStore
from bot.embeddings import Embedder
from bot.memory import Memory
from bot.retrieval import Entry, ScopeIndex
from learning.replay_buffer import Experience
from learning.retrieval_training import Example, signals

Progress = Callable[[str, int, int], None]


def judged(
    rated: Iterable[Experience], store: ConversationStore, memory: Memory, embedder: Embedder, progress: Progress
) -> Iterator[tuple[str, Example]]:
    """For each judged answer that was reminded of something, its conversation and the example that it gives."""
    rewards = {one.turn_id: one.reward for one in reversed(list(rated))}  # of an answer and its correction, the answer's
    for number, (turn_id, earned) in enumerate(sorted(rewards.items())):
        turn = store.turn(turn_id)
        reminders = [] if turn is None else [message for message, score in turn.shown.items() if score is not None]
        if turn is not None and reminders and earned:
            question = store.message(turn.message_id)
            before = [one for one in memory.since(turn.conversation_id, "", embedder.space) if one.id < question.id]
            there = memory.visible(turn.conversation_id, [one.id for one in before])
            index = ScopeIndex()
            index.add(_embedded([one for one in before if one.id in there], embedder))
            evidence = [index.rows[one] for one in reminders if one in index.rows]
            if evidence and len(index) > len(evidence):
                columns = signals(index, question.text, embedder, question.author_id)
                yield turn.conversation_id, Example(columns, evidence, earned)
        progress("judged answers", number + 1, len(rewards))


def _embedded(entries: list[Entry], embedder: Embedder) -> Iterator[Entry]:
    """The entries, each with a vector."""
    made = iter(embedder.encode([one.text for one in entries if one.vector is None]))
    return (one if one.vector is not None else replace(one, vector=next(made)) for one in entries)
