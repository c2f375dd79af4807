"""The Slack connector: the unmodified slack-bolt against a Slack of our own, the real vLLM behind it."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from conftest import PATIENT, explained, shared, until
from fake_slack import APP_TOKEN, BOT, BOT_TOKEN, NUMBERS, FakeSlack
from slack_sdk.signature import SignatureVerifier

from bot.config import AccessConfig, SlackConfig
from bot.errors import ConfigError, ConnectorError
from bot.types import FeedbackKind
from connectors.answers import BUSY, SORRY
from connectors.slack import GREETING, Secrets, Slack
from connectors.slack_messages import harmless
from learning.rewards import reward

ANN, BOB = "UANN", "UBOB"


@pytest_asyncio.fixture(loop_scope="session")
async def platform() -> AsyncIterator[FakeSlack]:
    fake = FakeSlack()
    await fake.start()
    yield fake
    await fake.stop()


async def connected(
    live, platform: FakeSlack, access: AccessConfig = PATIENT, **settings: object
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

    await until(lambda: not bot.lanes._workers and not reads())


def channel(kind: str = "C") -> str:
    """A new channel (C) or direct message (D). No other test of the run has it: what is gone there would be forgotten."""
    return f"{kind}{next(NUMBERS)}"


async def answered(platform: FakeSlack, place: str, count: int = 1) -> dict:
    """The newest of `count` answers in a channel, when all of them stand whole, with their buttons."""
    await until(lambda: sum(platform.done(one) for one in platform.answers(place)) >= count)
    return platform.answers(place)[-1]


async def told(live, bot: Slack, answer: dict):
    """The turn of an answer, as soon as it is stored: people see it a moment before."""
    return await explained(live, bot.answers, f"{answer['channel']}:{answer['ts']}")


async def opinions(live, bot: Slack, answer: dict) -> dict[str, float]:
    found = await told(live, bot, answer)
    earned = reward(found.feedback, found.turn.asker_id, live.config.rewards)
    return {} if earned is None else earned.opinions


async def test_a_mention_is_answered_once_in_a_thread_by_a_native_stream(live, platform, bot):
    place = channel()
    asked = await platform.say(place, ANN, "hello")
    answer = await answered(platform, place)
    found = await told(live, bot, answer)
    assert answer["text"] == found.turn.text
    assert answer["thread_ts"] == asked
    assert (await live.database.call(live.store.message, found.turn.message_id)).text == "hello"
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
    await until(lambda: len(platform.answers(direct)) == 3)
    await answered(platform, direct, 2)
    assert SORRY in [one["text"] for one in platform.answers(direct)]  # nobody is told anything about what was deleted
    turns = [(await told(live, bot, one)).turn for one in platform.answers(direct) if platform.done(one)]
    asked = [await live.database.call(live.store.message, turn.message_id) for turn in turns]
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
            loop.call_soon_threadsafe(loop.call_later, 0.5, platform.lose_patience)
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
    await until(lambda: sum(platform.done(one) for one in platform.answers(place)) >= 2)
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
    await platform.submit(BOB, view, "It was rude.")
    await platform.submit(BOB, view, "  ")  # skipped
    said = (await told(live, bot, answer)).feedback
    kinds = [(row.kind, row.text) for row in said]
    assert kinds == [(FeedbackKind.DISAPPROVAL, None), (FeedbackKind.COMMENT, "It was rude.")]


async def test_an_assistant_thread_is_greeted_and_shows_that_an_answer_is_made(live, platform, bot):
    place = channel("D")
    thread = await platform.open_assistant(place, ANN)
    await until(lambda: [one["text"] for one in platform.answers(place)] == [GREETING])
    await platform.say(place, ANN, "hello", thread=thread)
    answer = await answered(platform, place)
    assert answer["thread_ts"] == thread
    assert platform.statuses == ["is thinking…"]
    await platform.say(channel("D"), BOB, "hello")  # the control: a plain direct message is no assistant thread
    assert len(platform.statuses) == 1


async def test_what_happened_while_nobody_listened_is_read_from_the_api(live, platform):
    bot, running = await connected(live, platform)
    place, direct = channel(), channel("D")
    root = await platform.say(place, ANN, "hello")
    first = await answered(platform, place)
    await platform.react(ANN, first, "+1")
    await platform.react(BOB, first, "heart")
    await closed(bot, running)
    platform.gives_up = True
    await platform.react(ANN, first, "+1", remove=True)
    await platform.react(BOB, first, "tada")
    await platform.react(BOB, first, "eyes")
    await platform.say(place, BOB, "hello again", thread=root)
    await platform.say(place, BOB, "not for you", mention=False)
    await platform.say(direct, ANN, "hello")
    platform.gives_up = False
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


async def test_slash_commands_tell_what_is_live_and_only_operators_take_it_back(live, platform, bot):
    place = channel()
    assert await platform.command(BOB, place, "/kibitz-why") == "There is no answer here yet."
    assert live.policy.version in await platform.command(BOB, place, "/kibitz-status")
    for name in ("rollback", "pause-learning"):
        assert "Only an operator" in await platform.command(BOB, place, f"/kibitz-{name}")
    assert "Say one of" in await platform.command(BOB, place, "/kibitz-privacy", "perhaps")


def test_nobody_is_rung_by_what_the_model_says():
    assert harmless("<!channel> <@U1> <#C1> a < b <https://x.example>") == (
        "<\u200b!channel> <\u200b@U1> <\u200b#C1> a < b <https://x.example>"
    )


async def test_what_slack_refuses_and_wrong_tokens_are_errors_for_people(live, platform, monkeypatch):
    with pytest.raises(ConnectorError, match=r"invalid_auth.*slack\.bot_token_env"):
        await Slack(shared(live), SlackConfig(), Secrets("xoxb-wrong", APP_TOKEN), platform.api).run()
    with pytest.raises(ConfigError, match=r"slack\.bot_token_env has value 'NONE', which is not set"):
        Secrets.of(SlackConfig(bot_token_env="NONE"))
    monkeypatch.setenv("BOT", "xoxb-1")
    monkeypatch.setenv("APP", "xoxb-2")
    with pytest.raises(ConfigError, match=r"signing_secret_env: \$APP holds a token"):
        Secrets.of(SlackConfig(bot_token_env="BOT", signing_secret_env="APP"))
    with pytest.raises(ConfigError, match=r"signing_secret_env has value 'BOT' beside slack\.app_token_env"):
        Secrets.of(SlackConfig(bot_token_env="BOT", app_token_env="APP", signing_secret_env="BOT"))
    with pytest.raises(ConfigError, match=r"slack\.app_token_env: \$APP does not begin with xapp-"):
        Secrets.of(SlackConfig(bot_token_env="BOT", app_token_env="APP"))
