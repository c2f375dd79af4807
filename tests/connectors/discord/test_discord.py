"""The Discord connector: the unmodified discord.py against a Discord of our own, the real vLLM behind it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio
from conftest import PATIENT, explained, shared, until

from bot.config import AccessConfig, DiscordConfig
from bot.errors import ConfigError, ConnectorError
from bot.store.feedback import not_retracted
from bot.types import FeedbackKind
from connectors.access import TOO_FAST
from connectors.answers import BUSY
from connectors.commands import COMMANDS
from connectors.discord.connector import LIMIT, Discord
from connectors.discord.token import read_token
from connectors.local.discord import LocalDiscord
from connectors.local.discord_state import BOT, GUILD, TOKEN, VIEW_CHANNEL
from connectors.picks import PICKS
from learning.data.rewards import compute_reward

ANN, BOB = 11, 12


@pytest_asyncio.fixture(loop_scope="session")
async def platform() -> AsyncIterator[LocalDiscord]:
    fake = LocalDiscord()
    await fake.start()
    yield fake
    await fake.stop()


async def connected(
    live, platform: LocalDiscord, config: DiscordConfig | None = None, access: AccessConfig = PATIENT
) -> tuple[Discord, asyncio.Task[None]]:
    platform.identified.clear()
    config = config or DiscordConfig(edits=50, edit_seconds=1)
    bot = Discord(shared(live, access), config, TOKEN)
    running = asyncio.create_task(bot.run())
    await asyncio.wait_for(platform.identified.wait(), 300)
    return bot, running


@pytest_asyncio.fixture(loop_scope="session")
async def bot(live, platform) -> AsyncIterator[Discord]:
    found, running = await connected(live, platform)
    yield found
    await found.stop()
    await asyncio.wait_for(running, 300)


async def answered(platform: LocalDiscord, channel: int, count: int = 1) -> dict:
    """The newest of `count` answers in a channel, when all of them stand whole, with their buttons."""

    def whole() -> bool:
        return len([one for one in platform.answers(channel) if "up" in platform.buttons(int(one["id"]))]) >= count

    await until(whole)
    return platform.answers(channel)[-1]


async def turn_of(live, bot: Discord, answer: dict):
    """The turn of an answer, as soon as it is stored: people see it a moment before."""
    return await explained(live, bot.answers, answer["id"])


async def opinions(live, bot: Discord, answer: dict) -> dict[str, float]:
    told = await turn_of(live, bot, answer)
    earned = compute_reward(told.feedback, told.turn.asker_id, live.config.rewards)
    return {} if earned is None else earned.opinions


async def eventually(live, bot: Discord, answer: dict, wanted: dict[str, float]) -> None:
    for _ in range(6000):
        if await opinions(live, bot, answer) == wanted:
            return
        await asyncio.sleep(0.05)
    assert await opinions(live, bot, answer) == wanted


async def quiet(bot: Discord) -> None:
    """Nothing is being worked off."""
    await until(lambda: not bot.lanes._workers)


async def test_a_mention_is_answered_in_a_reply_that_grows_and_ends_with_buttons(live, platform, bot):
    channel = platform.channel()
    asked = await platform.say(channel, ANN, "hello")
    answer = await answered(platform, channel)
    told = await turn_of(live, bot, answer)
    assert answer["content"] == told.turn.text
    assert answer["message_reference"]["message_id"] == str(asked)
    assert platform.buttons(int(answer["id"])) == ["up", "down", "again"]
    assert told.turn.asker_id == str(ANN)
    assert (await live.database.call(live.store.read_message, told.turn.message_id)).text == "hello"  # without the mention
    assert platform.refused == []


async def test_what_everybody_on_the_server_may_read_is_public_and_nothing_else(live, platform):
    opened, closed, direct = platform.channel(), platform.channel(), platform.channel(1)
    hidden = {"id": str(GUILD), "type": 0, "allow": "0", "deny": str(VIEW_CHANNEL)}
    platform.channels[closed]["permission_overwrites"] = [hidden]
    bot, running = await connected(live, platform)
    public = {}
    for channel in (opened, closed, direct):
        await platform.say(channel, ANN, "hello")
        told = await turn_of(live, bot, await answered(platform, channel))
        public[channel] = live.store.read_conversation(told.turn.conversation_id).is_public
    assert public == {opened: True, closed: False, direct: False}
    await bot.stop()
    await running


async def test_who_is_not_addressed_is_not_answered(platform, bot):
    channel, direct = platform.channel(), platform.channel(1)
    await platform.say(channel, ANN, "hello everybody", mention=False)
    await platform.say(channel, BOT, "hello me")
    await platform.say(direct, ANN, "hello you")
    await answered(platform, direct)
    assert platform.answers(channel)[1:] == []  # the bot's own words are no question


async def test_replies_go_on_with_a_conversation_and_mentions_begin_one(live, platform, bot):
    channel = platform.channel()
    await platform.say(channel, ANN, "hello")
    first = await answered(platform, channel)
    await platform.say(channel, ANN, "i can't sleep", mention=False, reply_to=int(first["id"]))
    second = await answered(platform, channel, 2)
    await platform.say(channel, BOB, "hello")
    third = await answered(platform, channel, 3)
    turns = [(await turn_of(live, bot, one)).turn for one in (first, second, third)]
    assert turns[0].conversation_id == turns[1].conversation_id != turns[2].conversation_id


async def test_a_long_answer_is_whole_and_its_last_part_carries_the_turn(live, platform, bot, monkeypatch):
    channel = platform.channel()
    monkeypatch.setattr("connectors.discord.messages.LIMIT", 200)
    text = "\n".join(f"{number}. this is a line of a long answer" for number in range(40))
    reply = live.policy.reply

    async def long(*prompt, on_text, **options):
        on_text(text)
        return replace(await reply(*prompt, **options), text=text)

    monkeypatch.setattr(live.policy, "reply", long)
    await platform.say(channel, ANN, "tell me all")
    last = await answered(platform, channel)
    parts = platform.answers(channel)
    assert "".join(part["content"] + "\n" for part in parts).split() == text.split()
    assert all(len(part["content"]) <= 200 < LIMIT for part in parts)
    assert [platform.buttons(int(part["id"])) for part in parts[:-1]] == [[]] * (len(parts) - 1)
    assert {(await turn_of(live, bot, part)).turn.id for part in parts} == {(await turn_of(live, bot, last)).turn.id}


async def test_reactions_come_and_go_whatever_their_skin_and_only_peoples_count(live, platform, bot):
    channel = platform.channel()
    await platform.say(channel, ANN, "hello")
    answer = await answered(platform, channel)
    number = int(answer["id"])
    await platform.react(ANN, number, "👍🏽")
    await platform.react(BOB, number, "👎")
    await platform.react(BOT, number, "👍")
    await platform.react(BOB, number, "🤔")
    await platform.react(ANN, 4711, "👍")  # a message that nobody knows
    await eventually(live, bot, answer, {str(ANN): 1.0, str(BOB): -1.0})
    await platform.react(BOB, number, "👎", remove=True)
    await eventually(live, bot, answer, {str(ANN): 1.0})
    await platform.react(BOB, number, "❤️")
    await eventually(live, bot, answer, {str(ANN): 1.0, str(BOB): 1.0})
    await platform.clear_reactions(number, "❤️")
    await eventually(live, bot, answer, {str(ANN): 1.0})
    await platform.clear_reactions(number)
    await eventually(live, bot, answer, {})


async def test_buttons_say_what_people_think_and_ask_why(live, platform, bot):
    channel = platform.channel()
    await platform.say(channel, ANN, "hello")
    answer = await answered(platform, channel)
    number = int(answer["id"])
    assert (await platform.press(BOB, number, "up"))["data"]["content"] == "Noted, thank you."
    await eventually(live, bot, answer, {str(BOB): 1.0})
    assert (await platform.press(BOB, number, "up"))["data"]["content"] == "Taken back."
    await eventually(live, bot, answer, {})
    modal = await platform.press(BOB, number, "down")
    await eventually(live, bot, answer, {str(BOB): -1.0})
    assert modal["type"] == 9
    await platform.submit(BOB, number, modal["data"], "It was rude.", ticked=["tone", "too long"])
    assert await reasons_of(live, bot, answer) == ["It was rude.", "tone", "too long"]
    await platform.press(BOB, number, "down")  # takes it back
    modal = await platform.press(BOB, number, "down")
    assert sorted(ticked(modal)) == ["tone", "too long"]
    await platform.submit(BOB, number, modal["data"], "", ticked=["tone", "unsafe"])
    assert await reasons_of(live, bot, answer) == ["It was rude.", "tone", "unsafe"]
    other = await platform.press(ANN, number, "down")
    assert ticked(other) == [], "the control: nobody else is shown what Bob ticked"
    await eventually(live, bot, answer, {str(ANN): -1.0, str(BOB): -1.0})  # Ann says nothing more


async def reasons_of(live, bot, answer) -> list[str]:
    said = not_retracted((await turn_of(live, bot, answer)).feedback)
    return sorted(row.text for row in said if row.kind == FeedbackKind.COMMENT)


def ticked(modal: dict) -> list[str]:
    boxes = modal["data"]["components"][0]["component"]
    assert boxes["type"] == 22, "a checkbox group"
    return [option["value"] for option in boxes["options"] if option.get("default")]


async def test_what_takes_long_is_seen_to_be_typed_and_where_that_fails_the_answer_comes_all_the_same(
    live, platform, bot, monkeypatch
):
    quick, slow = platform.channel(), platform.channel()
    respond = live.dialogue.respond

    async def late(message, options, place):
        if place.channel == str(slow):
            await until(lambda: slow in platform.typing_calls)
        return await respond(message, options, place=place)

    monkeypatch.setattr(live.dialogue, "respond", late)
    monkeypatch.setattr("connectors.discord.messages.TYPING_DELAY", 0.0)
    platform.typing_status = 403
    await platform.say(slow, ANN, "hello")
    await answered(platform, slow)
    monkeypatch.setattr("connectors.discord.messages.TYPING_DELAY", 60.0)
    await platform.say(quick, ANN, "hello")
    await answered(platform, quick)
    assert quick not in platform.typing_calls  # the control


async def test_an_answer_that_grows_can_be_stopped_and_liked_meanwhile(live, platform, bot, monkeypatch):
    channel = platform.channel()
    respond = live.dialogue.respond

    async def endless(message, options, place):
        options.on_text("Once upon a time")
        await options.stop.wait()
        return await respond(message, options, place=place)  # vLLM is asked, and stopped at its first token

    monkeypatch.setattr(live.dialogue, "respond", endless)
    await platform.say(channel, ANN, "tell me a story")
    await until(lambda: platform.answers(channel) and platform.buttons(int(platform.answers(channel)[0]["id"])) == ["stop"])
    growing = platform.answers(channel)[0]
    await platform.react(ANN, int(growing["id"]), "👍")
    assert growing["content"] == "Once upon a time"
    await platform.press(BOB, int(growing["id"]), "stop")
    answer = await answered(platform, channel)
    assert (await turn_of(live, bot, answer)).turn.finish_reason == "stopped"
    await eventually(live, bot, answer, {str(ANN): 1.0})


async def test_slash_commands_tell_what_is_live_and_only_operators_take_it_back(live, platform, bot):
    channel = platform.channel()
    assert sorted(platform.commands) == sorted(command.name for command in COMMANDS)
    assert await platform.use_command(BOB, channel, "why") == "There is no answer here yet."
    await platform.say(channel, ANN, "hello")
    answer = await answered(platform, channel)
    assert (await turn_of(live, bot, answer)).turn.policy_version in await platform.use_command(BOB, channel, "why")
    assert live.policy.version in await platform.use_command(BOB, channel, "status")
    before = live.registry.get_live()
    assert "Only an operator" in await platform.use_command(BOB, channel, "rollback")
    assert live.registry.get_live() == before


async def test_an_answer_is_regenerated_by_its_button(live, platform, bot):
    channel = platform.channel()
    await platform.say(channel, ANN, "hello")
    first = await answered(platform, channel)
    await platform.press(ANN, int(first["id"]), "again")
    second = await answered(platform, channel, 2)
    before, after = await turn_of(live, bot, first), await turn_of(live, bot, second)
    assert after.turn.replaces == before.turn.id
    assert [row.kind for row in before.feedback] == [FeedbackKind.REGENERATE]
    assert platform.buttons(int(second["id"])) == [*platform.buttons(int(first["id"])), *PICKS]
    rows = platform.messages[int(second["id"])]["components"]
    assert [one["label"] for one in rows[1]["components"]] == list(PICKS.values())


async def test_after_an_edited_question_nobody_is_asked_which_answer_is_better(live, platform, bot):
    """The two answer different words."""
    channel = platform.channel()
    question = await platform.say(channel, ANN, "hello")
    first = await answered(platform, channel)
    await platform.edit(question, "good night")
    message_id = (await turn_of(live, bot, first)).turn.message_id
    await until(lambda: live.store.read_message(message_id).text == "good night")
    await platform.press(ANN, int(first["id"]), "again")
    second = await answered(platform, channel, 2)
    assert platform.buttons(int(second["id"])) == platform.buttons(int(first["id"]))


async def test_a_button_of_an_answer_that_another_process_gave_works(live, platform):
    bot, running = await connected(live, platform)
    channel = platform.channel()
    await platform.say(channel, ANN, "hello")
    answer = await answered(platform, channel)
    await bot.stop()
    await running
    bot, running = await connected(live, platform)
    await platform.press(ANN, int(answer["id"]), "up")
    await platform.react(BOB, int(answer["id"]), "👎")
    await eventually(live, bot, answer, {str(ANN): 1.0, str(BOB): -1.0})
    await bot.stop()
    await running


async def test_what_happened_while_nobody_listened_is_read_from_the_api(live, platform):
    bot, running = await connected(live, platform)
    channel, direct = platform.channel(), platform.channel(1)
    for place in (channel, direct):
        await platform.say(place, ANN, "hello")
        await answered(platform, place)
    first = platform.answers(channel)[0]
    await platform.react(ANN, int(first["id"]), "👍")
    await platform.react(BOB, int(first["id"]), "🎉")
    await platform.react(BOB, int(first["id"]), "🤔")
    await eventually(live, bot, first, {str(ANN): 1.0, str(BOB): 1.0})
    await bot.stop()
    await running
    await platform.react(ANN, int(first["id"]), "👍", remove=True)
    await platform.react(ANN, int(first["id"]), "👎")
    await platform.react(BOB, int(first["id"]), "🎉", remove=True)
    await platform.react(BOT, int(first["id"]), "👍")
    await platform.say(channel, BOB, "hello again")
    await platform.say(channel, BOB, "not for you", mention=False)
    await platform.say(direct, ANN, "hello again")
    bot, running = await connected(live, platform)
    await eventually(live, bot, first, {str(ANN): -1.0})
    for place in (channel, direct):
        await answered(platform, place, 2)
    for _ in range(2):  # again and again: nothing is doubled
        await bot.stop()
        await running
        other = platform.channel()
        await platform.say(other, ANN, "hello")
        bot, running = await connected(live, platform)
        await answered(platform, other)  # it is read after the others
        await quiet(bot)
    assert [len(platform.answers(place)) for place in (channel, direct)] == [2, 2]
    assert len((await turn_of(live, bot, first)).feedback) == 5
    await bot.stop()
    await running


async def test_a_restart_in_a_busy_channel_says_nothing_new(live, platform):
    config = DiscordConfig(edits=50, edit_seconds=1, waiting=2)
    bot, running = await connected(live, platform, config)
    channel = platform.channel()
    for count in range(1, 7):  # more than may wait
        await platform.say(channel, ANN, "hello")
        await answered(platform, channel, count)
    await bot.stop()
    await running
    for _ in range(5):
        await platform.say(channel, BOB, "hello")
    bot, running = await connected(live, platform, config)
    await answered(platform, channel, 11)
    await quiet(bot)
    assert len(platform.answers(channel)) == 11
    assert all(one["content"] not in (BUSY, TOO_FAST) for one in platform.answers(channel))
    await bot.stop()
    await running


async def test_an_answer_that_was_given_but_never_shown_is_shown_after_a_restart(live, platform, monkeypatch):
    bot, running = await connected(live, platform)
    channel = platform.channel()
    platform.limit = 0  # Discord takes nothing: the answer is stored, and cannot be posted
    await platform.say(channel, ANN, "hello")
    turns = live.store.count_rows()["turns"]
    await until(lambda: live.store.count_rows()["turns"] > turns)
    monkeypatch.setattr(bot.lanes, "close", lambda seconds: asyncio.sleep(0))
    await bot.stop()
    await running
    platform.limit = 1000
    bot, running = await connected(live, platform)
    await answered(platform, channel)
    assert live.store.count_rows()["turns"] == turns + 1
    assert len(platform.answers(channel)) == 1
    await bot.stop()
    await running


async def test_what_happened_while_the_connection_was_gone_arrives_with_resume(live, platform, bot):
    channel = platform.channel()
    await platform.say(channel, ANN, "hello")
    answer = await answered(platform, channel)
    await platform.drop_connection(4000)
    await platform.react(ANN, int(answer["id"]), "👍")
    await platform.say(channel, BOB, "hello")
    await asyncio.wait_for(platform.resumed.wait(), 300)
    await eventually(live, bot, answer, {str(ANN): 1.0})
    await answered(platform, channel, 2)


async def test_one_event_twice_gives_one_answer(live, platform, bot):
    channel = platform.channel()
    await platform.say(channel, ANN, "hello")
    await answered(platform, channel)
    event = next(one for one in reversed(platform._events) if one["t"] == "MESSAGE_CREATE")
    await platform.dispatch("MESSAGE_CREATE", event["d"])
    await platform.say(channel, BOB, "hello")
    await answered(platform, channel, 2)
    assert len(platform.answers(channel)) == 2


async def test_forty_conversations_at_once_lose_and_double_nothing(live, platform, bot):
    channels = [platform.channel(1) for _ in range(40)]
    await asyncio.gather(*(platform.say(channel, 100 + number, "hello") for number, channel in enumerate(channels)))
    for channel in channels:
        await answered(platform, channel)
    assert [len(platform.answers(channel)) for channel in channels] == [1] * 40


async def test_a_busy_conversation_refuses_politely_and_a_limited_one_is_whole_in_the_end(live, platform):
    bot, running = await connected(live, platform, DiscordConfig(edits=4, edit_seconds=1, waiting=2))
    platform.limit, platform.window = 5, 0.5
    channel = platform.channel()
    for number in range(6):
        await platform.say(channel, ANN, f"hello {number}")
    await until(lambda: any(one["content"] == BUSY for one in platform.answers(channel)))
    answer = await answered(platform, channel, 2)
    assert platform.refused == []
    assert answer["content"]
    await bot.stop()
    await running


async def test_who_is_denied_is_neither_answered_nor_counted_and_who_is_too_fast_is_told(live, platform):
    access = AccessConfig(deny_users=[str(BOB)], messages_per_minute=2)
    bot, running = await connected(live, platform, access=access)
    channel = platform.channel()
    await platform.say(channel, BOB, "hello")
    await platform.say(channel, ANN, "hello")
    answer = await answered(platform, channel)
    assert len(platform.answers(channel)) == 1
    await platform.react(BOB, int(answer["id"]), "👎")
    await platform.react(ANN, int(answer["id"]), "👍")
    await eventually(live, bot, answer, {str(ANN): 1.0})
    assert (await platform.press(BOB, int(answer["id"]), "down"))["data"]["content"] == "You may not do that here."
    for _ in range(2):
        await platform.say(channel, ANN, "hello")
    await until(lambda: any(one["content"] == TOO_FAST for one in platform.answers(channel)))
    assert await opinions(live, bot, answer) == {str(ANN): 1.0}
    await bot.stop()
    await running


async def test_a_person_decides_and_is_forgotten_by_command(live, platform, bot):
    channel, person = platform.channel(), 77  # who says nothing elsewhere: to forget somebody moves versions
    assert "may learn from what you write" in await platform.use_command(person, channel, "privacy")
    assert "does not learn from you" in await platform.use_command(person, channel, "privacy", "off")
    assert not await live.database.call(bot.answers.users.has_consent, "discord", str(person))
    assert "may learn from what you write" in await platform.use_command(person, channel, "privacy", "on")
    await platform.say(channel, person, "hello")
    answer = await answered(platform, channel)
    await platform.react(person, int(answer["id"]), "👍")
    await eventually(live, bot, answer, {str(person): 1.0})
    told = await platform.use_command(person, channel, "forget-me")
    assert told.startswith("gone: 1 message, 1 answer, 1 opinion and 0 policy versions")
    assert await bot.answers.find_turn_id(answer["id"]) is None
    assert not await live.database.call(bot.answers.users.has_consent, "discord", str(person))
    assert await platform.use_command(person, channel, "why") == "There is no answer here yet."


async def test_operators_pause_learning_and_others_do_not(live, platform):
    bot, running = await connected(live, platform, access=AccessConfig(operators=[str(ANN)]))
    channel = platform.channel()
    assert "Only an operator" in await platform.use_command(BOB, channel, "pause-learning")
    assert "paused" in await platform.use_command(ANN, channel, "pause-learning")
    assert "learning: paused" in await platform.use_command(BOB, channel, "status")
    assert "learning is resumed" in await platform.use_command(ANN, channel, "pause-learning")
    assert "paused" not in await platform.use_command(BOB, channel, "status")
    await bot.stop()
    await running


async def begins_anew(platform: LocalDiscord) -> None:
    """The connection is cut, and Discord does not know the session any more: nothing is replayed."""
    platform.forgets_sessions = True
    platform.identified.clear()
    await platform.drop_connection(4000)
    await asyncio.wait_for(platform.identified.wait(), 300)
    platform.forgets_sessions = False


async def reconciled(platform: LocalDiscord) -> None:
    """A new session has read what was missed: a message to nobody has its answer, which comes after all reactions."""
    channel = platform.channel()
    platform.is_dropping_events = True
    await platform.say(channel, ANN, "hello")
    platform.is_dropping_events = False
    await begins_anew(platform)
    await answered(platform, channel)


async def recorded(live, bot: Discord, answer: dict) -> int:
    return len((await turn_of(live, bot, answer)).feedback)


async def test_a_reaction_that_was_shed_and_is_read_from_the_api_later_is_counted_no_longer(live, platform):
    bot, running = await connected(live, platform, access=AccessConfig(opinions_per_minute=1))
    channel = platform.channel()
    await platform.say(channel, ANN, "hello")
    answer = await answered(platform, channel)
    number = int(answer["id"])
    await platform.react(ANN, number, "👍")
    await platform.react(ANN, number, "🎉")
    await until(lambda: bot.access.shed_count == 1)
    await eventually(live, bot, answer, {str(ANN): 1.0})
    assert await recorded(live, bot, answer) == 1
    await reconciled(platform)
    assert (await recorded(live, bot, answer), bot.access.shed_count) == (2, 0)
    await platform.react(ANN, number, "🎉", remove=True)
    await until(lambda: bot.access.shed_count == 1)
    await reconciled(platform)
    assert (await recorded(live, bot, answer), bot.access.shed_count) == (3, 0)
    await reconciled(platform)  # again: nothing is new
    assert (await recorded(live, bot, answer), bot.access.shed_count) == (3, 0)
    await bot.stop()
    await running


async def test_a_reaction_that_is_read_from_the_api_while_its_event_is_written_is_stored_once(
    live, platform, bot, monkeypatch
):
    channel = platform.channel()
    await platform.say(channel, ANN, "hello")
    answer = await answered(platform, channel)
    came, goes_on, record = asyncio.Event(), asyncio.Event(), live.dialogue.record_feedback

    async def late(given):
        if given.user_id == str(BOB):
            came.set()
            await goes_on.wait()
        return await record(given)

    monkeypatch.setattr(live.dialogue, "record_feedback", late)
    await platform.react(BOB, int(answer["id"]), "👍")
    await came.wait()
    await reconciled(platform)
    goes_on.set()
    await eventually(live, bot, answer, {str(BOB): 1.0})
    assert await recorded(live, bot, answer) == 1


async def test_a_reaction_whose_event_comes_after_it_was_read_from_the_api_is_stored_once(live, platform, bot):
    channel = platform.channel()
    await platform.say(channel, ANN, "hello")
    answer = await answered(platform, channel)
    number = int(answer["id"])
    platform.is_dropping_events = True
    await platform.react(BOB, number, "👍")
    event = platform._events[-1]
    platform.is_dropping_events = False
    await reconciled(platform)
    await eventually(live, bot, answer, {str(BOB): 1.0})
    await platform.dispatch(event["t"], event["d"])
    for remove, wanted in ((True, {}), (False, {str(BOB): 1.0}), (True, {})):  # what people do next has its effect
        await platform.react(BOB, number, "👍", remove=remove)
        await eventually(live, bot, answer, wanted)
    assert await recorded(live, bot, answer) == 4
    assert bot.access.shed_count == 0


async def test_a_reaction_to_any_part_of_a_long_answer_stands_when_the_session_is_new(live, platform, bot, monkeypatch):
    channel = platform.channel()
    reply = live.policy.reply

    async def long(*prompt, **options):
        return replace(await reply(*prompt, **options), text="word " * 60)

    with monkeypatch.context() as patched:
        patched.setattr("connectors.discord.messages.LIMIT", 200)
        patched.setattr(live.policy, "reply", long)
        await platform.say(channel, ANN, "tell me all")
        last = await answered(platform, channel)
    first = platform.answers(channel)[0]
    assert first["id"] != last["id"]
    await platform.react(ANN, int(first["id"]), "👍")
    await platform.react(BOB, int(last["id"]), "👎")
    await eventually(live, bot, last, {str(ANN): 1.0, str(BOB): -1.0})
    await reconciled(platform)
    assert await opinions(live, bot, last) == {str(ANN): 1.0, str(BOB): -1.0}
    assert await recorded(live, bot, last) == 2


async def test_a_raid_is_stored_or_counted_as_shed_and_the_chat_goes_on(live, platform):
    """Each event is one or the other, also where connection and session are lost in the middle."""
    config, access = DiscordConfig(waiting=20), AccessConfig(messages_per_minute=1000)
    bot, running = await connected(live, platform, config, access)
    channel, elsewhere = platform.channel(), platform.channel(1)
    await platform.say(channel, ANN, "hello")
    answer = await answered(platform, channel)
    turn_id = await bot.answers.find_turn_id(answer["id"])
    accounts, each = 500, 10
    for count in range(each):
        if count in (3, 6):
            platform.resumed.clear()
            await platform.drop_connection(4000)  # what comes until it is connected again is replayed
        for account in range(accounts):
            await platform.react(10_000 + account, int(answer["id"]), "👎", remove=bool(count % 2))
        if count in (3, 6):
            await asyncio.wait_for(platform.resumed.wait(), 300)
        await platform.say(elsewhere, ANN, "hello")
        if count == 4:
            await answered(platform, elsewhere, 5)  # nothing is on its way
            await begins_anew(platform)  # reads 500 reactions from the API while they go on
    await answered(platform, elsewhere, each)  # nobody was refused
    stored = 0

    async def all_accounted() -> bool:
        nonlocal stored
        stored = len((await live.database.call(live.store.read_feedback_on, [turn_id]))[turn_id])
        return stored + bot.access.shed_count >= accounts * each

    async with asyncio.timeout(300):
        while not await all_accounted():
            await asyncio.sleep(0.1)
    await reconciled(platform)  # nor is anything counted twice later
    await all_accounted()
    assert stored + bot.access.shed_count == accounts * each
    assert stored > 0
    assert bot.access.shed_count > 0  # the control: it was more than is taken at once
    await bot.stop()
    await running


async def test_what_discord_refuses_is_an_error_for_people(live, platform, monkeypatch):
    with pytest.raises(ConnectorError, match=r"rejects the token .*discord\.token_env"):
        await Discord(shared(live), DiscordConfig(token_env="T"), "wrong").run()
    with pytest.raises(ConnectorError, match=r"discord\.message_content"):
        await Discord(shared(live), DiscordConfig(message_content=True), TOKEN).run()
    with pytest.raises(ConfigError, match="a variable that is not set"):
        read_token(DiscordConfig(token_env="KIBITZ_NO_SUCH"))
    monkeypatch.setenv("T", "xoxb-1")
    with pytest.raises(ConfigError, match="a Slack token"):
        read_token(DiscordConfig(token_env="T"))
