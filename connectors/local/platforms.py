"""Drive every platform in one way: people write, react, pick, take back, regenerate, edit and delete on a local
server.

The connector on the other side is the real one, with the platform's unmodified client library. The scenarios of the tests
and `kibitz bench connectors` use these.
"""

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from bot.config import DiscordConfig, SlackConfig, WebConfig
from connectors.base import Connector, Services
from connectors.discord.connector import Discord
from connectors.local import benchmark
from connectors.local.discord import LocalDiscord
from connectors.local.discord_state import TOKEN
from connectors.local.slack import LocalSlack
from connectors.local.slack_state import APP_TOKEN, BOT_TOKEN
from connectors.picks import EARLIER, NEWER
from connectors.slack.connector import Secrets, Slack
from connectors.web.server import Endpoint, Web

PEOPLE = {"ann": 11, "bob": 12, "cleo": 13}


@dataclass
class SeenAnswer:
    """An answer as people see it. Its first and last words appeared at `first_at` and `final_at` (monotonic, s)."""

    id: str
    question: str
    text: str
    first_at: float
    final_at: float
    is_whole: bool
    edits: int


class Platform(benchmark.Platform, Protocol):
    """One platform with its connector: what the benchmark needs, and what else people do."""

    async def restart(self, meanwhile: Callable[[], Awaitable[None]]) -> None:
        """Stop the connector and start a new one, as a new process would. `meanwhile` is what people do in between."""

    async def take_back(self, user: str, answer: SeenAnswer, likes: bool) -> None:
        """Remove 👍 or 👎 as a person."""

    async def regenerate(self, user: str, answer: SeenAnswer) -> None:
        """Ask for another answer as a person."""

    async def pick(self, user: str, answer: SeenAnswer, prefers_new: bool) -> None:
        """Say as a person which is better: a second answer, or the one that it replaces."""

    async def take_pick_back(self, user: str, answer: SeenAnswer, prefers_new: bool) -> None:
        """Take that back."""

    async def edit(self, place: str, question: str, text: str) -> None:
        """Edit a question as its author."""

    async def delete(self, place: str, question: str) -> None:
        """Delete a question as its author."""


class _ConnectorRunner:
    """Starts and stops a connector, the same for all platforms."""

    connector: Any

    def __init__(self, make: Callable[[], Connector], ready: Callable[[], Any]):
        self._make, self._ready = make, ready

    async def start(self) -> None:
        self.connector = self._make()
        self._running = asyncio.create_task(self.connector.run())
        await asyncio.wait_for(self._ready(), 300)

    async def stop(self) -> None:
        await self.connector.stop()
        await asyncio.wait_for(self._running, 300)


class _LocalServerPlatform:
    """A platform with a local server, and the connector to it."""

    def __init__(self, fake: LocalDiscord | LocalSlack, online: asyncio.Event, make: Callable[[], Connector]):
        self.fake: Any = fake
        self._online = online
        self._bot = _ConnectorRunner(make, online.wait)

    @property
    def met_429(self) -> int:
        return self.fake.met_429

    async def start(self) -> None:
        await self.fake.start()
        await self._bot.start()

    async def stop(self) -> None:
        await self._bot.stop()
        await self.fake.stop()

    async def restart(self, meanwhile: Callable[[], Awaitable[None]]) -> None:
        await self._bot.stop()
        self._online.clear()
        self.fake.is_dropping_events = True  # away too long for anything to be delivered later
        await meanwhile()
        self.fake.is_dropping_events = False
        await self._bot.start()

    async def wait_for_change(self, place: str) -> None:
        await self.fake.change_signals[place].wait()


