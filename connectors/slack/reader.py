"""SlackReader: what a Slack message says to those who see it, as plain text.

Markup becomes the names that people see, names of emoji become emoji, and text files become their text. What Slack does not
tell in time, or the app's scopes do not let us read, stays as it is. It knows no conversation and no database.
"""

import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import Awaitable
from html import unescape
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from slack_sdk.errors import SlackApiError
from slack_sdk.web.async_client import AsyncWebClient

from bot.chat.slack_emoji import find_emoji
from connectors.reading import KINDS, LARGEST_FILE, TEXT_TYPES, MessageContent
from connectors.slack.places import Place, read_error_code

log = logging.getLogger(__name__)

SPEECH = (None, "file_share", "me_message", "thread_broadcast")  # the subtypes of messages that people write
ANSWER_SECONDS = 2.0  # that Slack may take to tell a name or send a file: it wants to know within 3 that we have the message
NAMES = 10_000  # names that are kept in memory
EARLIER = 20  # messages of a thread, the newest, that a message in it is shown with
_MARKUP = re.compile(r"<([@#!]?)([^<>|]+)(?:\|([^<>]*))?>")
_CODE_OR_EMOJI = re.compile(r"(```.*?```|`[^`\n]+`)|(?<!\w):([a-z0-9_+'-]+):(?!\w)", re.DOTALL)

Fetched = TypeVar("Fetched")


async def fetch(asked: Awaitable[Any]) -> dict[str, Any]:
    """Return what Slack answers, or nothing where it refuses."""
    try:
        return dict((await asked).data)
    except SlackApiError as error:
        log.info("Slack does not tell: %s", read_error_code(error))
        return {}


