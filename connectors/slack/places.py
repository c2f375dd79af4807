"""Places on Slack, the ids of events in them, and Slack's error codes."""

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
    """Return the id of a message's event in the database."""
    return f"slack:{channel}:{ts}"


def read_error_code(error: BaseException) -> str:
    """Return Slack's code for a refusal; "" for any other error."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, SlackApiError):
        return ""
    said = error.response.data  # not JSON if something between us and Slack responded
    return str(said.get("error", "")) if isinstance(said, dict) else f"status {error.response.status_code}"
