"""Reminders: make examples for retrieval from judged answers that remembered earlier messages.

A like suggests that the remembered messages were relevant to the question, a dislike that they may not have been. Only
messages that the ranking of that time chose were ever shown, so feedback can adjust existing weights but not find new ones.
The answers come from the replay buffer, so people without consent teach nothing here either.

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
    """Yield the conversation id and the example of each judged answer that remembered something."""
    rewards = {one.turn_id: one.reward for one in reversed(list(rated))}  # an answer's reward wins over its correction's
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
    """Return the entries, with vectors added to those that have none."""
    made = iter(embedder.encode([one.text for one in entries if one.vector is None]))
    return (one if one.vector is not None else replace(one, vector=next(made)) for one in entries)