class SlackReader:
    """Reads messages. `me` is the app's own user id, known once it is connected."""

    def __init__(self, web: AsyncWebClient):
        self.me = ""
        self._client = web
        self._names: OrderedDict[str, str] = OrderedDict()

    def mentions_us(self, message: dict[str, Any]) -> bool:
        """Whether a message mentions the app."""
        return bool(self._make_mention_pattern().search(message.get("text") or ""))

    async def read(self, message: dict[str, Any]) -> MessageContent:
        """MessageContent all of a message, text files too."""
        files = message.get("files") or []
        contents = await asyncio.gather(*(self._read_file(one) for one in files))
        return await self._compose_content(message, list(zip(files, contents, strict=True)))

    async def read_words(self, message: dict[str, Any]) -> str:
        """Read what a message says by itself, as people see it who scroll past it; its files are only named."""
        return (await self._compose_content(message, [(one, "") for one in message.get("files") or []])).text

    async def find_name(self, user: str) -> str:
        """Return what people see a person called; the id where Slack does not tell."""
        return await self._look_up_name("@", user)

    async def read_thread(self, place: Place, before: str) -> list[dict[str, Any]]:
        """Return the newest messages that people wrote in a thread before a time, oldest first."""
        asked = fetch(self._client.conversations_replies(channel=place.channel, ts=place.thread, latest=before, limit=1000))
        got = await _wait_briefly(asked) or {}
        written = [
            one for one in got.get("messages", []) if one.get("subtype") in SPEECH and float(one["ts"]) < float(before)
        ]
        theirs = [one for one in written if "user" in one and one["user"] != self.me]
        return sorted(theirs, key=lambda one: float(one["ts"]))[-EARLIER:]

    async def _compose_content(self, message: dict[str, Any], files: list[tuple[dict[str, Any], str]]) -> MessageContent:
        """Put together the words of a message, what it forwards, and its `files` with what they say."""
        forwarded = [one for one in message.get("attachments") or [] if one.get("is_share") or one.get("is_msg_unfurl")]
        raw = [message.get("text") or "", *(_with_author(one) for one in forwarded)]
        words = [await self._make_readable(one) for one in raw]
        words += [f"{_file_name(file)}:\n{content}" for file, content in files if content]
        unread = [file for file, content in files if not content]
        text = "\n".join(one for one in words if one)
        named = [f"[{_file_name(file)}: not readable]" for file in unread] if text else []
        return MessageContent("\n".join([text, *named]), tuple(dict.fromkeys(map(_kind, unread))))

    async def _make_readable(self, raw: str) -> str:
        """A text of Slack's as people see it, without mentions of us."""
        raw = self._make_mention_pattern().sub("", raw)
        unnamed = {(one[1], one[2]) for one in _MARKUP.finditer(raw) if one[1] in ("@", "#") and not one[3]}
        names = {(kind, id_): await self._look_up_name(kind, id_) for kind, id_ in unnamed}
        text = unescape(_MARKUP.sub(lambda found: _render_markup(found, names), raw))
        return _CODE_OR_EMOJI.sub(lambda found: found[1] or find_emoji(found[2]) or found[0], text).strip()

    async def _look_up_name(self, kind: str, id_: str) -> str:
        if id_ not in self._names:
            found = await _wait_briefly(self._fetch_person_name(id_) if kind == "@" else self._fetch_channel_name(id_))
            if found is None:
                return id_
            self._names[id_] = found or id_  # of whom Slack tells nothing once, it is not asked again
            if len(self._names) > NAMES:
                self._names.popitem(last=False)
        return self._names[id_]

    async def _fetch_person_name(self, user: str) -> str:
        found = (await fetch(self._client.users_info(user=user))).get("user", {})
        profile = found.get("profile", {})
        return str(profile.get("display_name") or profile.get("real_name") or found.get("name") or "")

    async def _fetch_channel_name(self, channel: str) -> str:
        return str((await fetch(self._client.conversations_info(channel=channel))).get("channel", {}).get("name") or "")

    async def _read_file(self, file: dict[str, Any]) -> str:
        """What stands in a text file; "" where it is none, or cannot be read."""
        if not str(file.get("mimetype", "")).startswith(TEXT_TYPES) and file.get("mode") != "snippet":
            return ""
        url = str(file.get("url_private_download") or file.get("url_private") or "")
        own = urlsplit(self._client.base_url).hostname
        host = urlsplit(url).hostname or ""
        if host != own and not host.endswith(".slack.com"):  # nobody else is shown the token
            return ""
        return await _wait_briefly(self._download(url)) or ""

    async def _download(self, url: str) -> str:
        session, found = self._client.session, b""
        assert session is not None
        headers = {"Authorization": f"Bearer {self._client.token}"}
        # Without the scope files:read Slack sends people to its login page.
        async with session.get(url, headers=headers, allow_redirects=False) as response:
            if response.status != 200:
                return ""
            async for chunk in response.content.iter_any():
                found += chunk
                if len(found) >= LARGEST_FILE:
                    break
        return found[:LARGEST_FILE].decode("utf-8-sig", "replace").strip()

    def _make_mention_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"\s*<@{self.me or 'nobody'}(?:\|[^<>]*)?>")


async def _wait_briefly(asked: Awaitable[Fetched]) -> Fetched | None:
    """Return what Slack tells within SECONDS; None where it does not, or the network is broken."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await asked
    except (TimeoutError, aiohttp.ClientError) as error:
        log.info("Slack does not tell: %r", error)
        return None


def _render_markup(found: re.Match[str], names: dict[tuple[str, str], str]) -> str:
    """What people see in the place of one piece of markup."""
    kind, target, label = found[1], found[2], found[3]
    if kind in ("@", "#"):
        return kind + (label or names[kind, target]).removeprefix(kind)
    if kind == "!":  # <!here>, <!subteam^S1|@team>, <!date^1392734382^{date}|Feb 18>
        return label or "@" + target.partition("^")[0]
    address = target.removeprefix("mailto:").removeprefix("tel:")
    return address if not label or label in address else f"{label} ({address})"


def _with_author(forwarded: dict[str, Any]) -> str:
    """A forwarded message, with who said it."""
    text, author = forwarded.get("text") or forwarded.get("fallback") or "", forwarded.get("author_name")
    return f"{author}: {text}" if author and text else text


def _file_name(file: dict[str, Any]) -> str:
    return str(file.get("name") or file.get("title") or "file")


def _kind(file: dict[str, Any]) -> str:
    if file.get("subtype") == "slack_audio":
        return "voice messages"
    return KINDS.get(str(file.get("mimetype", "")).partition("/")[0], "such files")
