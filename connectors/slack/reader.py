"""Read a Slack message as people see it, as plain text.

Markup becomes the names that people see, names of emoji become emoji, and text files become their text. Markup stays as it
is if Slack does not answer in time, or the app's scopes do not allow reading it.
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
from bot.errors import quote_first_line
from connectors.reading import KINDS, LARGEST_FILE, TEXT_TYPES, MessageContent
from connectors.slack.places import Place, read_error_code

log = logging.getLogger(__name__)

SPEECH = (None, "file_share", "me_message", "thread_broadcast")  # the subtypes of messages that people write
ANSWER_SECONDS = 2.0  # for Slack to send a name or a file: it wants a message acked within 3
NAMES = 10_000  # kept in memory
EARLIER = 20  # the newest messages of a thread that are shown with a message in it
_MARKUP = re.compile(r"<([@#!]?)([^<>|]+)(?:\|([^<>]*))?>")
_CODE_OR_EMOJI = re.compile(r"(```.*?```|`[^`\n]+`)|(?<!\w):([a-z0-9_+'-]+):(?!\w)", re.DOTALL)

Fetched = TypeVar("Fetched")


async def fetch(asked: Awaitable[Any]) -> dict[str, Any]:
    """Return Slack's response, or {} if it refuses."""
    try:
        return dict((await asked).data)
    except SlackApiError as error:
        log.info("Slack refused a request: %s", read_error_code(error))
        return {}


class SlackReader:
    """A reader of messages. `me` is the app's own user id, known once it is connected."""

    def __init__(self, web: AsyncWebClient):
        self.me = ""
        self._client = web
        self._names: OrderedDict[str, str] = OrderedDict()

    def mentions_us(self, message: dict[str, Any]) -> bool:
        """Return whether a message mentions the app."""
        return bool(self._make_mention_pattern().search(message.get("text") or ""))

    async def read(self, message: dict[str, Any]) -> MessageContent:
        """Read all of a message, including text files."""
        files = message.get("files") or []
        contents = await asyncio.gather(*(self._read_file(one) for one in files))
        return await self._compose_content(message, list(zip(files, contents, strict=True)))

    async def read_words(self, message: dict[str, Any]) -> str:
        """Return a message as people see it who scroll past it: its files are only named."""
        return (await self._compose_content(message, [(one, "") for one in message.get("files") or []])).text

    async def find_name(self, user: str) -> str:
        """Return the name that people see for a person, or the id if Slack does not send a name."""
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
        """Join the words of a message, those that it forwards, and its `files` with their contents."""
        forwarded = [one for one in message.get("attachments") or [] if one.get("is_share") or one.get("is_msg_unfurl")]
        raw = [message.get("text") or "", *(_with_author(one) for one in forwarded)]
        words = [await self._make_readable(one) for one in raw]
        words += [f"{_file_name(file)}:\n{content}" for file, content in files if content]
        unread = [file for file, content in files if not content]
        text = "\n".join(one for one in words if one)
        named = [f"[{_file_name(file)}: not readable]" for file in unread] if text else []
        return MessageContent("\n".join([text, *named]), tuple(dict.fromkeys(map(_kind, unread))))

    async def _make_readable(self, raw: str) -> str:
        """Return a text of Slack's as people see it, without mentions of us."""
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
            self._names[id_] = found or id_  # an unknown id is not asked for again
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
        """Return the content of a text file; "" if it is not a text file or cannot be read."""
        if not str(file.get("mimetype", "")).startswith(TEXT_TYPES) and file.get("mode") != "snippet":
            return ""
        url = str(file.get("url_private_download") or file.get("url_private") or "")
        own = urlsplit(self._client.base_url).hostname
        host = urlsplit(url).hostname or ""
        if host != own and not host.endswith(".slack.com"):  # send the token to nobody else
            return ""
        return await _wait_briefly(self._download(url)) or ""

    async def _download(self, url: str) -> str:
        session, found = self._client.session, b""
        assert session is not None
        headers = {"Authorization": f"Bearer {self._client.token}"}
        # Without the scope files:read Slack redirects to its login page.
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
    """Return Slack's response, or None if it takes more than ANSWER_SECONDS or the network fails."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await asked
    except (TimeoutError, aiohttp.ClientError) as error:
        log.info("Slack did not answer: %s", quote_first_line(error))
        return None


def _render_markup(found: re.Match[str], names: dict[tuple[str, str], str]) -> str:
    """Return what people see for one piece of markup."""
    kind, target, label = found[1], found[2], found[3]
    if kind in ("@", "#"):
        return kind + (label or names[kind, target]).removeprefix(kind)
    if kind == "!":  # <!here>, <!subteam^S1|@team>, <!date^1392734382^{date}|Feb 18>
        return label or "@" + target.partition("^")[0]
    address = target.removeprefix("mailto:").removeprefix("tel:")
    return address if not label or label in address else f"{label} ({address})"


def _with_author(forwarded: dict[str, Any]) -> str:
    """Return the text of a forwarded message, with its author's name."""
    text, author = forwarded.get("text") or forwarded.get("fallback") or "", forwarded.get("author_name")
    return f"{author}: {text}" if author and text else text


def _file_name(file: dict[str, Any]) -> str:
    return str(file.get("name") or file.get("title") or "file")


def _kind(file: dict[str, Any]) -> str:
    if file.get("subtype") == "slack_audio":
        return "voice messages"
    return KINDS.get(str(file.get("mimetype", "")).partition("/")[0], "such files")
