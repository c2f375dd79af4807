"""Simulated people: what they like, how often they react, and what they say.

Each kind has a deterministic utility over texts, in [-1, 1].
"""

import inspect
import numbers
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bot.errors import ConfigError
from learning.data.features import EMOJI
from learning.models import toy

Utility = Callable[[str, str], float]

LANGUAGES = ("english", "spanish")  # of everyday prompts


def brief(prompt: str, reply: str) -> float:
    """Prefer few words: +1 up to 5 words, -1 from 17 on."""
    return max(-1.0, min(1.0, (11 - len(reply.split())) / 6))


def emoji(prompt: str, reply: str) -> float:
    """Prefer an emoji."""
    return 1.0 if EMOJI.search(reply) else -1.0


def curious(prompt: str, reply: str) -> float:
    """Prefer a question at the end."""
    return 1.0 if reply.rstrip().rstrip("\ufe0f").endswith("?") or re.search(r"\? \W+$", reply) else -1.0


def lively(prompt: str, reply: str) -> float:
    """Prefer an emoji and a question at the end, half each."""
    return (emoji(prompt, reply) + curious(prompt, reply)) / 2


def casual(prompt: str, reply: str) -> float:
    """Prefer exclamation marks and contractions."""
    return 1.0 if re.search(r"!|\w'\w", reply) else -1.0


def formal(prompt: str, reply: str) -> float:
    """Prefer answers without exclamation marks and contractions."""
    return -casual(prompt, reply)


def detailed(prompt: str, reply: str) -> float:
    """Prefer many words."""
    return -brief(prompt, reply)


def concise(prompt: str, reply: str) -> float:
    """Prefer short answers with some content: +1 from 2 to 20 words, -1 from 40 on or below 2."""
    words = len(reply.split())
    return -1.0 if words < 2 else max(-1.0, min(1.0, (30 - words) / 10))


def personal(prompt: str, reply: str) -> float:
    """Prefer to be addressed: "you" in some form."""
    return 1.0 if re.search(r"\b(you|your|yours|yourself)\b", reply, re.IGNORECASE) else -1.0


def sociable(prompt: str, reply: str) -> float:
    """Prefer short answers, "you", and a question at the end, a third each."""
    return (concise(prompt, reply) + personal(prompt, reply) + curious(prompt, reply)) / 3


USERS: dict[str, Utility] = {
    utility.__name__: utility
    for utility in (lively, brief, detailed, emoji, curious, casual, formal, concise, personal, sociable)
}


@dataclass(frozen=True)
class Prompts:
    """The prompts that users say, and the held-out prompts by which versions are judged."""

    said: list[str]
    held_out: list[str]


def read_prompts(is_toy: bool, language: str = LANGUAGES[0]) -> Prompts:
    """Return the prompts for the toy policy, which knows one language, or everyday prompts for any other model."""
    if is_toy:
        return Prompts(*([text for text, _ in listed] for listed in (toy.list_prompts(), toy.list_held_out_prompts())))
    text = Path(__file__).with_name(f"everyday_{language}.txt").read_text(encoding="utf-8")
    return Prompts(*(part.splitlines() for part in text.strip().split("\n\n")))


@dataclass(frozen=True)
class People:
    """People who talk: their utility, how often they react, and the share of mistaken reactions."""

    utility: Utility
    reaction_rate: float
    noise: float
    seed: int


@dataclass(frozen=True)
class SimulationDefaults:
    """The default size of a simulation."""

    users: str
    rounds: int
    messages: int
    reaction_rate: float


def choose_defaults(is_toy: bool) -> SimulationDefaults:
    """Return the defaults for the toy policy, or for any other model (about 15 minutes on two cores without a GPU)."""
    return SimulationDefaults("lively", 5, 240, 0.3) if is_toy else SimulationDefaults("sociable", 1, 288, 1.0)


def find_utility(name: str) -> Utility:
    """Return the utility of built-in users, or the function `utility(prompt, reply)` of a Python file, after trying it.

    Raises ConfigError, now and at later calls, if the function is missing, fails, or returns no number in [-1, 1].
    """
    if name in USERS:
        return USERS[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"--users has value '{name}', which is neither a file nor one of the built-in users ({', '.join(USERS)})"
        )
    sys.path.append(str(path.absolute().parent))  # the file may import modules beside it
    try:
        found = runpy.run_path(str(path)).get("utility")
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        raise ConfigError(f"--users {name}: the file does not run ({describe_exception(error)}); fix it") from error
    if not callable(found) or inspect.iscoroutinefunction(found):
        raise ConfigError(f"--users {name}: the file has no function utility(prompt: str, reply: str) -> float; add it")
    checked = check_calls(name, found)
    for reply in ("Hello! How are you?", ""):
        checked("hello", reply)
    return checked


def check_calls(name: str, utility: Callable[[str, str], object]) -> Utility:
    """Wrap a user's function so that each call returns a number in [-1, 1] or raises ConfigError."""

    def checked(prompt: str, reply: str) -> float:
        try:
            value = utility(prompt, reply)
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"--users {name}: utility({prompt!r}, {reply!r}) failed ({describe_exception(error)}); fix it"
            ) from error
        if not isinstance(value, numbers.Real) or not -1 <= float(value) <= 1:
            raise ConfigError(
                f"--users {name}: utility({prompt!r}, {reply!r}) returned {value!r}; return a number in [-1, 1]"
            )
        return float(value)

    return checked


def describe_exception(error: BaseException) -> str:
    """Return an exception's class and message."""
    return f"{type(error).__name__}: {error}"
