"""The objects that all parts of the Slack connector share: the dialogue, access, the limits, and Slack's client."""

from aiolimiter import AsyncLimiter
from slack_sdk.http_retry.builtin_async_handlers import AsyncRateLimitErrorRetryHandler
from slack_sdk.web.async_client import AsyncWebClient

from bot.config import SlackConfig
from connectors.answers import Answers
from connectors.base import Lanes, Services
from connectors.commands import Commands
from connectors.slack.places import Place
from connectors.slack.reader import SlackReader
from connectors.slack.sessions import SlackSessions
from connectors.streaming import Budgets

SLACK = "slack"


class Workspace:
    """The shared objects of one app in one workspace."""

    def __init__(self, services: Services, config: SlackConfig, token: str, api: str):
        self.config = config
        self.dialogue = services.dialogue
        self.reactions = services.reactions
        self.access = services.access
        self.lanes = Lanes(config.waiting)
        self.budgets = Budgets(config.edits, 60)
        self.streams = AsyncLimiter(config.streams, 60)
        self.answers = Answers(services, SLACK)
        self.commands = Commands(services.desk, services.access, self.answers)
        self.client = AsyncWebClient(token=token, base_url=api)
        self.client.retry_handlers.append(AsyncRateLimitErrorRetryHandler(max_retry_count=5))
        self.reader = SlackReader(self.client)
        self.sessions = SlackSessions(self.client)

    async def say(self, place: Place, text: str) -> None:
        """Post a text of our own in a place."""
        await self.client.chat_postMessage(channel=place.channel, text=text, thread_ts=place.thread or None)
