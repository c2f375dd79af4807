"""Reading: what a message says, and what of it cannot be read, on every platform."""

from dataclasses import dataclass

LARGEST_FILE = 100_000  # bytes of all text files of one message
TEXT_TYPES = ("text/", "application/json", "application/xml", "application/x-yaml", "application/toml")
KINDS = {"image": "pictures", "video": "videos", "audio": "sounds"}
NOTHING_SAID = "Yes? Ask me anything."


@dataclass(frozen=True)
class MessageContent:
    """What a message says: `text` for the policy ("" where there are no words), and which kinds of things are not in it."""

    text: str
    unreadable: tuple[str, ...] = ()

    @property
    def refusal(self) -> str:
        """One line to say where there are no words."""
        return f"Sorry, I can read words only, not {' or '.join(self.unreadable)}." if self.unreadable else NOTHING_SAID
