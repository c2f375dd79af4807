"""Extract the words of a text for matching. All functions are pure."""

import re

import Stemmer

CHARACTERS = 4000  # characters of a message that are read
MIN_CONTENT_WORDS = 3  # a text with fewer says too little
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
ENGLISH_FUNCTION_WORDS = """
a about after all also am an and any are as at be been before being but by can could did do does doing for from get had has
have he her hers him his how i if in into is it its just like me my of on or our out she should so some than that the their
them then there these they this those to too up us was we were what when where which who whom whose why will with would you
your yours
"""
FUNCTION_WORDS = frozenset(ENGLISH_FUNCTION_WORDS.split())

_stem = Stemmer.Stemmer("english").stemWord
_POSSESSIVE = re.compile(r"['’]s?$")


def extract_words(text: str) -> list[str]:
    """Return the words of a text: case-folded and stemmed as English. Text without spaces becomes pairs of characters."""
    text = text[:CHARACTERS].casefold()
    found = []
    for word in WORD.findall(text):
        if UNSPACED.fullmatch(word):
            found += [word[start : start + 2] for start in range(max(1, len(word) - 1))]
        else:
            found.append(_stem(_POSSESSIVE.sub("", word)))
    return found


def clear_stem_cache() -> None:
    """Drop the stemmer's cache of words."""
    global _stem
    _stem = Stemmer.Stemmer("english").stemWord


def extract_content_words(text: str) -> set[str]:
    """Return the content words of a text, or none if there are too few to remember it."""
    found = set(extract_words(text)) - FUNCTION_WORDS
    return found if len(found) >= MIN_CONTENT_WORDS else set()
