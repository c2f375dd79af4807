"""What people do on Discord and expect: threads, replies, forwards, files, names, and what happened during an outage.

The unmodified discord.py against a Discord of our own, all of kibitz behind it, and a vLLM that says what it is told.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from conftest import PATIENT, explained, shared, until
from fake_vllm import FakeVllm

from bot import app as kibitz
from bot.config import AccessConfig, DiscordConfig, load
from bot.store.feedback import not_retracted, select_effective
from bot.store.picks import PICK
from connectors.access import TOO_FAST
from connectors.answers import NOT_ADMITTED, NOT_RECORDED, NOTED, SORRY, TAKEN_BACK
from connectors.discord import reconciliation
from connectors.discord.connector import Discord
from connectors.local.discord import LocalDiscord
from connectors.local.discord_state import BOT, OWN_ROLE, TOKEN
from connectors.picks import EARLIER, NEWER
from connectors.reading import NOTHING_SAID

ANN, BOB, MALLORY = 11, 12, 13
MEMBERS = 501  # a role
READS_ALL = DiscordConfig(edits=50, edit_seconds=1, message_content=True)
MENTIONS_ONLY = DiscordConfig(edits=50, edit_seconds=1)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def vllm(tokenizer) -> AsyncIterator[FakeVllm]:
    fake = FakeVllm(tokenizer)
    await fake.start()
    yield fake
    await fake.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running(vllm, demo_model, tmp_path_factory) -> AsyncIterator[kibitz.Kibitz]:
    data, dialogue = str(tmp_path_factory.mktemp("people")), {"embedder": "none"}
    config = load(data_dir=data, policy={"model": demo_model}, serving={"url": vllm.url}, dialogue=dialogue)
    async with kibitz.running(config, demo_model, lambda text: None) as found:
        yield found


@pytest_asyncio.fixture(loop_scope="session")
async def platform(vllm) -> AsyncIterator[LocalDiscord]:
    vllm.says = "Hello!"
    vllm.goes_on.set()
    vllm.asked.clear()
    fake = LocalDiscord()
    fake.allowed_intents = -1
    await fake.start()
    yield fake
    await fake.stop()


@contextlib.asynccontextmanager
async def connected(
    running: kibitz.Kibitz, platform: LocalDiscord, config: DiscordConfig = MENTIONS_ONLY, access: AccessConfig = PATIENT
) -> AsyncIterator[Discord]:
    """A bot that has read what it missed."""
    last = platform.channel()  # it is read after all others
    await platform.say(last, ANN, "is anybody there?")
    async with started(running, platform, config, access) as bot:
        await answered(platform, last)
        await until(lambda: is_idle(bot))
        yield bot


@contextlib.asynccontextmanager
async def started(
    running: kibitz.Kibitz, platform: LocalDiscord, config: DiscordConfig = MENTIONS_ONLY, access: AccessConfig = PATIENT
) -> AsyncIterator[Discord]:
    """A bot that is connected, and may still read what it missed."""
    platform.identified.clear()
    bot = Discord(shared(running, access), config, TOKEN)
    ends = asyncio.create_task(bot.run())
    await asyncio.wait_for(platform.identified.wait(), 300)
    try:
        yield bot
    finally:
        await bot.stop()
        await asyncio.wait_for(ends, 300)


def is_idle(bot: Discord) -> bool:
    return not bot.lanes._workers and not bot._pending


def patient(**lists: list[str]) -> AccessConfig:
    """Lists without limits that tests would run into."""
    return AccessConfig(**{**PATIENT.model_dump(), **lists})


def whole(platform: LocalDiscord, channel: int) -> list[dict]:
    """The answers that stand whole in a channel."""
    return [one for one in platform.answers(channel) if "up" in platform.buttons(int(one["id"]))]


def lines(platform: LocalDiscord, channel: int) -> list[str]:
    """What the bot said in a channel that is no answer."""
    return [one["content"] for one in platform.answers(channel) if not platform.buttons(int(one["id"]))]


async def answered(platform: LocalDiscord, channel: int, count: int = 1) -> dict:
    await until(lambda: len(whole(platform, channel)) >= count)
    return whole(platform, channel)[-1]


async def nothing_happens_before(platform: LocalDiscord, bot: Discord) -> None:
    """All that was said before this has had its effect: a message after it is answered, and no lane is busy."""
    after = platform.channel(1)
    await platform.say(after, ANN, "hello")
    await answered(platform, after)
    await until(lambda: is_idle(bot))


async def prompt_of(running: kibitz.Kibitz, bot: Discord, answer: dict) -> str:
    turn = (await explained(running, bot.answers, answer["id"])).turn
    return running.dialogue.tracker.tokenizer.hf.decode(turn.prompt_ids)


async def question_of(running: kibitz.Kibitz, bot: Discord, answer: dict):
    turn = (await explained(running, bot.answers, answer["id"])).turn
    return await running.database.call(running.store.read_message, turn.message_id)


async def opinions(running: kibitz.Kibitz, bot: Discord, answer: dict) -> set[str]:
    return {row.user_id for row in select_effective((await explained(running, bot.answers, answer["id"])).feedback)}


async def eventually(read, wanted) -> None:
    async with asyncio.timeout(300):
        while await read() != wanted:
            await asyncio.sleep(0.02)


# Threads and channels


@pytest.mark.parametrize("kind", [1, 2, 4, 6, 7, 8, 18, 21, 46])
async def test_only_messages_of_people_are_speech(running, platform, kind):
    thread = platform.thread(platform.channel())
    async with connected(running, platform, READS_ALL) as bot:
        await platform.send_raw(thread, ANN, f"<@{BOT}> hello", mentions=[platform._user(BOT)])
        await answered(platform, thread)
        await platform.send_raw(thread, ANN, "" if kind == 21 else "holiday plans 2026", type=kind)
        await platform.send_raw(thread, ANN, "hello again")  # the control: speech in the same thread
        prompt = await prompt_of(running, bot, await answered(platform, thread, 2))
        assert "holiday plans" not in prompt
        await nothing_happens_before(platform, bot)
        assert len(platform.answers(thread)) == 2


async def test_its_threads_are_those_in_which_it_was_mentioned_or_which_it_started(running, platform):
    parent = platform.channel()
    others, mentioned, own = platform.thread(parent), platform.thread(parent), platform.thread(parent, owner=BOT)
    async with connected(running, platform, READS_ALL) as bot:
        for thread in (others, mentioned, own):
            await platform.send_raw(thread, BOB, "did you see the game?")
        await answered(platform, own)
        await platform.send_raw(mentioned, ANN, f"<@{BOT}> hello", mentions=[platform._user(BOT)])
        await platform.send_raw(mentioned, BOB, "and what do you say?")
        await answered(platform, mentioned, 2)
        await nothing_happens_before(platform, bot)
        counts = [len(platform.answers(thread)) for thread in (others, mentioned, own)]
        assert counts == [0, 2, 1]


async def test_what_was_said_in_a_thread_before_it_was_mentioned_is_not_answered_after_a_restart(running, platform):
    thread = platform.thread(platform.channel())
    async with connected(running, platform, READS_ALL):
        await platform.send_raw(thread, BOB, "did you see the game?")
        await platform.send_raw(thread, ANN, f"<@{BOT}> hello", mentions=[platform._user(BOT)])
        await answered(platform, thread)
    await platform.send_raw(thread, BOB, "this is for the bot, while it is away")
    async with connected(running, platform, READS_ALL) as bot:
        answer = await answered(platform, thread, 2)
        await nothing_happens_before(platform, bot)
        assert (await question_of(running, bot, answer)).text == "this is for the bot, while it is away"
        assert len(platform.answers(thread)) == 2


@pytest.mark.parametrize(("key", "wanted"), [("allow_channels", [1, 1, 0, 0]), ("deny_channels", [0, 0, 1, 1])])
async def test_a_thread_has_the_lists_of_its_channel(running, platform, key, wanted):
    listed, other = platform.channel(), platform.channel()
    places = [listed, platform.thread(listed), other, platform.thread(other)]
    async with started(running, platform, access=patient(**{key: [str(listed)]})) as bot:
        for place in places:
            await platform.say(place, ANN, "hello")
        for place, count in zip(places, wanted, strict=True):
            await until(lambda place=place, count=count: len(whole(platform, place)) == count)
        await until(lambda: is_idle(bot))
        assert [len(platform.answers(place)) for place in places] == wanted


async def test_a_public_thread_has_the_scope_of_its_channel_and_a_private_one_its_own(running, platform):
    parent = platform.channel()
    public, private = platform.thread(parent), platform.thread(parent, private=True)
    async with connected(running, platform) as bot:
        places = {}
        for channel in (parent, public, private):
            await platform.say(channel, ANN, "hello")
            turn = (await explained(running, bot.answers, (await answered(platform, channel))["id"])).turn
            places[channel] = await running.database.call(running.store.read_conversation, turn.conversation_id)
        assert [one.channel for one in places.values()] == [str(parent), str(parent), str(private)]
        assert [one.is_public for one in places.values()] == [True, True, False]
        assert places[public].thread == str(public)


@pytest.mark.parametrize("at", ["question", "answer"])
async def test_a_thread_that_begins_at_an_answer_or_its_question_goes_on_with_it(running, platform, at):
    parent = platform.channel()
    async with connected(running, platform, READS_ALL) as bot:
        asked = await platform.say(parent, ANN, "i can't sleep")
        first = await answered(platform, parent)
        thread = platform.thread(parent, starter=asked if at == "question" else int(first["id"]))
        await platform.announce_thread(thread)
        await platform.send_raw(thread, ANN, "what did you just say?")
        assert "i can't sleep" in await prompt_of(running, bot, await answered(platform, thread))


# What was missed


async def test_messages_that_were_refused_are_not_answered_later(running, platform):
    channel, access = platform.channel(), AccessConfig(messages_per_minute=4)
    async with started(running, platform, access=access):
        for number in range(12):
            await platform.say(channel, MALLORY, f"spam {number}")
        await until(lambda: len(whole(platform, channel)) == 4 and lines(platform, channel).count(TOO_FAST) == 8)
    for _ in range(2):  # a new process knows nothing of the minute before
        async with connected(running, platform, access=access) as bot:
            await nothing_happens_before(platform, bot)
    assert len(whole(platform, channel)) == 4
    assert lines(platform, channel) == [TOO_FAST] * 8


async def test_of_a_flood_that_was_missed_the_newest_are_answered_within_the_limit_and_the_rest_never(running, platform):
    channel, access = platform.channel(), AccessConfig(messages_per_minute=4)
    for number in range(12):
        await platform.say(channel, MALLORY, f"spam {number}")
    await platform.say(channel, BOB, "hello")
    for _ in range(2):
        async with connected(running, platform, access=access) as bot:
            await answered(platform, channel, 5)
            await nothing_happens_before(platform, bot)
            texts = [(await question_of(running, bot, one)).text for one in whole(platform, channel)]
            assert texts == ["spam 8", "spam 9", "spam 10", "spam 11", "hello"]
    assert lines(platform, channel) == []


async def test_the_newest_messages_of_a_busy_channel_are_read_and_not_the_oldest(running, platform, monkeypatch):
    monkeypatch.setattr(reconciliation, "MOST_MESSAGES", 5)
    channel = platform.channel()
    await platform.say(channel, ANN, "an old question")
    for number in range(6):
        await platform.say(channel, BOB, f"not for you {number}", mention=False)
    await platform.say(channel, ANN, "a new question")
    async with connected(running, platform) as bot:
        answer = await answered(platform, channel)
        assert (await question_of(running, bot, answer)).text == "a new question"


async def test_people_who_are_denied_are_neither_answered_nor_counted_after_an_outage(running, platform):
    channel = platform.channel()
    async with connected(running, platform) as bot:
        await platform.say(channel, ANN, "hello")
        answer = await answered(platform, channel)
    await platform.react(MALLORY, int(answer["id"]), "👎")
    await platform.react(BOB, int(answer["id"]), "👍")
    await platform.say(channel, MALLORY, "hello")
    access = patient(deny_users=[str(MALLORY)])
    async with connected(running, platform, access=access) as bot:
        await eventually(lambda: opinions(running, bot, answer), {str(BOB)})
        await nothing_happens_before(platform, bot)
        assert len(platform.answers(channel)) == 1
    async with connected(running, platform) as bot:  # the control
        await eventually(lambda: opinions(running, bot, answer), {str(BOB), str(MALLORY)})
        await answered(platform, channel, 2)


async def test_who_was_forgotten_and_came_back_is_counted_also_after_an_outage(running, platform):
    channel, back = platform.channel(), 78
    async with connected(running, platform) as bot:
        await platform.say(channel, ANN, "hello")
        before = await answered(platform, channel)
        await platform.react(back, int(before["id"]), "👍")
        await eventually(lambda: opinions(running, bot, before), {str(back)})
        await platform.use_command(back, channel, "forget-me")
        await platform.use_command(back, channel, "privacy", "on")
        await platform.say(channel, back, "I am back")
        after = await answered(platform, channel, 2)
    await platform.react(back, int(after["id"]), "👍")
    await platform.react(BOB, int(before["id"]), "👍")
    async with connected(running, platform) as bot:
        await eventually(lambda: opinions(running, bot, after), {str(back)})
        await eventually(lambda: opinions(running, bot, before), {str(BOB)})  # the other still stands on Discord


@pytest.mark.parametrize(("lists", "heard"), [({"allow_roles": [str(MEMBERS)]}, ANN), ({"deny_roles": [str(MEMBERS)]}, BOB)])
async def test_roles_hold_for_what_was_missed_too(running, platform, lists, heard):
    platform.roles[ANN] = [MEMBERS]
    channel = platform.channel()
    async with started(running, platform):
        await platform.say(channel, BOB, "hello")
        answer = await answered(platform, channel)
    for user in (ANN, BOB):
        await platform.say(channel, user, f"from {user}")
        await platform.react(user, int(answer["id"]), "👍")
    async with started(running, platform, access=patient(**lists)) as bot:
        second = await answered(platform, channel, 2)
        await until(lambda: is_idle(bot))
        assert (await question_of(running, bot, second)).text == f"from {heard}"
        assert len(platform.answers(channel)) == 2
        assert await opinions(running, bot, answer) == {str(heard)}


async def test_with_a_list_of_roles_a_reaction_can_be_taken_back(running, platform):
    platform.roles[ANN] = [MEMBERS]
    channel = platform.channel()
    access = patient(allow_roles=[str(MEMBERS)])
    async with started(running, platform, access=access) as bot:
        await platform.say(channel, ANN, "hello")
        answer = await answered(platform, channel)
        number = int(answer["id"])
        await platform.react(MALLORY, number, "👎")
        await platform.react(MALLORY, number, "👎", remove=True)
        await platform.react(ANN, number, "👍")
        await eventually(lambda: opinions(running, bot, answer), {str(ANN)})
        await platform.react(ANN, number, "👍", remove=True)
        await eventually(lambda: opinions(running, bot, answer), set())
        said = (await explained(running, bot.answers, answer["id"])).feedback
        assert {row.user_id for row in said} == {str(ANN)}


async def test_who_was_denied_meanwhile_takes_back_with_the_button_and_gives_nothing(running, platform):
    channel = platform.channel()
    async with started(running, platform) as bot:
        await platform.say(channel, ANN, "hello")
        answer = await answered(platform, channel)
        number = int(answer["id"])
        assert (await platform.press(MALLORY, number, "up"))["data"]["content"] == "Noted, thank you."
    async with started(running, platform, access=AccessConfig(deny_users=[str(MALLORY)])) as bot:
        assert (await platform.press(MALLORY, number, "up"))["data"]["content"] == "Taken back."
        assert (await platform.press(MALLORY, number, "up"))["data"]["content"] == "You may not do that here."
        assert await opinions(running, bot, answer) == set()


async def test_a_pick_is_changed_and_taken_back_by_its_buttons_also_after_a_restart(running, platform):
    channel = platform.channel()

    async def picked() -> list[list[tuple[str, str]]]:
        said = [not_retracted((await explained(running, bot.answers, one["id"])).feedback) for one in (first, second)]
        return [[(row.user_id, str(row.kind)) for row in rows if row.signal == PICK] for rows in said]

    async def press(user: int, act: str) -> str:
        return (await platform.press(user, int(second["id"]), act))["data"]["content"]

    async with started(running, platform) as bot:
        await platform.say(channel, ANN, "hello")
        first = await answered(platform, channel)
        await platform.press(ANN, int(first["id"]), "again")
        second = await answered(platform, channel, 2)
        assert await press(MALLORY, NEWER) == NOTED
    async with started(running, platform, access=AccessConfig(deny_users=[str(MALLORY)], opinions_per_minute=2)) as bot:
        assert await picked() == [[(str(MALLORY), "disapproval")], [(str(MALLORY), "approval")]]
        assert await press(MALLORY, EARLIER) == NOT_ADMITTED
        assert await press(MALLORY, NEWER) == TAKEN_BACK
        assert await press(MALLORY, NEWER) == NOT_ADMITTED
        assert await picked() == [[], []]
        for act in (NEWER, EARLIER):
            assert await press(ANN, act) == NOTED
        assert await picked() == [[(str(ANN), "approval")], [(str(ANN), "disapproval")]]
        assert await press(ANN, EARLIER) == NOT_RECORDED  # a pick is one opinion of the limit
        assert await picked() == [[(str(ANN), "approval")], [(str(ANN), "disapproval")]]


async def test_a_button_says_when_an_opinion_is_not_recorded(running, platform):
    channel = platform.channel()
    async with started(running, platform, access=AccessConfig(opinions_per_minute=1)) as bot:
        await platform.say(channel, ANN, "hello")
        answer = await answered(platform, channel)
        told = [(await platform.press(BOB, int(answer["id"]), "up"))["data"]["content"] for _ in range(2)]
        assert told[0] == "Noted, thank you."
        assert "not recorded" in told[1]
        assert await opinions(running, bot, answer) == {str(BOB)}


async def test_super_reactions_and_people_who_are_not_listed_still_count_after_a_restart(running, platform):
    channel = platform.channel()
    async with connected(running, platform) as bot:
        await platform.say(channel, ANN, "hello")
        answer = await answered(platform, channel)
        number = int(answer["id"])
        await platform.add_super_reaction(ANN, number, "👍")
        await platform.react(BOB, number, "👍")
        await platform.react(MALLORY, number, "🎉")
        await eventually(lambda: opinions(running, bot, answer), {str(ANN), str(BOB), str(MALLORY)})
    platform.unlisted = {BOB}
    platform.reactions[number].discard((MALLORY, "🎉"))  # the control: this one was taken back
    async with connected(running, platform) as bot:
        await eventually(lambda: opinions(running, bot, answer), {str(ANN), str(BOB)})


# What a message is about


async def test_what_is_replied_to_is_shown_with_its_speaker_and_forgotten_with_them(running, platform):
    channel = platform.channel()
    async with connected(running, platform, READS_ALL) as bot:
        other = await platform.send_raw(channel, BOB, "the meeting moved to ten")
        await platform.say(channel, ANN, "is this true?", reply_to=other)
        answer = await answered(platform, channel)
        prompt = await prompt_of(running, bot, answer)
        assert f"user{BOB}: the meeting moved to ten" in prompt
        assert f"user{ANN}: is this true?" in prompt
        await platform.delete(other)
        await until(lambda: running.store.find_message_of_event(f"discord:{other}").is_forgotten)
        assert await bot.answers.find_turn_id(answer["id"]) is None


async def test_what_people_said_who_withhold_consent_or_are_denied_is_not_shown(running, platform):
    channel, unwilling = platform.channel(), 99
    access = patient(deny_users=[str(MALLORY)])
    async with connected(running, platform, READS_ALL, access) as bot:
        await platform.use_command(unwilling, channel, "privacy", "off")
        for count, user in enumerate((unwilling, MALLORY), 1):
            other = await platform.send_raw(channel, user, "the meeting moved to ten")
            await platform.say(channel, ANN, "is this true?", reply_to=other)
            assert "meeting" not in await prompt_of(running, bot, await answered(platform, channel, count))
            assert running.store.find_message_of_event(f"discord:{other}") is None


async def test_a_mention_in_the_middle_of_a_thread_is_shown_what_was_said_there(running, platform):
    parent = platform.channel()
    start = await platform.send_raw(parent, BOB, "shall we climb the hill?")
    thread = platform.thread(parent, starter=start)
    await platform.send_raw(
        thread,
        BOB,
        "",
        type=21,
        message_reference={"message_id": str(start), "channel_id": str(parent)},
        referenced_message=platform.messages[start],
    )
    await platform.send_raw(thread, ANN, "it is too steep")
    async with connected(running, platform, READS_ALL) as bot:
        await platform.send_raw(thread, MALLORY, f"<@{BOT}> who is right?", mentions=[platform._user(BOT)])
        prompt = await prompt_of(running, bot, await answered(platform, thread))
        places = [prompt.index(text) for text in ("shall we climb", f"user{ANN}: it is too steep", "who is right?")]
        assert places == sorted(places)


async def test_a_mention_alone_is_about_what_it_replies_to(running, platform):
    channel = platform.channel()
    async with connected(running, platform, READS_ALL) as bot:
        other = await platform.send_raw(channel, BOB, "the meeting moved to ten")
        await platform.say(channel, ANN, "", reply_to=other)
        assert "the meeting moved to ten" in await prompt_of(running, bot, await answered(platform, channel))


async def test_a_reply_to_an_answer_needs_no_ping_where_all_may_be_read(running, platform):
    channel = platform.channel()
    async with connected(running, platform, READS_ALL):
        await platform.say(channel, ANN, "hello")
        first = await answered(platform, channel)
        reference = {"message_id": first["id"], "channel_id": str(channel)}
        more = {"message_reference": reference, "referenced_message": platform.messages[int(first["id"])]}
        await platform.send_raw(channel, ANN, "and you?", type=19, **more)
        await answered(platform, channel, 2)


async def test_what_is_forwarded_from_elsewhere_is_read_and_opens_nothing_else(running, platform):
    channel, direct = platform.channel(), platform.channel(1)
    async with connected(running, platform, READS_ALL) as bot:
        await platform.say(channel, ANN, "a secret of this channel")
        first = await answered(platform, channel)
        content = {"content": "hello from elsewhere", "embeds": [], "attachments": [], "type": 0}
        times = {"timestamp": "2026-01-01T00:00:00+00:00", "edited_timestamp": None, "flags": 0}
        reference = {"type": 1, "message_id": first["id"], "channel_id": str(channel)}
        await platform.send_raw(
            direct, ANN, "", message_reference=reference, message_snapshots=[{"message": content | times}]
        )
        answer = await answered(platform, direct)
        assert (await question_of(running, bot, answer)).text == "hello from elsewhere"
        other = platform.channel()
        await platform.send_raw(other, ANN, f"<@{BOT}> see", mentions=[platform._user(BOT)], message_reference=reference)
        assert "secret" not in await prompt_of(running, bot, await answered(platform, other))


# Addressed, without words of its own


async def test_a_mention_of_its_own_role_is_a_mention(running, platform):
    channel = platform.channel()
    async with connected(running, platform) as bot:
        await platform.send_raw(channel, ANN, "<@&777> hello", mention_roles=["777"])
        await platform.send_raw(channel, ANN, f"<@&{OWN_ROLE}> hello", mention_roles=[str(OWN_ROLE)])
        answer = await answered(platform, channel)
        assert (await question_of(running, bot, answer)).text == "hello"
        await nothing_happens_before(platform, bot)
        assert len(platform.answers(channel)) == 1


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({}, NOTHING_SAID),
        ({"sticker_items": [{"id": "1", "name": "Wave", "format_type": 1}]}, "not stickers"),
        ({"attachments": ["cat.png", "image/png"]}, "not pictures"),
        ({"attachments": ["a.zip", "application/zip"]}, "not such files"),
        ({"flags": 1 << 13, "attachments": ["voice.ogg", "audio/ogg"]}, "not voice messages"),
    ],
    ids=["nothing", "sticker", "picture", "file", "voice"],
)
async def test_what_cannot_be_read_is_said_once_in_one_line(running, platform, more, line):
    if "attachments" in more:
        name, kind = more["attachments"]
        voice = {"duration_secs": 1.0, "waveform": "AA=="} if name.startswith("voice") else {}
        more = {**more, "attachments": [platform.file(name, kind, b"\x00") | voice]}
    channel, direct = platform.channel(), platform.channel(1)
    async with connected(running, platform) as bot:
        await platform.send_raw(channel, ANN, f"<@{BOT}>", mentions=[platform._user(BOT)], **more)
        await platform.send_raw(direct, ANN, "", **more)
        for place in (channel, direct):
            await until(lambda place=place: lines(platform, place))
            assert line in lines(platform, place)[0]
        await nothing_happens_before(platform, bot)
    async with connected(running, platform) as bot:  # nor again after a restart
        await nothing_happens_before(platform, bot)
    assert [len(platform.answers(place)) for place in (channel, direct)] == [1, 1]


async def test_text_files_and_polls_are_read_and_what_is_too_large_or_missing_is_named(running, platform):
    direct = platform.channel(1)
    files = [
        platform.file("message.txt", "text/plain; charset=utf-8", "a long paste, très long".encode()),
        platform.file("notes.md", "application/octet-stream", b"# notes"),
        platform.file("huge.txt", "text/plain", b"huge " * 30_000),
        platform.file("lost.txt", "text/plain", b"lost"),
        platform.file("cat.png", "image/png", b"\x00"),
    ]
    del platform.files["lost.txt"]
    async with connected(running, platform) as bot:
        await platform.send_raw(direct, ANN, "summarise this", attachments=files)
        text = (await question_of(running, bot, await answered(platform, direct))).text
        assert "message.txt:\na long paste, très long" in text
        assert "notes.md:\n# notes" in text
        assert "huge huge" not in text
        for name in ("huge.txt", "lost.txt", "cat.png"):
            assert f"[{name}: not readable]" in text
        ends = {"expiry": "2026-01-02T00:00:00+00:00", "allow_multiselect": False, "layout_type": 1}
        media = [{"answer_id": number, "poll_media": {"text": one}} for number, one in enumerate(("yes", "no"), 1)]
        await platform.send_raw(direct, ANN, "", poll={"question": {"text": "pizza?"}, "answers": media, **ends})
        text = (await question_of(running, bot, await answered(platform, direct, 2))).text
        assert text == "pizza?\n- yes\n- no"


async def test_a_message_that_discordpy_cannot_read_costs_neither_the_connection_nor_what_else_was_missed(running, platform):
    broken, channel = platform.channel(), platform.channel()
    async with connected(running, platform) as bot:
        client = bot._client
        await platform.say(channel, ANN, "hello")
        await platform.send_raw(broken, ANN, f"<@{BOT}> hello", mentions=[{"no": "id"}])
        await platform.send_raw(broken, ANN, "vote!", poll={"question": {"text": "pizza?"}, "answers": [], "expiry": None})
        await answered(platform, channel)
        await nothing_happens_before(platform, bot)
        assert bot._client is client
    await platform.say(channel, ANN, "hello again")
    async with connected(running, platform):
        await answered(platform, channel, 2)


# Names


async def test_names_are_shown_as_people_see_them_and_written_back_in_answers(running, platform, vllm):
    channel = platform.channel()
    vllm.says = f"@user{BOB} knows :blob: in #somewhere, and @user{BOB}x not. `@user{BOB}` :tada:"
    async with connected(running, platform) as bot:
        said = f"<@{BOT}> ask <@{BOB}> <:blob:123456> in <#{channel}> at <t:0:R> with </help:7>, <@404> and <#405>"
        await platform.send_raw(channel, ANN, said, mentions=[platform._user(BOT), platform._user(BOB)])
        answer = await answered(platform, channel)
        text = (await question_of(running, bot, answer)).text
        assert text == (
            f"ask @user{BOB} :blob: in #somewhere at 1970-01-01 00:00 UTC with /help, @unknown-user and #unknown"
        )
        written = f"<@{BOB}> knows <:blob:123456> in <#{channel}>, and @user{BOB}x not. `@user{BOB}` :tada:"
        assert answer["content"] == written
        assert (await explained(running, bot.answers, answer["id"])).turn.text.startswith(f"@user{BOB} knows :blob:")


async def test_the_policy_is_told_who_speaks(running, platform):
    thread = platform.thread(platform.channel())
    async with connected(running, platform) as bot:
        await platform.say(thread, ANN, "i am the cook")
        assert "user11" not in await prompt_of(running, bot, await answered(platform, thread))  # alone with it
        await platform.say(thread, BOB, "who am i?")
        prompt = await prompt_of(running, bot, await answered(platform, thread, 2))
        assert f"user{ANN}: i am the cook" in prompt
        assert f"user{BOB}: who am i?" in prompt


# What fails


async def test_who_asks_is_told_when_something_unexpected_fails(running, platform, monkeypatch):
    channel = platform.channel()

    async def broken(message, around=None):
        raise RuntimeError("a bug")

    async with connected(running, platform):
        with monkeypatch.context() as patched:
            patched.setattr(running.dialogue.tracker, "build_context", broken)
            await platform.say(channel, ANN, "hello")
            await until(lambda: platform.answers(channel))
        assert lines(platform, channel) == [SORRY]
        await platform.say(channel, ANN, "hello")
        await answered(platform, channel)


async def test_a_question_that_is_deleted_while_it_is_answered_ends_quietly(running, platform, vllm):
    channel = platform.channel()
    async with connected(running, platform) as bot:
        vllm.says, before = "  and more", len(vllm.asked)
        vllm.goes_on.clear()
        asked = await platform.say(channel, ANN, "delete me")
        await until(lambda: len(vllm.asked) > before)
        await platform.delete(asked)
        vllm.goes_on.set()
        await nothing_happens_before(platform, bot)
        await until(lambda: running.store.find_message_of_event(f"discord:{asked}").is_forgotten)
        assert platform.answers(channel) == []
        await platform.say(channel, ANN, "hello")
        await answered(platform, channel)


async def test_an_answer_that_a_moderator_deletes_while_it_grows_is_stopped_and_the_channel_goes_on(running, platform, vllm):
    channel = platform.channel()
    async with connected(running, platform) as bot:
        vllm.says = "Once upon a time"
        vllm.goes_on.clear()
        await platform.say(channel, ANN, "tell me a story")
        await until(lambda: platform.answers(channel))
        platform.messages.pop(int(platform.answers(channel)[0]["id"]))
        vllm.goes_on.set()
        await nothing_happens_before(platform, bot)
        assert platform.answers(channel) == []
        await platform.say(channel, ANN, "hello")
        await answered(platform, channel)


async def test_a_bot_that_stops_while_it_waits_for_servers_leaves_nothing_waiting(running, platform):
    def waiting() -> list[str]:
        return [name for task in asyncio.all_tasks() if "_delay_ready" in (name := repr(task.get_coro()))]

    async with started(running, platform):
        await until(waiting)
    await asyncio.sleep(0)
    assert not waiting()


async def test_edits_of_a_message_are_read_as_it_was(running, platform):
    channel = platform.channel()
    async with connected(running, platform) as bot:
        asked = await platform.say(channel, ANN, "hello")
        answer = await answered(platform, channel)
        platform.messages[asked]["mentions"] = [platform._user(BOT), platform._user(BOB)]
        await platform.edit(asked, f"hello <@{BOB}>")

        async def text() -> str:
            return (await question_of(running, bot, answer)).text

        await eventually(text, f"hello @user{BOB}")