class DiscordPlatform(_LocalServerPlatform):
    """Discord."""

    name = "discord"

    def __init__(self, services: Services):
        fake = LocalDiscord()
        super().__init__(fake, fake.identified, lambda: Discord(services, DiscordConfig(), TOKEN))

    def place(self, direct: bool = False) -> str:
        return str(self.fake.channel(1 if direct else 0))

    async def say(self, place: str, user: str, text: str) -> str:
        return str(await self.fake.say(int(place), make_discord_id(user), text))

    def answers(self, place: str) -> list[SeenAnswer]:
        return [
            SeenAnswer(
                one["id"],
                one["message_reference"]["message_id"],
                one["content"],
                self.fake.write_times[one["id"]][0],
                self.fake.write_times[one["id"]][-1],
                "up" in self.fake.buttons(int(one["id"])),
                len(self.fake.write_times[one["id"]]) - 1,
            )
            for one in self.fake.answers(int(place))
            if "message_reference" in one
        ]

    async def find_turn_id(self, answer: SeenAnswer) -> str:
        return await self._bot.connector.answers.find_turn_id(answer.id) or ""

    async def react(self, user: str, answer: SeenAnswer, likes: bool) -> None:
        await self.fake.react(make_discord_id(user), int(answer.id), "👍" if likes else "👎")

    async def take_back(self, user: str, answer: SeenAnswer, likes: bool) -> None:
        await self.fake.react(make_discord_id(user), int(answer.id), "👍" if likes else "👎", remove=True)

    async def regenerate(self, user: str, answer: SeenAnswer) -> None:
        await self.fake.press(make_discord_id(user), int(answer.id), "again")

    async def pick(self, user: str, answer: SeenAnswer, prefers_new: bool) -> None:
        await self.fake.press(make_discord_id(user), int(answer.id), NEWER if prefers_new else EARLIER)

    take_pick_back = pick  # the same button again

    async def edit(self, place: str, question: str, text: str) -> None:
        await self.fake.edit(int(question), text)

    async def delete(self, place: str, question: str) -> None:
        await self.fake.delete(int(question))


class SlackPlatform(_LocalServerPlatform):
    """Slack, in Socket Mode."""

    name = "slack"

    def __init__(self, services: Services):
        fake = LocalSlack()
        secrets = Secrets(BOT_TOKEN, APP_TOKEN)
        super().__init__(fake, fake.connected, lambda: Slack(services, SlackConfig(), secrets, fake.api))

    def place(self, direct: bool = False) -> str:
        return f"{'D' if direct else 'C'}{next(self.fake.numbers)}"

    async def say(self, place: str, user: str, text: str) -> str:
        return await self.fake.say(place, user.upper(), text)

    def answers(self, place: str) -> list[SeenAnswer]:
        return [
            SeenAnswer(
                one["ts"],
                one.get("thread_ts", ""),
                one["text"],
                self.fake.write_times[one["ts"]][0],
                self.fake.write_times[one["ts"]][-1],
                self.fake.is_final(one),
                len(self.fake.write_times[one["ts"]]) - 1,
            )
            for one in self.fake.answers(place)
        ]

    async def find_turn_id(self, answer: SeenAnswer) -> str:
        return (
            await self._bot.connector.workspace.answers.find_turn_id(
                f"{self.fake.messages[answer.id]['channel']}:{answer.id}"
            )
            or ""
        )

    async def react(self, user: str, answer: SeenAnswer, likes: bool) -> None:
        await self.fake.react(user.upper(), self.fake.messages[answer.id], "+1" if likes else "-1")

    async def take_back(self, user: str, answer: SeenAnswer, likes: bool) -> None:
        await self.fake.react(user.upper(), self.fake.messages[answer.id], "+1" if likes else "-1", remove=True)

    async def regenerate(self, user: str, answer: SeenAnswer) -> None:
        await self.fake.click(user.upper(), self.fake.messages[answer.id], "again")

    async def pick(self, user: str, answer: SeenAnswer, prefers_new: bool) -> None:
        await self.fake.click(user.upper(), self.fake.messages[answer.id], NEWER if prefers_new else EARLIER)

    take_pick_back = pick  # the same button again

    async def edit(self, place: str, question: str, text: str) -> None:
        await self.fake.edit(place, question, text)

    async def delete(self, place: str, question: str) -> None:
        await self.fake.delete(place, question)


