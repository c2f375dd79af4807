"""Texts: what operators and people are told, at the console and in a chat alike. It knows no platform."""

from bot.memory.state import ConversationState
from bot.store.conversations import ConversationStore
from bot.store.registry import BASE, PolicyRegistry
from bot.types import PolicyState, PolicyVersion


def describe_state(found: ConversationState) -> str:
    """A conversation's state, for people."""
    lines = (
        [f"topic since {found.topic[0].at:%Y-%m-%d %H:%M}: {_shorten(found.topic[0].text)}"]
        if found.topic
        else ["nothing was said"]
    )
    lines += [f"takes part: {name} ({count} messages)" for name, count in found.participants.items()]
    lines += [f"open: {message.author_id}: {_shorten(message.text)}" for message in found.unanswered]
    lines += [f"fact: {fact} ({fact.message.at:%Y-%m-%d})" for fact in found.facts]
    lines += [f"once: {fact} ({fact.message.at:%Y-%m-%d})" for fact in found.former_facts]
    return "\n".join(lines)


def _shorten(text: str) -> str:
    return " ".join(text[:200].split())[:100]


def describe_pause(paused: bool) -> str:
    """What pausing came to."""
    return "learning is paused; the same command again ends that" if paused else "learning goes on"


def describe_consent(consents: bool) -> str:
    """What somebody's consent means."""
    if consents:
        return "kibitz may learn from what you write and how you react (/privacy off ends that, /forget-me erases all)."
    return "kibitz learns nothing from you and reminds nobody of what you wrote (/privacy on changes that)."


def describe_status(store: ConversationStore, registry: PolicyRegistry) -> str:
    """The lines of `kibitz status` and of `/status`."""
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
    runs = registry.list_runs()
    if runs:
        last = runs[-1]
        lines.append(f"last run: {last['policy']}, taught by {last['n']} reactions: {last['outcome']}")
    return "\n".join(lines)


def describe_wait(version: PolicyVersion, store: ConversationStore) -> str:
    """What a version waits for."""
    more = max(1, version.awaited_reactions - store.count_reactions(version.drawn_at))
    return f"{version.name} waits for about {more} more reaction{'s' * (more > 1)} to be judged on"
