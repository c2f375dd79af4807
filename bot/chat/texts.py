"""Texts: messages for operators and people, the same at the console and in a chat."""

from pathlib import Path
from typing import Any

from bot.data_directory import is_locked
from bot.memory.state import ConversationState
from bot.store.conversations import ConversationStore
from bot.store.registry import BASE, PolicyRegistry
from bot.types import PolicyState, PolicyVersion
from bot.wording import count_noun


def describe_state(found: ConversationState) -> str:
    """Describe a conversation's state, one item a line."""
    lines = (
        [f"topic since {found.topic[0].at:%Y-%m-%d %H:%M}: {_shorten(found.topic[0].text)}"]
        if found.topic
        else ["no messages"]
    )
    lines += [f"participant: {name} ({count_noun(count, 'message')})" for name, count in found.participants.items()]
    lines += [f"open: {message.author_id}: {_shorten(message.text)}" for message in found.unanswered]
    lines += [f"fact: {fact} ({fact.message.at:%Y-%m-%d})" for fact in found.facts]
    lines += [f"former fact: {fact} ({fact.message.at:%Y-%m-%d})" for fact in found.former_facts]
    return "\n".join(lines)


def _shorten(text: str) -> str:
    return " ".join(text[:200].split())[:100]


def describe_pause(paused: bool) -> str:
    """Say whether learning is paused now."""
    return "learning is paused; use the same command again to resume it" if paused else "learning is resumed"


def describe_consent(consents: bool) -> str:
    """Say what a person's consent, or its lack, means for them."""
    if consents:
        return "kibitz may learn from what you write and how you react (/privacy off stops this, /forget-me erases all)."
    return "kibitz does not learn from you and does not bring up your earlier messages (/privacy on changes this)."


def describe_status(store: ConversationStore, registry: PolicyRegistry, data: Path) -> str:
    """Return the lines of `kibitz status` and `/status`. `data` is the data directory."""
    counts = store.count_rows()
    versions = registry.all()
    live = next((version.name for version in versions if version.state == PolicyState.LIVE), f"{BASE} (not started yet)")
    lines = [
        f"live: {live}",
        f"versions: {max(len(versions), 1)}",
        ", ".join(f"{name}: {count}" for name, count in counts.items()),
    ]
    lines += [describe_wait(version, store) for version in registry.find_waiting()]
    if registry.is_learning_paused():
        lines.append("learning: paused")
    if last := _find_last_run(registry, data):
        lines.append(f"last run: {last['policy']}, trained on {count_noun(last['n'], 'reaction')}: {last['outcome']}")
    return "\n".join(lines)


def _find_last_run(registry: PolicyRegistry, data: Path) -> dict[str, Any] | None:
    """Return the last run, as `list_runs` does. A run without an end was killed if no process trains now."""
    last = next(reversed(registry.list_runs()), None)
    if last is None or last["ended_at"] is not None or is_locked(data, "train"):
        return last
    again = next(reversed(registry.list_runs()), None)  # it may have ended before we looked at the lock
    return last | {"outcome": "interrupted"} if again == last else again


def describe_wait(version: PolicyVersion, store: ConversationStore) -> str:
    """Say how many more reactions a version waits for."""
    more = max(1, version.awaited_reactions - store.count_reactions(version.drawn_at))
    return f"{version.name} waits for about {count_noun(more, 'more reaction')} before it is judged"
