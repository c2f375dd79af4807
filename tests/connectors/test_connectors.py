"""What the connectors share: splitting, emoji, streaming by edits, lanes."""

import asyncio
import re
import time
from itertools import pairwise

import pytest
from aiolimiter import AsyncLimiter
from conftest import until
from hypothesis import given
from hypothesis import strategies as st

from bot.chat.reactions import Reactions, normalise_symbol
from bot.config import ReactionsConfig
from bot.types import FeedbackKind
from connectors.base import Lanes
from connectors.splitting import count_utf16_units, find_open_fence, split
from connectors.streaming import Budgets, GrowingText

LINES = st.one_of(
    st.text(max_size=400),
    st.sampled_from(
        ["```", "```python", "~~~", "````", "```\n```", "    ```", "``` not a fence ```", "", " ", "a" * 900, "👩‍👩‍👧" * 60]
    ),
    st.lists(st.sampled_from(["word", "sentence.", "語", "👍🏽"]), max_size=200).map(" ".join),
)
TEXTS = st.lists(LINES, max_size=30).map("\n".join)


def fences_balance(text: str) -> bool:
    """Markdown's own rule, written again: a fence closes with as many of the same characters, and nothing after them."""
    opened = None
    for line in text.split("\n"):
        match = re.fullmatch(r" {0,3}(`{3,16}|~{3,16})([^`\n]{0,40})", line.rstrip("\r"))
        if match and opened is None:
            opened = match[1]
        elif match and match[1][0] == opened[0] and len(match[1]) >= len(opened) and not match[2].strip():
            opened = None
    return opened is None


@given(text=TEXTS, limit=st.integers(200, 700))
def test_parts_are_within_the_limit_whole_in_their_fences_and_give_the_text_back(text, limit):
    parts = split(text, limit)
    assert "".join(part.body for part in parts) == text
    assert all(count_utf16_units(part.text) <= limit for part in parts)
    assert all(fences_balance(part.text) for part in parts)
    assert all(part.body for part in parts[:-1]) or not text


def test_the_check_of_fences_would_notice_an_open_one():
    assert not fences_balance("```python\nx = 1")
    assert find_open_fence("```python\nx = 1") == "```python"


def test_code_that_is_cut_is_closed_and_opened_again_with_its_language():
    code = "\n".join(f"line_{number} = {number}" for number in range(100))
    parts = split(f"Look:\n\n```python\n{code}\n```\nDone.", 300)
    assert len(parts) > 3
    assert parts[0].text.endswith("\n```")
    assert all(part.text.startswith("```python\n") for part in parts[1:-1])
    assert parts[-1].text.endswith("```\nDone.")


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("a" * 150 + "\n\n" + "b " * 100, "a" * 150 + "\n\n"),
        ("a" * 150 + "\n" + "b " * 100, "a" * 150 + "\n"),
        ("a" * 150 + ". " + "b" * 100, "a" * 150 + ". "),
        ("a" * 150 + " " + "b" * 100, "a" * 150 + " "),
    ],
)
def test_a_cut_is_made_where_a_reader_would_make_it(text, first):
    assert split(text, 200)[0].body == first


def test_an_emoji_is_not_cut_in_two():
    parts = split("👍🏽" * 300, 200)
    assert all(part.body.startswith("👍") and part.body.endswith("🏽") for part in parts)


def test_a_megabyte_is_split_in_bounded_time():
    assert len(split("语言" * 500_000, 2000)) >= 500


@pytest.mark.parametrize(
    ("symbol", "plain"),
    [
        ("👍🏽", "👍"),
        ("❤️", "❤"),
        ("+1::skin-tone-4", "👍"),
        (":thumbsup:", "👍"),
        ("+1", "👍"),
        ("heart", "❤"),
        ("party_parrot", "party_parrot"),
    ],
)
def test_an_emoji_has_one_form_on_every_platform(symbol, plain):
    assert normalise_symbol(symbol) == plain


def test_an_emoji_is_the_opinion_that_the_config_says_and_others_are_neutral():
    reactions = Reactions(ReactionsConfig(approval=["👍", "party_parrot"], disapproval=["👎"]))
    assert reactions.classify("👍🏿") == reactions.classify("party_parrot") == FeedbackKind.APPROVAL
    assert reactions.classify("-1::skin-tone-2") == FeedbackKind.DISAPPROVAL
    assert reactions.classify("🤔") is None


