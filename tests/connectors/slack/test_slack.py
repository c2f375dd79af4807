"""The Slack connector: the unmodified slack-bolt against a Slack of our own, the real vLLM behind it."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
import pytest_asyncio
from conftest import PATIENT, explained, shared, until
from slack_sdk.signature import SignatureVerifier

from bot.config import AccessConfig, SlackConfig
from bot.errors import ConfigError, ConnectorError
from bot.store.feedback import not_retracted
from bot.store.picks import PICK
from bot.types import FeedbackKind
from connectors.answers import BUSY, NOT_ADMITTED, NOT_RECORDED, NOTED, SORRY, TAKEN_BACK
from connectors.local.slack import LocalSlack
from connectors.local.slack_state import APP_TOKEN, BOT, BOT_TOKEN, NUMBERS
from connectors.picks import PICKS
from connectors.slack.connector import GREETING, Secrets, Slack
from connectors.slack.messages import neutralize_mentions
from learning.data.rewards import compute_reward

ANN, BOB = "UANN", "UBOB"


@pytest_asyncio.fixture(loop_scope="session")
async def platform() -> AsyncIterator[LocalSlack]:
    fake = LocalSlack()
    await fake.start()
    yield fake
    await fake.stop()


async def connected(
    live, platform: LocalSlack, access: AccessConfig = PATIENT, **settings: object
) -> tuple[Slack, asyncio.Task[None]]:
    platform.connected.clear()
    config = SlackConfig(**{"edits": 1000, "streams": 1000, **settings})
    bot = Slack(shared(live, access), config, Secrets(BOT_TOKEN, APP_TOKEN), platform.api)
    running = asyncio.create_task(bot.run())
    await asyncio.wait_for(platform.connected.wait(), 300)
    return bot, running


async def closed(bot: Slack, running: asyncio.Task[None]) -> None:
    await bot.stop()
    await asyncio.wait_for(running, 300)


@pytest_asyncio.fixture(loop_scope="session")
async def bot(live, platform) -> AsyncIterator[Slack]:
    found, running = await connected(live, platform)
    yield found
    await closed(found, running)


async def quiet(bot: Slack) -> None:
    """Nothing is being worked off, and nothing that was missed is being read."""

    def reads() -> bool:
        return any(getattr(task.get_coro(), "__name__", "") == "reconcile" for task in asyncio.all_tasks())

    await until(lambda: not bot.workspace.lanes._workers and not reads())


def channel(kind: str = "C") -> str:
    """A new channel (C) or direct message (D). No other test of the run has it: what is gone there would be forgotten."""
    return f"{kind}{next(NUMBERS)}"


async def answered(platform: LocalSlack, place: str, count: int = 1) -> dict:
    """The newest of `count` answers in a channel, when all of them stand whole, with their buttons."""
    await until(lambda: sum(platform.is_final(one) for one in platform.answers(place)) >= count)
    return platform.answers(place)[-1]


async def told(live, bot: Slack, answer: dict):
    """The turn of an answer, as soon as it is stored: people see it a moment before."""
    return await explained(live, bot.workspace.answers, f"{answer['channel']}:{answer['ts']}")


async def opinions(live, bot: Slack, answer: dict) -> dict[str, float]:
    found = await told(live, bot, answer)
    earned = compute_reward(found.feedback, found.turn.asker_id, live.config.rewards)
    return {} if earned is None else earned.opinions


async def test_a_mention_is_answered_once_in_a_thread_by_a_native_stream(live, platform, bot):
    place = channel()
    asked = await platform.say(place, ANN, "hello")
    answer = await answered(platform, place)
    found = await told(live, bot, answer)
    assert answer["text"] == found.turn.text
    assert answer["thread_ts"] == asked
    assert (await live.database.call(live.store.read_message, found.turn.message_id)).text == "hello"
    assert "chat.startStream" in platform.calls
    assert platform.refused == []
    await quiet(bot)
    assert len(platform.answers(place)) == 1  # app_mention and message are one post


async def test_one_event_four_times_at_once_gives_one_answer(platform, bot):
    place = channel("D")
    await platform.say(place, ANN, "hello", repeat=4)
    await answered(platform, place)
    await quiet(bot)
    assert len(platform.answers(place)) == 1


async def test_a_direct_message_is_answered_flat_and_remembered(live, platform, bot, tokenizer):
    place = channel("D")
    await platform.say(place, ANN, "hello")
    first = await answered(platform, place)
    await platform.say(place, ANN, "1 &lt; 2 &amp;&amp; 3 &gt; 2")
    second = await answered(platform, place, 2)
    assert "thread_ts" not in first
    turn = (await told(live, bot, second)).turn
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": (await told(live, bot, first)).turn.text}]
    assert list(turn.prompt_ids) == tokenizer.prompt_ids([*chat, {"role": "user", "content": "1 < 2 && 3 > 2"}])


async def test_threads_are_conversations(live, platform, bot):
    place = channel()
    root = await platform.say(place, ANN, "hello")
    first = await answered(platform, place)
    await platform.say(place, BOB, "i can't sleep", thread=root)
    second = await answered(platform, place, 2)
    await platform.say(place, BOB, "hello")
    third = await answered(platform, place, 3)
    turns = [(await told(live, bot, one)).turn for one in (first, second, third)]
    assert turns[0].conversation_id == turns[1].conversation_id != turns[2].conversation_id


async def test_where_streams_are_refused_or_used_up_answers_are_posted_and_edited(live, platform):
    bot, running = await connected(live, platform, streams=1)
    for place in (channel(), channel()):
        await platform.say(place, ANN, "hello")
        answer = await answered(platform, place)
        assert answer["text"] == (await told(live, bot, answer)).turn.text
    assert platform.calls.count("chat.startStream") == 1
    await closed(bot, running)
    platform.no_streams = True
    bot, running = await connected(live, platform)
    place = channel()
    await platform.say(place, ANN, "hello")
    answer = await answered(platform, place)
    assert answer["text"] == (await told(live, bot, answer)).turn.text
    await closed(bot, running)


async def test_reactions_arrive_in_any_order_and_last_ones_hold(live, platform, bot):
    place = channel()
    await platform.say(place, ANN, "hello")
    answer = await answered(platform, place)
    await platform.react(ANN, answer, "+1::skin-tone-4")
    await platform.react(BOB, answer, "-1")
    await platform.react(BOB, answer, "thinking_face")
    await platform.react(BOT, answer, "+1")
    assert await opinions(live, bot, answer) == {ANN: 1.0, BOB: -1.0}
    early, late = platform.ts(), platform.ts()
    await platform.react(BOB, answer, "heart", remove=True, at=late)
    await platform.react(BOB, answer, "heart", at=early)  # arrives after its removal
    await platform.react(BOB, answer, "-1", remove=True)
    assert await opinions(live, bot, answer) == {ANN: 1.0}
    unknown = {"channel": place, "ts": "1.000001"}
    await platform.react(ANN, unknown, "+1")  # acked, and nothing else


async def test_buttons_count_once_and_the_last_click_holds(live, platform, bot):
    place = channel()
    await platform.say(place, ANN, "hello")
    answer = await answered(platform, place)
    for act, worth in (("up", 1.0), ("up", 1.0), ("down", -1.0)):
        await platform.click(BOB, answer, act)
        assert await opinions(live, bot, answer) == {BOB: worth}


async def test_an_answer_is_regenerated_in_its_thread(live, platform, bot):
    place = channel()
    await platform.say(place, ANN, "hello")
    first = await answered(platform, place)
    await platform.click(ANN, first, "again")
    second = await answered(platform, place, 2)
    before, after = await told(live, bot, first), await told(live, bot, second)
    assert after.turn.replaces == before.turn.id
    assert second["thread_ts"] == first["thread_ts"]
    assert [row.kind for row in before.feedback] == [FeedbackKind.REGENERATE]


async def test_a_growing_answer_is_stopped_by_its_button_and_by_slack_itself(live, platform, bot, monkeypatch):
    reply = live.policy.reply

    async def endless(*prompt, on_text, stop, **options):
        on_text("Once upon a time")
        while not stop.is_set():
            await asyncio.sleep(0.05)
            on_text(".")
        return await reply(*prompt, on_text=on_text, stop=stop, **options)

    monkeypatch.setattr(live.policy, "reply", endless)
    direct, place = channel("D"), channel()
    await platform.say(direct, ANN, "tell me a story")
    await until(lambda: platform.answers(direct))
    await platform.click(BOB, platform.answers(direct)[0], "stop")
    await platform.say(place, ANN, "tell me a story")
    await until(lambda: platform.answers(place))
    platform.answers(place)[0]["stopped"] = True
    for where in (direct, place):
        answer = await answered(platform, where)
        assert (await told(live, bot, answer)).turn.finish_reason == "stopped"


async def test_what_is_changed_or_deleted_while_it_waits_is_answered_as_it_is_then(live, platform, bot, monkeypatch):
    reply, begun, free = live.policy.reply, asyncio.Event(), asyncio.Event()

    async def held(*prompt, **options):
        begun.set()
        await free.wait()
        return await reply(*prompt, **options)

    monkeypatch.setattr(live.policy, "reply", held)
    direct = channel("D")
    said = [await platform.say(direct, ANN, "hello")]
    await begun.wait()  # it is not shown what is said from here on
    said += [await platform.say(direct, ANN, text) for text in ("tell me a joke", "good night")]
    await platform.delete(direct, said[1])
    await platform.edit(direct, said[2], "what should i eat")
    free.set()
    await answered(platform, direct, 2)
    await quiet(bot)
    assert len(platform.answers(direct)) == 2  # nobody is told anything about what was deleted
    turns = [(await told(live, bot, one)).turn for one in platform.answers(direct)]
    asked = [await live.database.call(live.store.read_message, turn.message_id) for turn in turns]
    assert [one.text for one in asked] == ["hello", "what should i eat"]
    prompt = live.dialogue.tracker.tokenizer.hf.decode(turns[1].prompt_ids)
    assert "what should i eat" in prompt
    assert "good night" not in prompt


async def test_buttons_of_another_process_work_and_a_new_socket_is_made(live, platform):
    bot, running = await connected(live, platform)
    place = channel()
    await platform.say(place, ANN, "hello")
    answer = await answered(platform, place)
    await closed(bot, running)
    bot, running = await connected(live, platform)
    await platform.click(ANN, answer, "up")
    await platform.disconnect()
    await asyncio.wait_for(platform.connected.wait(), 300)
    await platform.react(BOB, answer, "-1")
    assert await opinions(live, bot, answer) == {ANN: 1.0, BOB: -1.0}
    await closed(bot, running)


async def test_what_cannot_be_committed_is_not_acked_and_comes_again(live, platform, bot, monkeypatch):
    place = channel("D")
    add, failures, loop = live.store.add_message, iter([True, False]), asyncio.get_running_loop()

    def failing(message):
        if next(failures, False):
            loop.call_soon_threadsafe(loop.call_later, 0.5, platform.redeliver_unacked)
            raise OSError("disk full")
        return add(message)

    monkeypatch.setattr(live.store, "add_message", failing)
    before = platform.deliveries
    await platform.say(place, ANN, "hello")
    assert platform.deliveries == before + 2  # refused once, then taken
    await answered(platform, place)
    assert len(platform.answers(place)) == 1


async def test_a_storm_of_429_loses_nothing_and_a_busy_conversation_refuses_politely(live, platform):
    bot, running = await connected(live, platform, waiting=2)
    place = channel("D")
    platform.rate_limited = 3
    for number in range(6):
        await platform.say(place, ANN, f"hello {number}")
    await until(lambda: any(one["text"] == BUSY for one in platform.answers(place)))
    await until(lambda: sum(platform.is_final(one) for one in platform.answers(place)) >= 2)
    assert platform.refused == []
    await closed(bot, running)


async def test_forty_conversations_at_once_lose_and_double_nothing(platform, bot):
    places = [channel("D") for _ in range(40)]
    await asyncio.gather(*(platform.say(place, f"U{number}", "hello") for number, place in enumerate(places)))
    for place in places:
        await answered(platform, place)
    assert [len(platform.answers(place)) for place in places] == [1] * 40


async def test_who_is_denied_is_neither_answered_nor_counted_by_any_button(live, platform):
    bot, running = await connected(live, platform, AccessConfig(deny_users=[BOB], messages_per_minute=100_000))
    place = channel()
    await platform.say(place, BOB, "hello")
    await platform.say(place, ANN, "hello")
    answer = await answered(platform, place)
    await platform.react(BOB, answer, "-1")
    for act in ("up", "down", "again"):
        await platform.click(BOB, answer, act)
    await quiet(bot)
    assert (await told(live, bot, answer)).feedback == []
    assert len(platform.answers(place)) == 1
    await platform.click(ANN, answer, "again")  # the control: who is not denied may
    await answered(platform, place, 2)
    await closed(bot, running)


async def test_after_a_thumb_down_people_may_say_why(live, platform, bot):
    place = channel()
    await platform.say(place, ANN, "hello")
    answer = await answered(platform, place)
    await platform.click(BOB, answer, "down")
    view = await asyncio.wait_for(platform.views.get(), 300)
    assert await opinions(live, bot, answer) == {BOB: -1.0}
    await platform.submit(BOB, view, "  ")  # skipped
    await platform.submit(BOB, view, "It was rude.", ["tone", "too long"], "V-first")
    assert await reasons_of(live, bot, answer) == ["It was rude.", "tone", "too long"]
    await platform.click(BOB, answer, "down")
    view = await asyncio.wait_for(platform.views.get(), 300)
    assert sorted(one["value"] for one in view["blocks"][0]["element"]["initial_options"]) == ["tone", "too long"]
    await platform.submit(BOB, view, "", ["tone"])
    assert await reasons_of(live, bot, answer) == ["It was rude.", "tone"]
    await platform.submit(BOB, view, "It was rude.", ["tone", "too long"], "V-first")  # delivered again, late
    assert await reasons_of(live, bot, answer) == ["It was rude.", "tone"]
    await platform.submit(BOB, view, "", ["tone", "unsafe"])
    assert await reasons_of(live, bot, answer) == ["It was rude.", "tone", "unsafe"], "the control: a new one counts"
    assert await opinions(live, bot, answer) == {BOB: -1.0}


async def reasons_of(live, bot, answer) -> list[str]:
    said = not_retracted((await told(live, bot, answer)).feedback)
    return sorted(row.text for row in said if row.kind == FeedbackKind.COMMENT)


async def test_reasons_over_the_limit_stay_in_the_open_modal(live, platform):
    bot, running = await connected(live, platform, AccessConfig(messages_per_minute=100_000, opinions_per_minute=2))
    place = channel()
    await platform.say(place, ANN, "hello")
    answer = await answered(platform, place)
    await platform.click(BOB, answer, "down")
    view = await asyncio.wait_for(platform.views.get(), 300)
    assert "payload" not in await platform.submit(BOB, view, "It was rude.", ["tone", "wrong"])  # one opinion in all
    acked = await platform.submit(BOB, view, "", ["unsafe"])
    assert acked["payload"] == {"response_action": "errors", "errors": {"reasons": NOT_RECORDED}}
    assert await reasons_of(live, bot, answer) == ["It was rude.", "tone", "wrong"]
    await closed(bot, running)


async def test_a_second_answer_asks_which_is_better_and_the_same_button_takes_it_back(live, platform):
    bot, running = await connected(live, platform, AccessConfig(deny_users=["UEVE"], messages_per_minute=100_000))
    place = channel()
    await platform.say(place, ANN, "hello")
    first = await answered(platform, place)
    await platform.click(ANN, first, "again")
    second = await answered(platform, place, 2)

    def buttons(message: dict) -> dict[str, str]:
        return {one["action_id"]: one["text"]["text"] for one in message["blocks"][-1]["elements"]}

    assert list(buttons(first)) == ["again"]
    assert buttons(second) == buttons(first) | PICKS

    async def picked() -> list[set[tuple[str, str]]]:
        said = [not_retracted((await told(live, bot, one)).feedback) for one in (first, second)]
        return [{(row.user_id, str(row.kind)) for row in rows if row.signal == PICK} for rows in said]

    for user, act, expected in (
        (BOB, "newer", [{(BOB, "disapproval")}, {(BOB, "approval")}]),
        (BOB, "earlier", [{(BOB, "approval")}, {(BOB, "disapproval")}]),
        ("UEVE", "earlier", [{(BOB, "approval")}, {(BOB, "disapproval")}]),
        (BOB, "earlier", [set(), set()]),
    ):
        await platform.click(user, second, act)
        assert await picked() == expected, act
    assert sorted(await whispered(platform, 4)) == sorted([(BOB, NOTED)] * 2 + [(BOB, TAKEN_BACK), ("UEVE", NOT_ADMITTED)])
    platform.repeats = 2  # of each press
    await platform.click(BOB, second, "newer")
    assert await picked() == [{(BOB, "disapproval")}, {(BOB, "approval")}], (
        "a press that is delivered again is no second one"
    )
    await closed(bot, running)


async def whispered(platform: LocalSlack, count: int) -> list[tuple[str, str]]:
    await until(lambda: len(platform.whispers) >= count)
    return platform.whispers


async def test_a_button_says_noted_only_for_opinions_that_were_taken(live, platform):
    access = AccessConfig(deny_users=["UEVE"], messages_per_minute=100_000, opinions_per_minute=1)
    bot, running = await connected(live, platform, access)
    place = channel()
    await platform.say(place, ANN, "hello")
    answer = await answered(platform, place)
    await platform.click(BOB, answer, "up")
    assert await whispered(platform, 1) == [(BOB, NOTED)]
    await platform.click(BOB, answer, "down")  # too many for a minute
    await platform.click("UEVE", answer, "down")
    assert sorted((await whispered(platform, 3))[1:]) == sorted([(BOB, NOT_RECORDED), ("UEVE", NOT_ADMITTED)])
    assert await opinions(live, bot, answer) == {BOB: 1.0}
    assert platform.views.empty()  # nobody is asked why for what did not count
    await closed(bot, running)


async def test_a_button_that_fails_says_so_and_is_acked(live, platform, bot, monkeypatch):
    place = channel()
    await platform.say(place, ANN, "hello")
    answer = await answered(platform, place)
    await told(live, bot, answer)

    def failing(given):
        raise OSError("disk full")

    monkeypatch.setattr(live.store, "add_feedback", failing)
    deliveries = platform.deliveries
    await platform.click(BOB, answer, "up")
    assert await whispered(platform, 1) == [(BOB, SORRY)]
    assert platform.deliveries == deliveries + 1


async def test_whatever_fails_people_are_told_once_and_the_next_message_is_answered(live, platform, bot, monkeypatch):
    async def broken(*prompt, **options):
        raise ZeroDivisionError("a bug")

    place = channel()
    with monkeypatch.context() as patch:
        patch.setattr(live.policy, "reply", broken)
        root = await platform.say(place, ANN, "hello")
        await until(lambda: platform.answers(place))
        await quiet(bot)
        assert [(one["text"], one["thread_ts"]) for one in platform.answers(place)] == [(SORRY, root)]
    await platform.say(place, ANN, "hello again")
    await answered(platform, place)


async def test_what_cannot_be_committed_when_slack_sends_it_again_is_apologised_for_once(live, platform, bot, monkeypatch):
    place, loop = channel("D"), asyncio.get_running_loop()
    add, failures = live.store.add_message, iter([True, True, True, False])

    def failing(message):
        if next(failures, False):
            loop.call_soon_threadsafe(loop.call_later, 0.5, platform.redeliver_unacked)
            raise OSError("disk full")
        return add(message)

    monkeypatch.setattr(live.store, "add_message", failing)
    await platform.say(place, ANN, "hello")  # the fourth time it is taken
    await answered(platform, place)
    assert [one["text"] for one in platform.answers(place)].count(SORRY) == 1
    assert len(platform.answers(place)) == 2


async def test_an_assistant_thread_is_greeted_and_shows_that_an_answer_is_made(live, platform, bot):
    place = channel("D")
    thread = await platform.open_assistant(place, ANN)
    await until(lambda: [one["text"] for one in platform.answers(place)] == [GREETING])
    await platform.say(place, ANN, "hello", thread=thread)
    answer = await answered(platform, place)
    assert answer["thread_ts"] == thread
    assert platform.statuses == ["is thinking…"]
    plain = channel("D")
    await platform.say(plain, BOB, "hello")  # the control: a plain direct message is no assistant thread
    assert "thread_ts" not in await answered(platform, plain)
    assert len(platform.statuses) == 1
    assert not platform.sessions


async def test_an_agent_greets_once_and_answers_each_direct_message_in_a_thread_of_its_own(live, platform):
    platform.is_agent = True
    bot, running = await connected(live, platform)
    place = channel("D")
    for _ in range(3):
        await platform.open_messages(place, ANN)
    await until(lambda: platform.answers(place))
    first = await platform.say(place, ANN, "hello")
    await answered(platform, place)
    second = await platform.say(place, ANN, "tell me a joke")
    await answered(platform, place, 2)
    await platform.say(place, ANN, "another", thread=second)
    await answered(platform, place, 3)
    await platform.open_messages(place, ANN)
    await quiet(bot)
    greeting, *answers = platform.answers(place)
    assert greeting["text"] == GREETING
    assert [one["thread_ts"] for one in answers] == [first, second, second]
    turns = [(await told(live, bot, one)).turn for one in answers]
    assert turns[0].conversation_id != turns[1].conversation_id == turns[2].conversation_id
    assert platform.sessions == {(place, first): ["processing", "active"], (place, second): ["processing", "active"] * 2}
    assert platform.statuses == []
    await closed(bot, running)


async def test_an_agent_is_known_by_what_slack_says_people_look_at(live, platform):
    bot, running = await connected(live, platform)
    await platform.look_at(channel())  # without a person and a place; it is acked
    place = channel("D")
    asked = await platform.say(place, ANN, "hello")
    assert (await answered(platform, place))["thread_ts"] == asked
    await closed(bot, running)


async def test_after_a_restart_what_an_agent_missed_is_answered_in_its_thread(live, platform):
    platform.is_agent = True
    bot, running = await connected(live, platform)
    place = channel("D")
    await platform.say(place, ANN, "hello")
    await answered(platform, place)
    await closed(bot, running)
    platform.is_dropping_events = True
    missed = await platform.say(place, ANN, "are you there?")
    platform.is_dropping_events = False
    bot, running = await connected(live, platform)
    assert (await answered(platform, place, 2))["thread_ts"] == missed
    await closed(bot, running)


async def test_slacks_own_stop_ends_an_answer_also_before_its_first_word(live, platform, monkeypatch):
    platform.is_agent = True
    bot, running = await connected(live, platform, AccessConfig(deny_users=["UEVE"], messages_per_minute=100_000))
    reply, begins = live.policy.reply, asyncio.Event()

    async def endless(*prompt, on_text, stop, **options):
        while not stop.is_set():
            await asyncio.sleep(0.05)
            if begins.is_set():
                on_text("Once upon a time. ")
        return await reply(*prompt, on_text=on_text, stop=stop, **options)

    monkeypatch.setattr(live.policy, "reply", endless)
    for place, has_begun in ((channel("D"), False), (channel(), True)):
        root = await platform.say(place, ANN, "tell me a story")
        await until(lambda place=place, root=root: platform.sessions[place, root])
        if has_begun:
            begins.set()
            await until(lambda place=place: platform.answers(place))
        await platform.stop_session(place, root, ANN)
        answer = await answered(platform, place)
        assert (await told(live, bot, answer)).turn.finish_reason == "stopped"
        await quiet(bot)
        assert platform.sessions[place, root] == ["processing", "active"]
    await closed(bot, running)


@pytest.mark.parametrize("subtype", ["me_message", "thread_broadcast", "file_share"])
async def test_what_people_write_in_any_way_is_answered(live, platform, bot, subtype):
    place = channel("D")
    root = await platform.say(place, ANN, "hello")
    await answered(platform, place)
    await platform.say(place, ANN, "is hungry", thread=root if subtype == "thread_broadcast" else None, subtype=subtype)
    answer = await answered(platform, place, 2)
    assert await asked(live, bot, answer) == "is hungry"


@pytest.mark.parametrize("subtype", ["channel_join", "channel_topic", "huddle_thread", "reminder_add", "pinned_item"])
async def test_what_slack_says_of_people_is_no_question(platform, bot, subtype):
    place = channel("D")
    await platform.say(place, ANN, "did something", subtype=subtype)
    await platform.say(place, ANN, "hello")  # the control
    await answered(platform, place)
    await quiet(bot)
    assert len(platform.answers(place)) == 1


async def asked(live, bot: Slack, answer: dict) -> str:
    """What an answer answers."""
    found = await told(live, bot, answer)
    return (await live.database.call(live.store.read_message, found.turn.message_id)).text


async def test_text_files_are_read_and_pictures_get_one_line(live, platform, bot):
    direct, place = channel("D"), channel()
    picture, paste = platform.file("cat.png", "image/png"), platform.file("paste.txt", "text/plain", "1 < 2")
    await platform.say(direct, ANN, "", repeat=4, subtype="file_share", files=[picture])
    await platform.say(place, ANN, "", files=[picture])
    await until(lambda: platform.answers(direct) and platform.answers(place))
    await platform.say(direct, ANN, "", subtype="file_share", files=[paste])
    assert await asked(live, bot, await answered(platform, direct)) == "paste.txt:\n1 < 2"
    await quiet(bot)
    line = "Sorry, I can read words only, not pictures."
    assert platform.answers(direct)[0]["text"] == line
    assert [one["text"] for one in platform.answers(place)] == [line]
    assert len(platform.answers(direct)) == 2


async def test_names_are_read_as_people_see_them_and_who_is_mentioned_is_kept(live, platform, bot):
    platform.names |= {BOB: "Bob"}
    place = channel()
    await platform.say(place, ANN, f"<@{BOB}> asks: <@{BOT}> are you there? :smiling_face_with_3_hearts:")
    assert await asked(live, bot, await answered(platform, place)) == "@Bob asks: are you there? 🥰"


async def shown(live, bot: Slack, answer: dict) -> str:
    """What the policy was shown for an answer."""
    turn = (await told(live, bot, answer)).turn
    return live.dialogue.tracker.tokenizer.hf.decode(turn.prompt_ids)


async def test_the_policy_is_shown_the_thread_that_it_is_asked_about(live, platform):
    bot, running = await connected(live, platform, AccessConfig(deny_users=["UEVE"], messages_per_minute=100_000))
    platform.names |= {ANN: "Ann", BOB: "Bob", "UZOE": "Zoe", "UEVE": "Eve"}
    await live.database.call(bot.workspace.answers.users.record_consent, "slack", "UZOE", False)
    place = channel()
    root = await platform.say(place, BOB, "the build is broken since noon", mention=False)
    await platform.say(place, "UZOE", "do not learn from me", mention=False, thread=root)
    await platform.say(place, "UEVE", "denied here", mention=False, thread=root)
    await platform.say(place, BOB, "elsewhere", mention=False)
    await platform.say(place, ANN, "what is wrong here?", thread=root)
    prompt = await shown(live, bot, await answered(platform, place))
    assert "Bob: the build is broken since noon" in prompt
    assert "Ann: what is wrong here?" in prompt
    assert not [text for text in ("learn from me", "denied", "elsewhere") if text in prompt]
    await platform.say(place, BOB, "it is the tests", mention=False, thread=root)
    await platform.say(place, ANN, "and now?", thread=root)
    assert "Bob: it is the tests" in await shown(live, bot, await answered(platform, place, 2))
    await closed(bot, running)
    bot, running = await connected(live, platform)  # what was only overheard is not answered after a restart
    await quiet(bot)
    assert len(platform.answers(place)) == 2
    await closed(bot, running)


async def test_a_deleted_message_of_a_thread_is_forgotten_too(live, platform, bot):
    place = channel()
    root = await platform.say(place, BOB, "the password is swordfish", mention=False)
    await platform.say(place, ANN, "what is this?", thread=root)
    assert "swordfish" in await shown(live, bot, await answered(platform, place))
    await platform.delete(place, root)
    await platform.say(place, ANN, "and now?", thread=root)
    assert "swordfish" not in await shown(live, bot, await answered(platform, place, 2))


@pytest.mark.parametrize("follows", [False, True])
async def test_it_goes_on_in_its_threads_without_a_mention_where_the_config_says_so(live, platform, follows):
    bot, running = await connected(live, platform, follow_threads=follows)
    place = channel()
    other = await platform.say(place, BOB, "not for you", mention=False)
    root = await platform.say(place, ANN, "hello")
    await answered(platform, place)
    await platform.say(place, BOB, "and you?", thread=root, mention=False)
    await platform.say(place, BOB, "", thread=root, mention=False, files=[platform.file("cat.png", "image/png")])
    await platform.say(place, ANN, "nor this", thread=other, mention=False)
    await platform.say(place, ANN, "nor this")  # a mention is answered once
    await answered(platform, place, 2 + follows)
    await quiet(bot)
    assert len(platform.answers(place)) == 2 + follows
    assert len(platform.answers(place, root)) == 1 + follows
    await closed(bot, running)


async def test_what_was_refused_or_came_too_fast_is_not_answered_after_a_restart(live, platform):
    few = AccessConfig(messages_per_minute=2)
    bot, running = await connected(live, platform, few)
    place, missed = channel("D"), channel("D")
    for number in range(6):
        await platform.say(place, BOB, f"hello {number}")
    await answered(platform, place, 2)
    await quiet(bot)
    await closed(bot, running)
    platform.is_dropping_events = True
    for number in range(6):
        await platform.say(missed, ANN, f"hello {number}")
    platform.is_dropping_events = False
    for _ in range(2):
        bot, running = await connected(live, platform, few)
        await answered(platform, missed, 2)
        await quiet(bot)
        await closed(bot, running)
    assert [sum(map(platform.is_final, platform.answers(one))) for one in (place, missed)] == [2, 2]


async def texts(live, bot: Slack, answers: list[dict]) -> list[str]:
    """The questions of these answers, as they were stored."""
    turns = [(await told(live, bot, answer)).turn for answer in answers]
    return [(await live.database.call(live.store.read_message, turn.message_id)).text for turn in turns]


async def test_of_a_flood_that_was_missed_the_newest_are_answered_within_the_limit_and_the_rest_never(live, platform):
    platform.is_dropping_events = True
    place, other, few = channel(), channel(), AccessConfig(messages_per_minute=4)
    for number in range(12):
        await platform.say((place, other)[number % 2], ANN, f"spam {number}")
    await platform.say(place, BOB, "hello")
    platform.is_dropping_events = False
    for _ in range(2):
        bot, running = await connected(live, platform, few)
        await answered(platform, place, 3)
        await answered(platform, other, 2)
        await quiet(bot)
        assert await texts(live, bot, platform.answers(place)) == ["spam 8", "spam 10", "hello"]
        assert await texts(live, bot, platform.answers(other)) == ["spam 9", "spam 11"]
        await closed(bot, running)


@pytest.mark.parametrize("follows", [False, True])
async def test_what_was_missed_in_a_thread_is_answered_if_it_would_have_been_heard(live, platform, follows):
    bot, running = await connected(live, platform, follow_threads=follows)
    place = channel()
    root = await platform.say(place, ANN, "hello")
    await answered(platform, place)
    other = await platform.say(place, ANN, "lunch?", mention=False)
    await platform.say(place, BOB, "before its first answer here", thread=other, mention=False)
    await platform.say(place, ANN, "where?", thread=other)
    await answered(platform, place, 2)
    await quiet(bot)
    await closed(bot, running)
    platform.is_dropping_events = True
    await platform.say(place, BOB, "and you?", thread=root, mention=False)
    await platform.say(place, BOB, "not for you", mention=False)
    await platform.say(place, BOB, "are you there?", thread=root)
    platform.is_dropping_events = False
    for _ in range(2):
        bot, running = await connected(live, platform, follow_threads=follows)
        await answered(platform, place, 3 + follows)
        await quiet(bot)
        missed = ["and you?", "are you there?"] if follows else ["are you there?"]
        assert await texts(live, bot, platform.answers(place)) == ["hello", "where?", *missed]
        assert await texts(live, bot, platform.answers(place, root)) == ["hello", *missed]
        await closed(bot, running)


async def test_who_was_forgotten_and_came_back_is_counted_also_after_an_outage(live, platform):
    bot, running = await connected(live, platform)
    place, back = channel(), "UBACK"
    await platform.say(place, ANN, "hello")
    before = await answered(platform, place)
    await platform.react(back, before, "+1")
    assert (await told(live, bot, before)).feedback
    await platform.use_command(back, place, "/kibitz-forget-me")
    await platform.use_command(back, place, "/kibitz-privacy", "on")
    await platform.say(place, back, "I am back")
    after = await answered(platform, place, 2)
    await quiet(bot)
    await closed(bot, running)
    platform.is_dropping_events = True
    await platform.react(back, after, "+1")
    platform.is_dropping_events = False
    bot, running = await connected(live, platform)
    await quiet(bot)
    assert await opinions(live, bot, after) == {back: 1.0}
    assert await opinions(live, bot, before) == {}, "their reaction still stands on Slack"
    await closed(bot, running)


async def test_what_happened_while_nobody_listened_is_read_from_the_api(live, platform):
    bot, running = await connected(live, platform)
    place, direct = channel(), channel("D")
    root = await platform.say(place, ANN, "hello")
    first = await answered(platform, place)
    await platform.react(ANN, first, "+1")
    await platform.react(BOB, first, "heart")
    await closed(bot, running)
    platform.is_dropping_events = True
    await platform.react(ANN, first, "+1", remove=True)
    await platform.react(BOB, first, "tada")
    await platform.react(BOB, first, "eyes")
    await platform.say(place, BOB, "hello again", thread=root)
    await platform.say(place, BOB, "not for you", mention=False)
    await platform.say(direct, ANN, "hello")
    platform.is_dropping_events = False
    for _ in range(3):  # again and again: nothing is doubled
        bot, running = await connected(live, platform)
        await answered(platform, place, 2)
        await answered(platform, direct)
        await quiet(bot)
        await closed(bot, running)
    assert [len(platform.answers(one)) for one in (place, direct)] == [2, 1]
    assert await opinions(live, bot, first) == {BOB: 1.0}
    assert len((await told(live, bot, first)).feedback) == 4


async def test_by_http_only_what_slack_signed_lately_is_heard(live, platform):
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/slack/events"
    settings = SlackConfig(edits=1000, streams=1000)
    bot = Slack(shared(live), settings, Secrets(BOT_TOKEN, "", "secret", listening), platform.api)
    running = asyncio.create_task(bot.run())
    place = channel("D")
    event = {"type": "message", "channel_type": "im", "user": ANN, "text": "hello", "channel": place, "ts": platform.ts()}
    body = json.dumps({"type": "event_callback", "team_id": "T1", "event": event, "event_id": "EvHttp"})
    now = int(time.time())

    async def send(http: httpx.AsyncClient, secret: str, timestamp: object, signature: str = "") -> int:
        signed = SignatureVerifier(secret).generate_signature(timestamp=str(timestamp), body=body) or ""
        headers = {"X-Slack-Request-Timestamp": str(timestamp), "X-Slack-Signature": signature or signed}
        return (await http.post(url, content=body, headers=headers | {"Content-Type": "application/json"})).status_code

    async with httpx.AsyncClient() as http:  # a request waits in the socket's queue until the server is there
        for secret, timestamp, signature in (
            ("wrong", now, ""),
            ("secret", now - 600, ""),
            ("secret", now, "v0=0"),
            ("secret", "yesterday", ""),
        ):
            assert await send(http, secret, timestamp, signature) == 401
        assert platform.answers(place) == []
        for _ in range(3):  # the same request again, as in a replay: one answer
            assert await send(http, "secret", now) == 200
        await answered(platform, place)
        await quiet(bot)
        assert len(platform.answers(place)) == 1
    await closed(bot, running)


async def test_a_slash_command_is_acked_before_the_work_and_answered_after_it(platform, bot, monkeypatch):
    async def slow() -> str:
        await until(lambda: "/kibitz-status" in platform.acked)  # Slack would not wait for it
        return "all is well"

    monkeypatch.setattr(bot.workspace.commands, "desk", replace(bot.workspace.commands.desk, describe_status=slow))
    assert await platform.use_command(BOB, channel(), "/kibitz-status") == "all is well"


async def test_a_slash_command_that_fails_says_so(platform, bot, monkeypatch):
    async def broken() -> str:
        raise OSError("disk full")

    monkeypatch.setattr(bot.workspace.commands, "desk", replace(bot.workspace.commands.desk, describe_status=broken))
    assert await platform.use_command(BOB, channel(), "/kibitz-status") == SORRY


async def test_slash_commands_tell_what_is_live_and_only_operators_take_it_back(live, platform, bot):
    place = channel()
    assert await platform.use_command(BOB, place, "/kibitz-why") == "There is no answer here yet."
    assert live.policy.version in await platform.use_command(BOB, place, "/kibitz-status")
    for name in ("rollback", "pause-learning"):
        assert "Only an operator" in await platform.use_command(BOB, place, f"/kibitz-{name}")
    assert "Say one of" in await platform.use_command(BOB, place, "/kibitz-privacy", "perhaps")


def test_nobody_is_rung_by_what_the_model_says():
    assert neutralize_mentions("<!channel> <@U1> <#C1> a < b <https://x.example>") == (
        "<\u200b!channel> <\u200b@U1> <\u200b#C1> a < b <https://x.example>"
    )


async def test_what_slack_refuses_and_wrong_tokens_are_errors_for_people(live, platform, monkeypatch):
    with pytest.raises(ConnectorError, match=r"invalid_auth.*slack\.bot_token_env"):
        await Slack(shared(live), SlackConfig(), Secrets("xoxb-wrong", APP_TOKEN), platform.api).run()
    with pytest.raises(ConfigError, match=r"slack\.bot_token_env has value 'NONE', which is not set"):
        Secrets.open(SlackConfig(bot_token_env="NONE"))
    monkeypatch.setenv("BOT", "xoxb-1")
    monkeypatch.setenv("APP", "xoxb-2")
    with pytest.raises(ConfigError, match=r"signing_secret_env: \$APP holds a token"):
        Secrets.open(SlackConfig(bot_token_env="BOT", signing_secret_env="APP"))
    with pytest.raises(ConfigError, match=r"signing_secret_env has value 'BOT' beside slack\.app_token_env"):
        Secrets.open(SlackConfig(bot_token_env="BOT", app_token_env="APP", signing_secret_env="BOT"))
    with pytest.raises(ConfigError, match=r"slack\.app_token_env: \$APP does not begin with xapp-"):
        Secrets.open(SlackConfig(bot_token_env="BOT", app_token_env="APP"))
