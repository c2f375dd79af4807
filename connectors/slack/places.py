"""Places on Slack, the events in them, and what Slack refuses there."""

from dataclasses import dataclass

from slack_sdk.errors import SlackApiError


@dataclass(frozen=True)
class Place:
    """Where an answer goes: a channel, the thread in it ("" for none), the workspace."""

    channel: str
    thread: str
    team: str

    @property
    def is_direct(self) -> bool:
        """Whether it is a direct message."""
        return self.channel.startswith("D")


def make_event_id(channel: str, ts: str) -> str:
    """What names a message's event in the database."""
    return f"slack:{channel}:{ts}"


def read_error_code(error: BaseException) -> str:
    """Slack's code for what it refuses; "" where something else went wrong."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, SlackApiError):
        return ""
    said = error.response.data  # a page instead of JSON where something between us and Slack answered
    return str(said.get("error", "")) if isinstance(said, dict) else f"status {error.response.status_code}"
