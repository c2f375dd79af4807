"""Slack export: read a ZIP (or its folder) with lists of people and channels, and a file for each channel and day."""

import html
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from learning.importers.channel_history import Post, Reaction, read_channel
from learning.importers.recorded_files import RecordedRow
from learning.importers.recording import OddRow, Recording

PEOPLE = {"users.json", "org_users.json"}
DIRECT = {"dms.json", "mpims.json"}
LIST_FILES = (
    PEOPLE
    | DIRECT
    | {
        *("channels.json", "groups.json", "integration_logs.json", "canvases.json", "content_flags.json"),
        *("file_conversations.json", "huddle_transcripts.json", "lists.json"),
    }
)
SPEECH = {None, "", "bot_message", "thread_broadcast", "me_message", "file_share", "assistant_app_thread"}
MENTION = re.compile(r"<@([A-Z0-9]+)(?:\|([^>]*))?>")
MARKUP = re.compile(r"<([^<>|]+)(?:\|([^<>]*))?>")


class Profile(BaseModel):
    """The names of a person."""

    display_name: str | None = None
    real_name: str | None = None


class SlackUser(BaseModel):
    """A person or a bot in a workspace."""

    id: str
    name: str = ""
    is_bot: bool = False
    profile: Profile = Profile()

    @property
    def shown_name(self) -> str:
        """The name that people see."""
        return self.profile.display_name or self.name or self.profile.real_name or self.id


class SlackReaction(BaseModel):
    """The reactions with one emoji."""

    name: str
    users: list[str] = []


class SlackMessage(BaseModel):
    """One message of a channel."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    ts: str = Field(pattern=r"^\d{1,12}(\.\d+)?$")
    user: str | None = None
    bot_id: str | None = None
    subtype: str | None = None
    text: str | None = None
    thread_ts: str | None = None
    reactions: list[SlackReaction] = []


def read_slack(rows: Sequence[RecordedRow], recording: Recording) -> None:
    """Read all channels of a recording."""
    people: dict[str, SlackUser] = {}
    direct: set[str] = set()
    channels: dict[str, list[tuple[RecordedRow, Any]]] = defaultdict(list)
    for row in rows:
        path = PurePosixPath(row.file)
        with recording.leaving_out(row.place):
            if path.name in PEOPLE:
                user = SlackUser.model_validate(row.value)
                people[user.id] = user
            elif path.name in DIRECT:
                direct |= {str(row.value.get("id")), str(row.value.get("name"))}
            elif path.name not in LIST_FILES:
                channels[str(path.parent)].append((row, SlackMessage.model_validate(row.value)))
    for channel, messages in channels.items():
        bots = {one.user for _, one in messages if one.user and one.bot_id}
        bots |= {user.id for user in people.values() if user.is_bot}
        posts = []
        for row, message in messages:
            with recording.leaving_out(row.place, "message"):
                posts.append(_make_post(message, people, bots, PurePosixPath(channel).name in direct, row, recording))
        read_channel(channel, posts, messages[0][0], recording)


def _make_post(
    message: SlackMessage,
    people: dict[str, SlackUser],
    bots: set[str],
    is_direct: bool,
    row: RecordedRow,
    recording: Recording,
) -> Post:
    """Return a message as a post. Raises OddRow if it is a notice of the platform, or has no author."""
    if message.subtype not in SPEECH:
        raise OddRow("is a platform notice", message.subtype or "")
    author = message.user or message.bot_id
    if author is None:
        raise OddRow("has no author")
    reactions = []
    for one in message.reactions:
        found = tuple(user for user in one.users if user not in bots)
        recording.leave_out("reaction of a bot", row.place, one.name, len(one.users) - len(found))
        reactions.append(Reaction(one.name, found))
    asked = frozenset(found[1] for found in MENTION.finditer(message.text or ""))
    return Post(
        id=message.ts,
        author=author,
        text=plain_text(message.text or "", people, bots),
        at=float(message.ts),
        is_bot=author in bots or message.bot_id is not None or message.subtype == "bot_message",
        mentions=asked,
        thread=message.thread_ts or "",
        is_dialogue=is_direct or message.thread_ts is not None,
        reactions=tuple(reactions),
    )


def plain_text(text: str, people: dict[str, SlackUser], bots: set[str]) -> str:
    """Return a text as people see it: with names, without markup, and without mentions of bots."""

    def name(found: re.Match[str]) -> str:
        if found[1] in bots:
            return ""
        return f"@{found[2] or (people[found[1]].shown_name if found[1] in people else found[1])}"

    def shown(found: re.Match[str]) -> str:
        target, label = found[1], found[2]
        if target[0] == "#":
            return f"#{label or target[1:]}"
        if target[0] == "!":
            return label or f"@{target[1:]}"
        return label or target.removeprefix("mailto:")

    return html.unescape(MARKUP.sub(shown, MENTION.sub(name, text))).strip()
