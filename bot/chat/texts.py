"""Texts: what operators and people are told, at the console and in a chat alike. It knows no platform."""

from bot.memory.state import State
from bot.store.conversations import ConversationStore
from bot.store.registry import BASE, PolicyRegistry
from bot.types import PolicyState, PolicyVersion


def state_text(found: State) -> str:
    """A conversation's state, for people."""
    lines = (
        [f"topic since {found.topic[0].at:%Y-%m-%d %H:%M}: {_short(found.topic[0].text)}"]
        if found.topic
        else ["nothing was said"]
    )
    lines += [f"takes part: {name} ({count} messages)" for name, count in found.participants.items()]
    lines += [f"open: {message.author_id}: {_short(message.text)}" for message in found.open]
    lines += [f"fact: {fact} ({fact.message.at:%Y-%m-%d})" for fact in found.facts]
    lines += [f"once: {fact} ({fact.message.at:%Y-%m-%d})" for fact in found.former_facts]
    return "\n".join(lines)


def _short(text: str) -> str:
    return " ".join(text[:200].split())[:100]


def pause_text(paused: bool) -> str:
    """What pausing came to."""
    return "learning is paused; the same command again ends that" if paused else "learning goes on"


def privacy_text(consents: bool) -> str:
    """What somebody's consent means."""
    if consents:
        return "kibitz may learn from what you write and how you react (/privacy off ends that, /forget-me erases all)."
    return "kibitz learns nothing from you and reminds nobody of what you wrote (/privacy on changes that)."


def status_text(store: ConversationStore, registry: PolicyRegistry) -> str:
    """The lines of `kibitz status` and of `/status`."""
    counts = store.counts()
    versions = registry.all()
    live = next((version.name for version in versions if version.state == PolicyState.LIVE), f"{BASE} (not started yet)")
    lines = [
        f"live: {live}",
        f"versions: {max(len(versions), 1)}",
        ", ".join(f"{name}: {count}" for name, count in counts.items()),
    ]
    lines += [waiting_text(version, store) for version in registry.waiting()]
    if registry.learning_is_paused():
        lines.append("learning: paused")
    runs = registry.runs()
    if runs:
        last = runs[-1]
        lines.append(f"last run: {last['policy']}, taught by {last['n']} reactions: {last['outcome']}")
    return "\n".join(lines)


def waiting_text(version: PolicyVersion, store: ConversationStore) -> str:
    """What a version waits for."""
    more = max(1, version.waits_for - store.reactions(version.drawn_at))
    return f"{version.name} waits for about {more} more reaction{'s' * (more > 1)} to be judged on"
