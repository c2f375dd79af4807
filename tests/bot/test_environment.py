"""What kibitz takes from its environment: secrets, a home, a name, streams, and a proxy on the way to Discord."""

import asyncio
import contextlib
import os
import re
import subprocess
import sys

import pytest
from conftest import until

from bot.chat.dialogue import DialogueManager
from bot.chat.reactions import Reactions
from bot.chat.tracker import StateTracker
from bot.config import DiscordConfig, PrivacyConfig, ReactionsConfig
from bot.environment import ensure_user, expand_home, find_proxy, read_secret, read_variable
from bot.errors import ConfigError
from bot.memory.recall import Recall, load_retrieval_weights
from bot.memory.scope import Memory
from bot.serving.policy import Policy
from bot.store.deliveries import Deliveries
from bot.store.users import Users
from connectors.access import Access
from connectors.base import Desk, Services
from connectors.discord.connector import Discord
from connectors.local.discord import LocalDiscord
from connectors.local.discord_state import TOKEN

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def _no_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_a_secret_loses_its_line_end_and_may_have_none_within(monkeypatch):
    monkeypatch.setenv("SECRET", " word\r\n")
    assert read_secret("some.key", "SECRET") == read_variable("some.key", "SECRET") == "word"
    monkeypatch.setenv("SECRET", "one\ntwo")
    with pytest.raises(ConfigError, match=r"some\.key: the value of \$SECRET contains white space") as error:
        read_secret("some.key", "SECRET")
    assert "two" not in str(error.value), "a secret is not shown"
    for empty in ("", " \n"):
        monkeypatch.setenv("SECRET", empty)
        with pytest.raises(ConfigError, match=r"some\.key has value 'SECRET', a variable that is not set"):
            read_secret("some.key", "SECRET")


def test_a_user_who_has_a_home_and_a_name_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("LOGNAME", "ann")
    ensure_user(tmp_path)
    assert (os.environ["HOME"], os.environ["LOGNAME"]) == ("/somewhere", "ann")
    assert list(tmp_path.iterdir()) == []
    assert expand_home("~/x") == "/somewhere/x"
    assert expand_home("a/~x") == "a/~x"


def test_a_closed_stream_is_opened_before_another_file_gets_its_number():
    code = "from bot.environment import open_standard_streams\nimport sys\nopen_standard_streams()\n"
    code += "print(sys.stdin.fileno(), sys.stdin.isatty(), repr(sys.stdin.readline()))"
    line = f'exec "{sys.executable}" -c "$CODE" <&-'
    done = subprocess.run(["bash", "-c", line], env={**os.environ, "CODE": code}, capture_output=True, text=True)
    assert done.stdout == "0 False ''\n", done.stderr


@pytest.mark.usefixtures("_no_proxies")
def test_the_proxy_of_an_address_is_the_one_that_the_environment_names(monkeypatch):
    assert find_proxy("https://discord.com/api") is None
    monkeypatch.setenv("ALL_PROXY", "http://all:1")
    assert find_proxy("https://discord.com/api") == "http://all:1"
    monkeypatch.setenv("https_proxy", "http://secure:2")
    assert find_proxy("https://discord.com/api") == "http://secure:2"
    assert find_proxy("http://discord.com/api") == "http://all:1"
    monkeypatch.setenv("NO_PROXY", "localhost,discord.com")
    assert find_proxy("https://discord.com/api") is None


class Proxy:
    """A proxy on loopback that passes on what it is given, and keeps it."""

    def __init__(self) -> None:
        self.passed = b""

    async def start(self, target: int) -> str:
        self.target = target
        self.server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        await asyncio.gather(self._copy(reader, back), self._copy(there, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(65536):
                self.passed += part
                writer.write(part)
                await writer.drain()
        writer.close()


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.usefixtures("_no_proxies")
async def test_discord_is_reached_through_the_proxy_that_the_environment_names(
    is_named, config, database, store, registry, tokenizer, monkeypatch
):
    tracker = StateTracker(store, tokenizer, Recall(Memory(database), None, load_retrieval_weights()), config.dialogue, 512)
    policy = Policy("http://127.0.0.1:9", config.policy)  # nobody is answered here
    dialogue, users = DialogueManager(store, tracker, policy), Users(database, PrivacyConfig())
    nobody = Desk(*[None] * 8)
    parts = dialogue, Deliveries(database), Reactions(ReactionsConfig()), Access(config.access), users, nobody
    fake, proxy = LocalDiscord(), Proxy()
    await fake.start()
    address = await proxy.start(fake.port)
    if is_named:
        monkeypatch.setenv("HTTP_PROXY", address)
    bot = Discord(Services(*parts), DiscordConfig(), TOKEN)
    running = asyncio.create_task(bot.run())
    await until(fake.identified.is_set)
    await bot.stop()
    await running
    await fake.stop()
    proxy.server.close()
    await policy.close()
    for request in (rb"GET \S+/api/v10/users/@me", rb"GET \S+/gw"):
        assert bool(re.search(request, proxy.passed)) == is_named, request
