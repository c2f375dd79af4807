"""Supervision: what fails harms nothing else, is told once, shows while it lasts, and is tried again until it works."""

import asyncio
import contextlib
import itertools
import logging
import sys
from collections.abc import AsyncIterator, Callable

import pytest
import sqlalchemy as sa
import typer
from conftest import refused, until, write_config

from bot.app import make_desk, run
from bot.config import load
from bot.data_directory import HEALTH_FILE, lock_directory
from bot.errors import ConfigError, ConnectorError, ServingError
from bot.serving.policy import Policy
from bot.serving.vllm_server import VllmServer
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.registry import PolicyRegistry
from bot.supervision import Health, background_tasks, read_failures, supervise
from learning.rollout.deployment import Deployment
from learning.rollout.loop import OnlineLearner


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr("bot.supervision.FIRST_PAUSE", 0.01)


@contextlib.asynccontextmanager
async def an_outage(url: str) -> AsyncIterator[None]:
    """Inside, the database lets nobody in, and everybody who was in is thrown out."""
    name = sa.make_url(url).database
    admin = sa.create_engine(sa.make_url(url).set(database="postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        those = sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
        while connection.execute(those, {"name": name}).all():  # somebody may have been on their way in
            await asyncio.sleep(0.01)
        try:
            yield
        finally:
            connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    admin.dispose()


async def test_a_database_that_is_gone_for_a_moment_ends_neither_the_learner_nor_the_watcher_of_rollbacks(
    postgresql: Callable[[], str], tmp_path, demo_model
):
    url = postgresql()
    config = load(data_dir=str(tmp_path), database={"url": url}, learning={"check_seconds": 0.05})
    database = Database(config.database_url, config.data)
    database.upgrade()
    registry = PolicyRegistry(database)
    registry.ensure_base(demo_model)
    told: list[str] = []
    health = Health(told.append, tmp_path / HEALTH_FILE)
    policy = Policy("http://127.0.0.1:9", config.policy)
    deployment = Deployment(policy, registry, config.serving, config.training, config.gate, told.append)
    looks: list[str] = []
    look = deployment.follow_registry
    deployment.follow_registry = lambda: looks.append("") or look()
    async with background_tasks() as start:
        start(deployment.watch(0.05, health))
        start(OnlineLearner(ConversationStore(database), deployment, config, told.append).run(health))
        await until(lambda: looks)
        assert not health.failures
        async with an_outage(url):
            await until(lambda: set(health.failures) == {"learning", "deployment"})
            assert set(read_failures(tmp_path / HEALTH_FILE)) == {"learning", "deployment"}
            before = list(told)
            await asyncio.sleep(0.3)
            assert told == before, "while it lasts it is told once"
        await until(lambda: not health.failures)
        assert read_failures(tmp_path / HEALTH_FILE) == {}
        before = len(looks)
        await until(lambda: len(looks) > before)
    await policy.close()
    database.close()
    for name in ("learning", "deployment"):
        failures = len([line for line in told if line.startswith(f"{name} failed:")])
        assert failures == told.count(f"{name} works again") > 0, told


async def test_a_bug_in_one_task_is_told_once_and_tried_again_later_and_later_while_the_others_go_on(caplog):
    told, tries, steps, words = [], [], [], "what somebody said"
    health = Health(told.append)
    clock = asyncio.get_running_loop().time

    async def broken() -> None:
        tries.append(clock())
        if len(tries) < 6:
            raise RuntimeError(f"a bug, for the {len(tries)}th time\n{words}")

    async def well() -> None:
        steps.append("")

    with caplog.at_level(logging.ERROR):
        async with background_tasks() as start:
            start(supervise("connector", broken, health))
            start(supervise("other", well, health, every=0))
            await until(lambda: "connector" in health.failures)
            began, since = len(steps), health.failures["connector"].since
            await until(lambda: len(tries) == 4)
            assert health.failures["connector"].since == since
            await until(lambda: not health.failures)
            assert len(steps) > began
    assert told == [
        "connector failed: RuntimeError: a bug, for the 1th time (kibitz goes on, and tries again)",
        "connector works again",
    ]
    pauses = [after - before for before, after in itertools.pairwise(tries)]
    assert all(pause >= 0.01 * 2**number for number, pause in enumerate(pauses)), pauses
    assert "in broken" in caplog.text, "where a bug is stands in the log"
    assert words not in caplog.text, "what an error quotes does not"


async def test_a_pause_has_a_longest_length():
    tries: list[str] = []

    async def broken() -> None:
        tries.append("")
        raise ConnectorError("the operator must do something")

    health = Health(lambda text: None)
    async with background_tasks() as start:
        start(supervise("connector", broken, health, longest_pause=0.02))
        await until(lambda: len(tries) > 30)  # doubled each time, the last pause would be longer than a year


async def test_a_task_without_steps_works_again_when_it_has_run_for_a_while(monkeypatch):
    monkeypatch.setattr("bot.supervision.STABLE_SECONDS", 0.05)
    told, tries = [], []

    async def runs_on() -> None:
        tries.append("")
        if len(tries) == 1:
            raise ServingError("not yet")
        await asyncio.Event().wait()

    health = Health(told.append)
    async with background_tasks() as start:
        start(supervise("connector", runs_on, health))
        await until(lambda: "connector works again" in told)
        assert len(tries) == 2


async def test_each_reason_is_told_once_until_the_task_works():
    told: list[str] = []
    health = Health(told.append)
    for reason in ("one", "other", "one", "other"):
        health.record_failure("task", ServingError(reason))
    assert len(told) == 2
    assert health.failures["task"].reason == "other"
    health.record_recovery("task")
    health.record_recovery("task")
    assert told[2:] == ["task works again"]
    health.record_failure("task", ServingError("one"))
    assert len(told) == 4


def test_what_only_the_operator_can_put_right_ends_kibitz_with_one_line(here):
    stopped: list[str] = []

    async def misconfigured() -> None:
        raise ConfigError("config key web.port has value 1, which cannot be used; choose another")

    async def other() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append("")

    async def main() -> None:
        async with background_tasks() as start:
            health = Health(lambda text: None)
            start(supervise("other", other, health))
            start(supervise("web", misconfigured, health))
            await asyncio.Event().wait()

    application = typer.Typer()
    application.command("serve")(lambda: run(main()))
    refused(here(application=application), "config key web.port has value 1")
    assert stopped


ANSWERS = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"choices": [{}]}')
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


async def test_a_vllm_that_cannot_be_restarted_is_tried_until_it_can(config, monkeypatch):
    """Real processes; what is started in vLLM's place ends at once, then answers."""
    starts, restored, told = [], [], []

    class Server(VllmServer):
        def _command(self) -> list[str]:
            starts.append("")
            script = ANSWERS if len(starts) > 7 or len(starts) == 1 else "raise SystemExit(3)"
            return [sys.executable, "-c", script, str(self.port)]

    async def restore() -> None:
        restored.append("")

    server = Server(config.serving, config.policy, config.training, config.data, config.policy.model)
    policy = Policy(server.url, config.policy)
    health = Health(told.append)
    await server.start(policy)
    async with background_tasks() as start:
        start(server.watch(policy, restore, health))
        assert server._process is not None
        server._process.kill()
        await until(lambda: "vLLM" in health.failures)
        assert policy.admin.weights_version is None
        await until(lambda: not health.failures)
        assert (len(starts), len(restored)) == (8, 1)
        assert await policy.admin.is_ready()
    await policy.close()
    await server.stop()
    assert told[-1] == "vLLM works again"
    assert len(told) == 3, "that it died, why it does not start, and that it works"


def test_status_says_what_fails_in_the_kibitz_that_runs(tmp_path, demo_model, here):
    config = write_config(tmp_path, demo_model)
    (tmp_path / "data").mkdir()
    Health(lambda text: None, tmp_path / "data" / HEALTH_FILE).record_failure("learning", ServingError("the [disk] is full"))
    with lock_directory(tmp_path / "data", "serve"):
        said = here("status", "--config", config).stdout
        assert "running: yes\nfailing: learning since 20" in said
        assert "UTC: the [disk] is full" in said
    said = here("status", "--config", config).stdout
    assert "running: no" in said
    assert "failing" not in said, "what a dead one left behind is no news"
    Health(lambda text: None, tmp_path / "data" / HEALTH_FILE)
    with lock_directory(tmp_path / "data", "serve"):
        assert "failing" not in here("status", "--config", config).stdout


async def test_a_running_kibitz_keeps_its_tasks_and_says_what_fails(live, monkeypatch):
    monkeypatch.setattr("bot.supervision.STABLE_SECONDS", 0.05)
    is_mended = asyncio.Event()

    async def connect() -> None:
        if not is_mended.is_set():
            raise RuntimeError("a bug in a connector")
        await asyncio.Event().wait()

    live.keep_running("broken", connect)
    await until(lambda: make_desk(live).list_failing_tasks() == ["broken"])
    assert "failing: broken since" in await make_desk(live).describe_status()
    assert set(read_failures(live.config.data / HEALTH_FILE)) == {"broken"}
    is_mended.set()
    await until(lambda: make_desk(live).list_failing_tasks() == [])
    assert "failing" not in await make_desk(live).describe_status()
