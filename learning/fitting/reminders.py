"""Reminders: what the bot was reminded of in answers that people judged, as examples for retrieval.

A liked answer says that what it was shown from long ago bore on the question, a disliked one that it may not have. Only
what the ranking of that time chose was ever shown, so that feedback moves the weights that are there and does not find new
ones from nothing. Who does not consent teaches nothing here either: the answers are those of the replay buffer.

Run: ``kibitz fit-retrieval --from-feedback``.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from bot.memory.embedder import Embedder
from bot.memory.index import Entry, ScopeIndex
from bot.memory.scope import Memory
from bot.store.conversations import ConversationStore
from bot.types import Progress, Turn
from learning.data.experience import Experience
from learning.fitting.retrieval import Example, compute_signals


def read_judged_examples(
    rated: Iterable[Experience], store: ConversationStore, memory: Memory, embedder: Embedder, progress: Progress
) -> Iterator[tuple[str, Example]]:
    """For each judged answer that was reminded of something, its conversation and the example that it gives."""
    rewards = {one.turn_id: one.reward for one in reversed(list(rated))}  # of an answer and its correction, the answer's
    scopes: defaultdict[str, list[Turn]] = defaultdict(list)
    for turn in filter(None, map(store.find_turn, sorted(rewards))):
        if turn.remembered and rewards[turn.id]:
            scopes[memory.scope_key(memory.read_conversation(turn.conversation_id))].append(turn)
    for number, turns in enumerate(scopes.values()):
        said = memory.read_since(memory.read_conversation(turns[0].conversation_id), "", embedder.space)
        there = memory.find_visible(turns[0].conversation_id, [one.id for one in said])
        unread = deque(_add_vectors([one for one in said if one.id in there], embedder))
        index = ScopeIndex()
        for turn in sorted(turns, key=lambda one: one.message_id):
            question = store.read_message(turn.message_id)
            while unread and unread[0].id < question.id:
                index.add([unread.popleft()])
            evidence = [index.rows[one] for one in turn.remembered if one in index.rows]
            if evidence and len(index) > len(evidence):
                columns = compute_signals(index, question.text, embedder, question.author_id)
                yield turn.conversation_id, Example(columns, evidence, rewards[turn.id])
        progress("scopes with judged answers", number + 1, len(scopes))


def _add_vectors(entries: list[Entry], embedder: Embedder) -> Iterator[Entry]:
    """The entries, each with a vector."""
    made = iter(embedder.encode([one.text for one in entries if one.vector is None]))
    return (one if one.vector is not None else replace(one, vector=next(made)) for one in entries)
