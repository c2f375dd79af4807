"""What a message says, and what in it cannot be read, the same on every platform."""

from dataclasses import dataclass

LARGEST_FILE = 100_000  # bytes, all text files of one message together
TEXT_TYPES = ("text/", "application/json", "application/xml", "application/x-yaml", "application/toml")
KINDS = {"image": "pictures", "video": "videos", "audio": "sounds"}
NOTHING_SAID = "Yes? Ask me anything."


@dataclass(frozen=True)
class MessageContent:
    """What a message says (`text`, "" if it has no words), and the kinds of things in it that cannot be read."""

    text: str
    unreadable: tuple[str, ...] = ()

    @property
    def refusal(self) -> str:
        """The reply to a message without words, in one line."""
        return f"Sorry, I can read words only, not {' or '.join(self.unreadable)}." if self.unreadable else NOTHING_SAID
