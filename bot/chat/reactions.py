"""Reactions: which opinion an emoji is, on every platform.

Skin tones and variation selectors are stripped, Slack's names become the characters that they stand for. It knows no
person and no turn; which emoji mean what is in the config.
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
        """The opinion that a Unicode emoji, a Slack name or a custom emoji's name stands for; None where it is neutral."""
        return self._kinds.get(normalise_symbol(symbol))


def normalise_symbol(symbol: str) -> str:
    """One form for all that people see as the same emoji: no skin tone, no variation selector, no Slack name."""
    name = symbol.strip(":").partition("::")[0]  # Slack: +1::skin-tone-4
    return (find_emoji(name) or name).translate(_STRIPPED)
