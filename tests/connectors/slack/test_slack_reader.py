"""What kibitz reads in Slack's messages, and Slack's names of emoji. Nobody is answered here."""

from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio
import yaml
from conftest import ROOT
from slack_sdk.web.async_client import AsyncWebClient

from bot.chat.reactions import Reactions
from bot.chat.slack_emoji import find_emoji
from bot.config import ReactionsConfig
from bot.types import FeedbackKind
from connectors.commands import COMMANDS
from connectors.local.slack import LocalSlack
from connectors.local.slack_state import BOT, BOT_TOKEN
from connectors.reading import LARGEST_FILE, NOTHING_SAID
from connectors.slack.reader import SlackReader

DOCS = ROOT / "docs"
MANIFESTS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(DOCS.glob("slack-manifest*.yaml"))}


@pytest_asyncio.fixture(loop_scope="session")
async def platform() -> AsyncIterator[LocalSlack]:
    fake = LocalSlack()
    await fake.start()
    yield fake
    await fake.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def reader(platform: LocalSlack) -> AsyncIterator[SlackReader]:
    async with aiohttp.ClientSession() as session:
        found = SlackReader(AsyncWebClient(token=BOT_TOKEN, base_url=platform.api, session=session))
        found.me = BOT
        yield found


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("smiling_face_with_3_hearts", "🥰"),
        ("+1", "👍"),
        ("tada", "🎉"),
        ("the_horns", "🤘"),
        ("egg", "🥚"),  # the package emoji takes it for a cooked one
        ("man-running", "🏃\u200d♂️"),
        ("female-doctor", "👩\u200d⚕️"),
        ("flag-us", "🇺🇸"),
        ("flag-tv", "🇹🇻"),
        ("flag-england", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"),
        ("party_parrot", None),
    ],
)
def test_slacks_names_of_emoji_are_understood(name, shown):
    assert find_emoji(name) == shown


@pytest.mark.parametrize(
    "name", ["smiling_face_with_3_hearts", "heart_eyes", "clap", "white_check_mark", "pray", "joy", "100"]
)
def test_reactions_of_the_default_config_are_understood_by_slacks_names(name):
    assert Reactions(ReactionsConfig()).classify(name) == FeedbackKind.APPROVAL


def test_every_emoji_of_the_default_config_that_slack_renamed_is_understood():
    reactions = Reactions(ReactionsConfig())
    names = {
        "face_with_open_mouth_vomiting": "🤮",
        "smiling_face_with_3_hearts": "🥰",
        "hankey": "💩",
        "angry": "😠",
        "rage": "😡",
    }
    assert {name: reactions.classify(name) for name in names} == {
        name: reactions.classify(symbol) for name, symbol in names.items()
    }
    assert None not in {reactions.classify(name) for name in names}


@pytest.mark.parametrize(
    ("raw", "seen"),
    [
        (f"<@{BOT}> hello", "hello"),
        (f"can you help <@{BOT}>", "can you help"),
        (f"<@{BOT}|kibitz> hello", "hello"),
        (f"<@UBOB> asks: <@{BOT}> are you there?", "@Bob asks: are you there?"),
        ("<@UZOE> and <@UX|zed>", "@UZOE and @zed"),
        ("in <#C7> and <#C8|general> and <#C9|>", "in #lobby and #general and #C9"),
        ("<!here> <!subteam^S1|@team> <!date^1^{date}|1 May>", "@here @team 1 May"),
        ("<https://example.com/a?b=1&amp;c=2|example.com>", "https://example.com/a?b=1&c=2"),
        ("<https://example.com/x|this page>, <mailto:a@b.c|a@b.c>", "this page (https://example.com/x), a@b.c"),
        ("&lt;b&gt; &amp;amp; 1 &lt; 2", "<b> &amp; 1 < 2"),
        (":tada::+1::skin-tone-3: :party_parrot: at 10:30:45", "🎉👍🏼 :party_parrot: at 10:30:45"),
        ("`:tada:` ```a :key: b```", "`:tada:` ```a :key: b```"),
        ("", ""),
    ],
)
async def test_markup_is_read_as_people_see_it(platform, reader, raw, seen):
    platform.names |= {"UBOB": "Bob", "C7": "lobby"}
    assert (await reader.read({"text": raw})).text == seen
    assert reader.mentions_us({"text": raw}) is (BOT in raw)


