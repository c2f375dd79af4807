"""Facts: finds statements of people about themselves in their messages. The newest statement about a thing holds.

It matches English sentences in the first person with patterns, so that nothing is guessed. Retrieval still finds messages
that they do not match. An older statement is not deleted; it becomes a former fact.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bot.types import Message, Role

MAX_VALUE_CHARACTERS = 80
MAX_READ_CHARACTERS = 2000  # of a message

# Pattern, name of the attribute, and whether a person may have several values at once. The value is the text from the
# pattern to the end of the clause. `{}` in a name stands for the text of the first group.
_PATTERNS: list[tuple[str, str, bool]] = [
    (r"my name(?:'s| is)", "name", False),
    (r"(?:please )?call me", "name", False),
    (r"i(?:'m| am)(?: actually| now| only)? allergic to", "is allergic to", False),
    (r"i(?:'m| am) not allergic to", "is not allergic to", False),
    (r"i(?: now)? live in|i(?:'ve| have)? moved to|i(?:'m| am) (?:now )?living in", "lives in", False),
    (r"i(?: now)? work (?:as|at|for)|i(?:'m| am) (?:now )?working (?:as|at|for)", "works as", False),
    (r"i(?: come|'m| am) from", "is from", False),
    (r"i speak", "speaks", True),
    (r"i(?:'m| am) (?:a|an)", "is a", True),
    (r"i (?:can't|cannot|can not|don't|do not) (eat|drink|drive|smoke)", "does not {}", True),
    (r"i (love|like|enjoy|hate|prefer)", "{}s", True),
    (r"i(?:'ve got| have| own) (?:a|an|one|two|three|four|\d+)", "has", True),
    (r"my birthday(?:'s| is)(?: on)?", "birthday", False),
    (r"my favou?rite (\w+)(?:'s| is| are)", "favourite {}", False),
    (r"my (\w+)'s name is", "{}'s name", False),
    (r"my (\w+)(?:'s| is| are) (?:called|named)", "{}'s name", False),
]
_FACTS = [(re.compile(rf"(?:^|[\s,.;!(])(?:{pattern})\s+", re.IGNORECASE), name, many) for pattern, name, many in _PATTERNS]
_CLAUSE = re.compile(r"[.!;,\n?()]|\s(?:and|but|because|so|since|which|not|though|i|we)\s", re.IGNORECASE)
_FILLER = re.compile(
    r"^(?:now|actually|really|still|just|only|also|to)\s+|\s+(?:now|actually|btw|lol|too|anymore|though)$", re.I
)
_OPPOSITE = {"is not allergic to": "is allergic to", "hates": "loves", "loves": "hates", "likes": "hates"}


@dataclass(frozen=True)
class Fact:
    """A statement of a person about themselves in a message."""

    person: str
    attribute: str
    value: str
    message: Message
    may_be_many: bool = False

    def __str__(self) -> str:
        return f"{self.person} {self.attribute} {self.value}"


def find_facts(message: Message) -> list[Fact]:
    """Return the facts in one message. Questions and answers of kibitz have none."""
    if message.role != Role.USER:
        return []
    text, found = message.text[:MAX_READ_CHARACTERS], []
    for pattern, name, many in _FACTS:
        for match in pattern.finditer(text):
            rest = text[match.end() :]
            end = _CLAUSE.search(rest)
            value = rest[: end.start() if end else None].strip()[:MAX_VALUE_CHARACTERS]
            value = _FILLER.sub("", value).strip(" '\"")
            if value and not (end and end.group() == "?"):
                about = name.format(next((group.lower() for group in match.groups() if group), ""))
                found.append(Fact(message.author_id, about, value, message, many))
    return found


def resolve_facts(said: Iterable[Message]) -> tuple[list[Fact], list[Fact]]:
    """Return the facts that hold and the former facts, each in order of time. The newest statement about a thing holds."""
    holding: dict[tuple[str, ...], Fact] = {}
    former: list[Fact] = []
    for message in sorted(said, key=lambda one: (one.at, one.id)):
        for fact in find_facts(message):
            gone = {_key(fact), *_find_opposites(fact)} & holding.keys()
            former += [holding.pop(key) for key in sorted(gone)]
            holding[_key(fact)] = fact
    return list(holding.values()), former


def _key(fact: Fact, about: str = "") -> tuple[str, ...]:
    thing = (fact.value.casefold(),) if fact.may_be_many else ()
    return (fact.person, about or fact.attribute, *thing)


def _find_opposites(fact: Fact) -> list[tuple[str, ...]]:
    return [_key(fact, _OPPOSITE[fact.attribute])] if fact.attribute in _OPPOSITE else []