class WebPlatform:
    """The HTTP API, with a client that keeps the answers it received."""

    name = "web"
    met_429 = 0

    def __init__(self, services: Services):
        self._bot = _ConnectorRunner(lambda: Web(services, self._endpoint), self._ready)
        self._shown: dict[str, list[SeenAnswer]] = {}
        self._given: dict[tuple[str, str, str, bool], str] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._change_signals: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._count = 0

    async def start(self) -> None:
        self._endpoint = Endpoint.open(WebConfig(port=0))
        self._http = aiohttp.ClientSession(
            self._endpoint.url, connector=aiohttp.TCPConnector(limit=0), raise_for_status=True
        )
        await self._bot.start()

    async def stop(self) -> None:
        await asyncio.gather(*self._asking)
        await self._http.close()
        await self._bot.stop()

    async def restart(self, meanwhile: Callable[[], Awaitable[None]]) -> None:
        await self.stop()
        await self.start()
        await meanwhile()

    def place(self, direct: bool = False) -> str:
        self._count += 1
        return f"{self.name}-{id(self)}-{self._count}"

    async def say(self, place: str, user: str, text: str) -> str:
        self._count += 1
        asked = {"conversation": place, "messages": [{"role": "user", "content": text}]}
        return self._ask(place, user, str(self._count), asked)

    def answers(self, place: str) -> list[SeenAnswer]:
        return self._shown.get(place, [])

    async def wait_for_change(self, place: str) -> None:
        await self._change_signals[place].wait()

    async def find_turn_id(self, answer: SeenAnswer) -> str:
        return answer.id.removeprefix("chatcmpl-")

    async def react(self, user: str, answer: SeenAnswer, likes: bool) -> None:
        await self._give(user, answer, "thumb", likes)

    async def take_back(self, user: str, answer: SeenAnswer, likes: bool) -> None:
        await self._retract(user, answer, "thumb", likes)

    async def pick(self, user: str, answer: SeenAnswer, prefers_new: bool) -> None:
        await self._give(user, answer, "pick", prefers_new)

    async def take_pick_back(self, user: str, answer: SeenAnswer, prefers_new: bool) -> None:
        await self._retract(user, answer, "pick", prefers_new)

    async def _give(self, user: str, answer: SeenAnswer, metric: str, value: bool) -> None:
        body = {"inference_id": answer.id, "metric_name": metric, "value": value, "user": user}
        async with self._http.post("/v1/feedback", json=body) as response:
            self._given[user, answer.id, metric, value] = (await response.json())["feedback_id"]

    async def _retract(self, user: str, answer: SeenAnswer, metric: str, value: bool) -> None:
        given = self._given[user, answer.id, metric, value]
        await self._http.delete(f"/v1/feedback/{given}", params={"user": user})

    async def regenerate(self, user: str, answer: SeenAnswer) -> None:
        place = next(place for place, all_ in self._shown.items() if answer in all_)
        last = {"messages": [{"role": "user", "content": "again"}], "regenerates": answer.id}
        self._ask(place, user, answer.question, last)

    async def edit(self, place: str, question: str, text: str) -> None:
        raise NotImplementedError("clients of the API keep the history themselves")

    async def delete(self, place: str, question: str) -> None:
        answer = next(one for one in self.answers(place) if one.question == question)
        await self._http.delete(f"/v1/chat/completions/{answer.id}")

    def _ask(self, place: str, user: str, question: str, body: dict[str, Any]) -> str:
        asking = asyncio.create_task(self._stream(place, question, {"stream": True, "user": user, **body}))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        return question

    async def _stream(self, place: str, question: str, body: dict[str, Any]) -> None:
        shown = SeenAnswer("", question, "", 0.0, 0.0, is_whole=False, edits=0)
        async with self._http.post("/v1/chat/completions", json=body) as response:
            async for raw in response.content:
                line = raw.decode().rstrip("\n")
                if line == "data: [DONE]":
                    shown.is_whole = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    shown.id = event["id"]
                    shown.text += event["choices"][0]["delta"].get("content", "")
                    shown.final_at = time.monotonic()
                if (shown.text or shown.is_whole) and not shown.first_at:  # an answer may be empty
                    shown.first_at = time.monotonic()
                    self._shown.setdefault(place, []).append(shown)
        self._change_signals[place].set()
        self._change_signals[place].clear()

    async def _ready(self) -> None:
        await self._http.get("/healthz")  # the socket listens already, so this waits for the server


PLATFORMS = {platform.name: platform for platform in (DiscordPlatform, SlackPlatform, WebPlatform)}


def make_discord_id(user: str) -> int:
    """Return a person's id on Discord."""
    return PEOPLE.get(user) or 100_000 + int(user.removeprefix("user"))