async def test_whom_slack_does_not_name_is_called_by_the_id_and_asked_for_once(platform, reader):
    assert [(await reader.read({"text": "<@UZOE>"})).text for _ in range(3)] == ["@UZOE"] * 3
    platform.names["UANN"] = "Ann"
    assert [await reader.find_name("UANN") for _ in range(3)] == ["Ann"] * 3
    assert platform.calls.count("users.info") == 2


async def test_text_files_and_forwarded_messages_are_read_and_the_rest_is_named(platform, reader):
    files = [platform.file("notes.md", "text/markdown", "\ufeffeggs & milk\n"), platform.file("cat.png", "image/png", "…")]
    forwarded = {"is_share": True, "text": "lunch at <#C8|cantina>?", "author_name": "Bob"}
    unfurled = {"title": "Example", "text": "not said by anybody"}
    read = await reader.read({"text": "see", "files": files, "attachments": [forwarded, unfurled]})
    assert read.text == "see\nBob: lunch at #cantina?\nnotes.md:\neggs & milk\n[cat.png: not readable]"
    assert read.unreadable == ("pictures",)


async def test_a_long_file_is_cut_and_one_that_slack_keeps_from_us_is_not_readable(platform, reader):
    long = await reader.read({"files": [platform.file("log", "text/plain", "x" * 300_000)]})
    assert len(long.text) == len("log:\n") + LARGEST_FILE
    reader._client.token = "xoxb-without-the-scope"
    kept = await reader.read({"files": [platform.file("log", "text/plain", "secret")]})
    assert (kept.text, kept.unreadable) == ("", ("such files",))


async def test_nobody_but_slack_is_shown_the_token(platform, reader):
    file = platform.file("log", "text/plain", "hello")
    file["url_private"] = file["url_private"].replace("127.0.0.1", "localhost")  # another host than the API's
    assert (await reader.read({"files": [file]})).text == ""
    file["url_private"] = file["url_private"].replace("localhost", "127.0.0.1")  # the control
    assert (await reader.read({"files": [file]})).text == "log:\nhello"


@pytest.mark.parametrize(
    ("files", "refusal"),
    [
        ([{"mimetype": "image/png", "name": "cat.png"}], "Sorry, I can read words only, not pictures."),
        (
            [{"mimetype": "audio/webm", "subtype": "slack_audio"}, {"mimetype": "video/mp4"}, {"mimetype": "video/mp4"}],
            "Sorry, I can read words only, not voice messages or videos.",
        ),
        ([{"mimetype": "application/pdf"}], "Sorry, I can read words only, not such files."),
        ([], NOTHING_SAID),
    ],
)
async def test_what_cannot_be_read_is_said(reader, files, refusal):
    read = await reader.read({"text": f"<@{BOT}>", "files": files})
    assert (read.text, read.refusal) == ("", refusal)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_every_command_and_is_as_slack_takes_it(name):
    features, settings = MANIFESTS[name]["features"], MANIFESTS[name]["settings"]
    assert [one["command"] for one in features["slash_commands"]] == [f"/kibitz-{one.name}" for one in COMMANDS]
    assert features["app_home"] == {"messages_tab_enabled": True, "messages_tab_read_only_enabled": False}
    assert settings["interactivity"]["is_enabled"]
    scopes = set(MANIFESTS[name]["oauth_config"]["scopes"]["bot"])
    assert {"assistant:write", "chat:write", "reactions:read", "users:read", "files:read", "im:history"} <= scopes
    events = set(settings["event_subscriptions"]["bot_events"])
    assert {"app_mention", "message.im", "message.channels", "reaction_added", "reaction_removed"} <= events


def test_new_apps_are_agents_and_old_ones_keep_their_assistant_view():
    new, old = MANIFESTS["slack-manifest"], MANIFESTS["slack-manifest-assistant"]
    assert len(new["features"]["agent_view"]["agent_description"]) <= 300
    assert "assistant_view" not in new["features"]  # Slack refuses it for new apps
    assert "agent_view" not in old["features"]  # to change to it cannot be undone
    agents = {"app_home_opened", "app_context_changed", "agent_session_stopped"}
    assert agents <= set(new["settings"]["event_subscriptions"]["bot_events"])
    assert "assistant_thread_started" not in new["settings"]["event_subscriptions"]["bot_events"]
    assert "assistant_thread_started" in old["settings"]["event_subscriptions"]["bot_events"]
    assert not agents & set(old["settings"]["event_subscriptions"]["bot_events"])