async def test_a_growing_text_is_shown_newest_first_within_its_budget_and_in_the_end_whole():
    shown: list[str] = []
    flying = 0

    async def show(text: str) -> None:
        nonlocal flying
        flying += 1
        assert flying == 1  # one edit in flight
        await asyncio.sleep(0.01)
        shown.append(text)
        flying -= 1

    growing, began = GrowingText(show, AsyncLimiter(2, 0.1)), time.monotonic()
    for number in range(60):
        growing.add(f"{number} ")
        await asyncio.sleep(0.002)
    await growing.finish(growing.text + "end")
    assert shown[-1] == growing.text + "end"
    assert len(shown) <= 2 + 20 * (time.monotonic() - began) + 1  # two at once, then twenty a second, and the last
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))


async def test_an_edit_that_fails_is_made_good_and_a_final_one_that_fails_is_told():
    shown: list[str] = []

    async def show(text: str) -> None:
        if len(text) < 3:
            raise OSError("down")
        shown.append(text)

    growing = GrowingText(show, Budgets(1000, 1).get_limiter("here"))
    for piece in "abcdef":
        growing.add(piece)
        await asyncio.sleep(0.01)
    await until(lambda: shown and shown[-1] == "abcdef")
    with pytest.raises(OSError, match="down"):
        await growing.finish("x")
    assert shown[-1] == "abcdef"


def test_a_channel_keeps_its_budget_and_old_ones_are_forgotten():
    budgets = Budgets(1, 60, channels=2)
    assert budgets.get_limiter("a") is budgets.get_limiter("a")
    first = budgets.get_limiter("a")
    budgets.get_limiter("b"), budgets.get_limiter("c")
    assert budgets.get_limiter("a") is not first


async def test_a_lane_keeps_the_order_and_lanes_run_side_by_side():
    lanes = Lanes(depth=16)
    done: list[str] = []

    def work(name: str, after: int = 0):
        async def job() -> None:
            await until(lambda: len(done) >= after)
            done.append(name)

        return job

    assert lanes.put("slow", work("slow 1", after=1))  # it waits for the other lane
    assert lanes.put("slow", work("slow 2"))
    assert lanes.put("quick", work("quick 1"))
    await until(lambda: len(done) == 3)
    assert done == ["quick 1", "slow 1", "slow 2"]
    await until(lambda: not lanes._workers)
    assert lanes.put("slow", work("slow 3"))  # a lane that ran empty opens again
    await lanes.close(300)
    assert done[-1] == "slow 3"


async def test_a_full_lane_refuses_and_an_event_that_fails_does_not_end_it():
    lanes = Lanes(depth=2, total=3)
    blocked = asyncio.Event()

    async def fails() -> None:
        raise ZeroDivisionError

    assert lanes.put("a", fails)
    assert lanes.put("a", blocked.wait)
    assert not lanes.put("a", blocked.wait)
    assert lanes.put("b", blocked.wait)
    assert not lanes.put("c", blocked.wait)  # all lanes together are full
    await asyncio.sleep(0.01)
    assert lanes.put("a", fails)
    blocked.set()
    await lanes.close(300)
    assert not lanes.put("a", fails)  # closed


async def test_who_can_wait_gets_a_place_in_a_full_lane_and_none_in_a_closed_one():
    lanes = Lanes(depth=1)
    done: list[int] = []

    def work(number: int):
        async def job() -> None:
            await asyncio.sleep(0.01)
            done.append(number)

        return job

    assert await asyncio.gather(*(lanes.put_patiently("a", work(number)) for number in range(6))) == [True] * 6
    await until(lambda: sorted(done) == list(range(6)))
    assert lanes.put("a", asyncio.Event().wait)
    waiting = asyncio.create_task(lanes.put_patiently("a", work(6)))
    await asyncio.sleep(0.01)
    waiting_too = asyncio.create_task(lanes.put_patiently("a", work(7)))
    await asyncio.sleep(0.01)
    await lanes.close(0.01)
    assert await asyncio.gather(waiting, waiting_too) == [True, False]


async def test_what_does_not_end_in_time_is_cancelled():
    lanes = Lanes()
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    assert lanes.put("a", endless)
    await asyncio.sleep(0.01)
    await lanes.close(0.05)
    assert ended == ["cancelled"]
