"""Reactions: map an emoji of any platform to an opinion, by the lists in the config.

Skin tones and variation selectors are removed, and Slack's names are replaced by their characters.
"""

from bot.chat.slack_emoji import find_emoji
from bot.config import ReactionsConfig
from bot.types import FeedbackKind

VARIATION_SELECTORS = "\ufe0e\ufe0f"
SKIN_TONES = "".join(chr(tone) for tone in range(0x1F3FB, 0x1F400))
_STRIPPED = str.maketrans("", "", VARIATION_SELECTORS + SKIN_TONES)


class Reactions:
    """The opinions that emoji stand for."""

    def __init__(self, config: ReactionsConfig):
        listed = {FeedbackKind.APPROVAL: config.approval, FeedbackKind.DISAPPROVAL: config.disapproval}
        self._kinds = {normalise_symbol(symbol): kind for kind, symbols in listed.items() for symbol in symbols}

    def classify(self, symbol: str) -> FeedbackKind | None:
        """Return the opinion of a Unicode emoji, a Slack name or a custom emoji's name; None if it is neutral."""
        return self._kinds.get(normalise_symbol(symbol))


def normalise_symbol(symbol: str) -> str:
    """Return an emoji in one form: without skin tone and variation selector, as a character instead of a Slack name."""
    name = symbol.strip(":").partition("::")[0]  # Slack: +1::skin-tone-4
    return (find_emoji(name) or name).translate(_STRIPPED)
