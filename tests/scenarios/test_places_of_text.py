"""Where people's words may lie: one word is put into every place, and looked for when it was to be forgotten (law 10).

Every file of the data directory, every table and column, all that the running parts hold in memory, and the log are
searched, as text and as token ids. Reward heads hold no words, and are searched for who taught them.
`docs/architecture.md` lists the places. The control is that the word was in each of them before.
"""

import asyncio
import contextlib
import gc
import json
import logging
import threading
import traceback
import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from conftest import until
from fake_vllm import FakeVllm
from longest_answer import LongestAnswer
from one_weight import EXCLAIMS, STATES, learn_in_an_instant

from bot import app
from bot.chat.dialogue import History, ReplyOptions
from bot.config import Config
from bot.errors import RegistryError
from bot.models.tokenizer import ChatTokenizer
from bot.records import Record
from bot.store import words
from bot.store.forgetting import SAMPLES_FILE, UNFINISHED_SUFFIX
from bot.store.tables import embeddings, messages, metadata
from bot.types import Conversation, Feedback, FeedbackKind, Message, PolicyState, Turn, new_id, now
from learning.data.selection import is_held_out, question_key
from learning.importers.kibitz_export import export
from learning.judging import probe, report
from learning.rollout.heads import locate_heads
from learning.training.run import train_version

WORD = "zyxquon"  # what Ann says, and nobody else but those who repeat her
ANN, BOB = "ann", "bob"
PLACE = Conversation("discord", "general", space="guild")
ELSEWHERE = Conversation("discord", "elsewhere", space="guild")
WEB = Conversation("web", "app", space="app")


class Search:
    """Looks for the word in all that one kibitz keeps. Places are named as people would name them."""

    def __init__(self, tokenizer: ChatTokenizer):
        self.tokenizer = tokenizer
        spelled = [tokenizer.hf.encode(text, add_special_tokens=False) for text in (WORD, f" {WORD}", f"\n{WORD}")]
        self.ids = {tuple(ids[1:]) for ids in spelled}  # the first token may be one with the space before the word

    def spells(self, value: Any) -> bool:
        """Whether a value is or contains the word, as text, bytes or token ids."""
        if isinstance(value, str):
            return WORD in value or any(json.dumps(ids)[1:-1] in value for ids in self.ids)
        if isinstance(value, bytes | bytearray):
            return WORD.encode() in value or any(json.dumps(ids)[1:-1].encode() in value for ids in self.ids)
        if isinstance(value, list | tuple) and len(value) > 2 and all(type(one) is int for one in value):
            return any(
                value[start : start + len(ids)] == type(value)(ids) for ids in self.ids for start in range(len(value))
            )
        return False

    def files(self, data: Path) -> set[str]:
        """The files that contain it, by their paths in the data directory."""
        paths = [path for path in data.rglob("*") if path.is_file()]
        return {str(path.relative_to(data)) for path in paths if self.spells(path.read_bytes())}

    def columns(self, engine: sa.Engine) -> set[str]:
        """The columns that contain it."""
        found = set()
        with engine.connect() as connection:
            for table in metadata.sorted_tables:
                for row in connection.execute(sa.select(table)).mappings():
                    found |= {f"{table.name}.{name}" for name, value in row.items() if self.spells(_plain(value))}
        return found

    def memory(self, root: Any) -> set[str]:
        """The kinds of objects that hold it, of all that can be reached from `root`."""
        found: set[str] = set()
        seen = {id(root)}
        waiting = [(root, "")]
        while waiting:
            one, owner = waiting.pop()
            if self.spells(one):
                found.add(owner)
            name = type(one).__name__
            inside = owner if name in {"dict", "list", "tuple", "set", "cell", "defaultdict", "OrderedDict"} else name
            for other in _held_by(one):
                if id(other) not in seen:
                    seen.add(id(other))
                    waiting.append((other, inside))
        return found


LOOP = {"asyncio", "_asyncio", "aiohttp", "selectors", "uvloop"}


def _plain(value: Any) -> Any:
    value = value.as_json() if isinstance(value, Record) else value
    return json.dumps(value) if isinstance(value, dict) else value


def _held_by(one: Any) -> list[Any]:
    """What an object holds; neither modules, classes nor the event loop, by which everything hangs together."""
    if isinstance(one, types.ModuleType | type | types.FrameType) or type(one).__module__.split(".")[0] in LOOP:
        return []
    if isinstance(one, dict):
        return [*one.keys(), *one.values()]  # the collector passes keys by that are text
    if isinstance(one, types.FunctionType):
        return [*(one.__closure__ or ()), *(one.__defaults__ or ())]
    return [other for other in gc.get_referents(one) if not isinstance(other, types.ModuleType | type)]


class Talk:
    """What Ann and Bob say, so that her word comes into every place."""

    def __init__(self, kibitz: app.Kibitz, vllm: FakeVllm):
        self.kibitz, self.vllm, self.dialogue = kibitz, vllm, kibitz.dialogue

    async def ask(self, person: str, text: str, answer: str, place: Conversation = PLACE) -> Turn:
        self.vllm.says = answer
        return await self.dialogue.respond(Message("", person, text, event_id=new_id()), place=place)

    async def judge(self, turn: Turn, person: str, kind: FeedbackKind, text: str | None = None) -> None:
        await self.dialogue.record_feedback(Feedback(turn.id, person, kind, signal=kind, text=text, event_id=new_id()))

    async def others(self) -> None:
        """People talk of other things, so that a run has enough to learn and to be judged by."""
        for number in range(40):
            said = EXCLAIMS if number % 2 else STATES
            turn = await self.ask(f"person{number % 7}", f"question number {number}", said, ELSEWHERE)
            kind = FeedbackKind.APPROVAL if number % 2 else FeedbackKind.DISAPPROVAL
            await self.judge(turn, f"person{number % 7}", kind)

    async def all_about_it(self, is_held_out_alone: bool) -> Turn:
        """Ann says her word once, and it goes round. Return the answer to it."""
        spellings = (f"my word is {WORD} and this is try {number}" for number in range(100))
        share = self.kibitz.config.learning.held_out
        said = next(one for one in spellings if is_held_out(question_key(one), share) == is_held_out_alone)
        first = await self.ask(ANN, said, f"I remember {WORD}")
        await self.judge(first, ANN, FeedbackKind.APPROVAL)
        await self.judge(first, ANN, FeedbackKind.COMMENT, f"nobody knows {WORD}")
        await self.judge(first, ANN, FeedbackKind.CORRECTION, f"say {WORD} again")
        self.vllm.says = f"again {WORD}"
        await self.dialogue.regenerate(first.id, BOB)
        usual, self.dialogue.sampler.selector = self.dialogue.sampler.selector, LongestAnswer()
        self.vllm.says = ["what was it?", f"{WORD}?"]
        await self.dialogue.respond(Message("", ANN, f"did I say {WORD}?"), place=PLACE)
        self.dialogue.sampler.selector = usual
        typo = f"the {WORD} is edited away"
        event = new_id()
        self.vllm.says = f"you wrote {WORD}"
        await self.dialogue.respond(Message("", ANN, typo, event_id=event), place=PLACE)
        await self.dialogue.edit(event, "nothing to see here", now())
        await self.ask(BOB, "what was the secret word that ann told you?", f"it is {WORD}")  # shown hers and ours
        self.vllm.says = f"the web knows {WORD}"
        asked, options = f"I tell the web {WORD}", ReplyOptions(has_client_history=True)
        web = await self.dialogue.respond_to_history(Message("", f"app/{ANN}", asked), History(), WEB, options)
        before = [{"role": "user", "content": asked}, {"role": "assistant", "content": web.text}]
        later = Message("", f"app/{BOB}", "and now?")
        await self.dialogue.respond_to_history(later, History(before), WEB, options)
        return first


COLUMNS = {
    *("messages.text", "words.word", "feedback.text"),
    *("turns.prompt_ids", "turns.completion_ids", "turns.selection"),
}


@contextlib.asynccontextmanager
async def talking(config: Config, tokenizer: ChatTokenizer) -> AsyncIterator[Talk]:
    """A whole kibitz whose vLLM says what it is told."""
    vllm = FakeVllm(tokenizer)
    config = config.model_copy(update={"serving": config.serving.model_copy(update={"url": await vllm.start()})})
    async with app.running(config, config.policy.model, logging.getLogger("told").info) as kibitz:
        yield Talk(kibitz, vllm)
    await vllm.stop()


@pytest.fixture
def teaching(config: Config) -> Config:
    """A config under which few opinions are evidence enough."""
    # Without labels held-out opinions teach no version, so that one stays.
    learning = config.learning.model_copy(update={"held_out": 0.5, "detect_drift": False, "distil_prompts": 0})
    gate = config.gate.model_copy(update={"confidence": 0.6, "samples": 100})
    return config.model_copy(update={"learning": learning, "gate": gate})


@contextlib.asynccontextmanager
async def paused_run(config: Config, tokenizer: ChatTokenizer) -> AsyncIterator[tuple[asyncio.Task[Any], threading.Event]]:
    """Inside, a run is under way that has written its samples. The event lets it go on."""
    is_under_way, goes_on = threading.Event(), threading.Event()
    write = probe.write

    def write_later(*args: Any) -> Any:
        is_under_way.set()
        assert goes_on.wait(300)
        return write(*args)

    with learn_in_an_instant(tokenizer) as patch:
        patch.setattr(
            "learning.training.run.interruptible", lambda progress: contextlib.nullcontext(progress)
        )  # no signals in a thread
        patch.setattr(probe, "write", write_later)
        run = asyncio.create_task(asyncio.to_thread(train_version, config, lambda *_: None))
        await until(is_under_way.is_set)
        try:
            yield run, goes_on
        finally:
            goes_on.set()
            await asyncio.wait([run])


@pytest.mark.parametrize(("what", "is_held_out_alone"), [("person", True), ("person", False), ("messages", True)], ids=str)
async def test_a_word_is_gone_from_every_place_where_text_may_lie(teaching, tokenizer, caplog, what, is_held_out_alone):
    caplog.set_level(logging.DEBUG)
    search, data = Search(tokenizer), teaching.data
    async with talking(teaching, tokenizer) as talk:
        kibitz = talk.kibitz
        await talk.all_about_it(is_held_out_alone)
        await talk.others()
        await kibitz.dialogue.tracker.recall.flush()
        with learn_in_an_instant(tokenizer):
            finished = train_version(kibitz.config, lambda *_: None)
        version = kibitz.registry.get(finished.policy)
        async with paused_run(kibitz.config, tokenizer) as (run, goes_on):
            under_way = f"policies/policy-{len(kibitz.registry.all()) - 1}{UNFINISHED_SUFFIX}/{SAMPLES_FILE}"
            await until(lambda: ANN in taught_head(data))
            # The control: it is in each of these places.
            found = search.files(data)
            assert found >= {f"policies/{version.name}/{SAMPLES_FILE}", under_way}
            assert bool(found & {"kibitz.db", "kibitz.db-wal"}) == (kibitz.database.dialect == "sqlite")
            assert search.columns(kibitz.database.engine) == COLUMNS
            while "ScopeIndex" not in search.memory(kibitz):  # what is embedded meanwhile has it read anew
                await talk.ask(BOB, "and what else?", "nothing")
            assert search.memory(kibitz) >= {"ScopeIndex", "_lru_cache_wrapper", "FeatureExtractor"}
            stem = words._stem  # its cache cannot be read
            assert vectors_of(kibitz, WORD)
            assert not is_held_out_alone or WORD in report.render_html(report.collect(version, "")), "it shows these first"

            if what == "person":
                await app.make_desk(kibitz).forget_person("discord", ANN)
                await app.make_desk(kibitz).forget_person("web", f"app/{ANN}")
            else:
                for message_id in said_by_ann(kibitz):
                    await talk.dialogue.forget(message_id)
            assert search.files(data) == set(), "while the run is under way"
            assert ANN not in taught_head(data) or what == "messages"
            goes_on.set()
            [outcome] = await asyncio.gather(run, return_exceptions=True)
        await until(lambda: search.memory(kibitz) == set())
        await until(lambda: "person1" in taught_head(data))
        assert not taught_head(data) & {ANN, f"app/{ANN}"}
        assert words._stem is not stem
        is_purged = what == "person" and not is_held_out_alone
        assert isinstance(outcome, RegistryError) if is_purged else outcome.policy
        assert (kibitz.registry.get(version.name).state == PolicyState.PURGED) == is_purged
        assert Path(version.path).exists() != is_purged
        if not is_purged:
            assert WORD not in report.render_html(report.collect(version, ""))
        assert search.files(data) == search.columns(kibitz.database.engine) == set()
        assert not vectors_of(kibitz, WORD)
        assert WORD not in caplog.text
    assert search.files(data) == set(), "nor when kibitz has ended"


@pytest.mark.parametrize("shows_text", [False, True], ids=["by default", "the control"])
async def test_the_log_quotes_what_is_said_only_if_the_config_says_so(config, tokenizer, log_lines, shows_text):
    lines = log_lines(level="debug", text=shows_text)
    quiet = config.model_copy(update={"dialogue": config.dialogue.model_copy(update={"embedder": "none"})})
    async with talking(quiet, tokenizer) as talk:
        await talk.all_about_it(is_held_out_alone=True)
    logged = lines.getvalue()
    assert all(f"bot.chat.dialogue{ids}" in logged for ids in (": stored message", " turn=")), "all of it is logged"
    assert Search(tokenizer).spells(logged) == shows_text
    for text in ("my word is", "I remember", "nobody knows", "again", "I tell the web"):
        assert (f"{text} {WORD}" in logged) == shows_text


def taught_head(data: Path) -> set[str]:
    """The people who taught the reward heads in a data directory. A head names them, and holds no word of anybody."""
    return {one for file in locate_heads(data).glob("head-*.json") for one in json.loads(file.read_text())["teachers"]}


def said_by_ann(kibitz: app.Kibitz) -> list[str]:
    """The ids of all that she wrote."""
    with kibitz.database.read() as connection:
        theirs = messages.c.author_id.in_([ANN, f"app/{ANN}"])
        return list(connection.execute(sa.select(messages.c.id).where(theirs)).scalars())


def vectors_of(kibitz: app.Kibitz, word: str) -> set[bytes]:
    """The vectors of messages that were made from the word; those of its own messages, as they were before."""
    embedder = kibitz.dialogue.tracker.recall.embedder
    about = embedder.encode([f"it is {word}"])[0]
    with kibitz.database.read() as connection:
        rows = connection.execute(sa.select(embeddings.c.vector)).scalars().all()
    vectors = {row: np.frombuffer(row, np.int8).astype(float) for row in rows}
    return {row for row, vector in vectors.items() if vector @ about > 0.95 * np.linalg.norm(vector)}


async def test_an_export_has_nothing_of_people_who_withhold_consent(teaching, tokenizer, tmp_path):
    async with talking(teaching, tokenizer) as talk:
        await talk.all_about_it(is_held_out_alone=True)
        kept, withheld = tmp_path / "kept.jsonl", tmp_path / "withheld.jsonl"
        privacy = talk.kibitz.config.privacy
        export(talk.kibitz.store, kept, "", privacy)
        await app.make_desk(talk.kibitz).manage_consent("discord", ANN, "off")
        await app.make_desk(talk.kibitz).manage_consent("web", f"app/{ANN}", "off")
        export(talk.kibitz.store, withheld, "", privacy)
    search = Search(tokenizer)
    assert search.spells(kept.read_text())
    assert not search.spells(withheld.read_text())


def test_an_error_of_the_database_quotes_nobody(database, store, registry):
    """Errors come into logs. PostgreSQL quotes the row that it refuses."""
    place = store.open_conversation(PLACE)
    broken = Message(place.id, ANN, WORD, role=None)  # type: ignore[arg-type]
    with pytest.raises(sa.exc.IntegrityError) as refused:
        store.add_message(broken)
    told = "".join(traceback.format_exception(refused.value))
    assert "messages" in told, "it says where"
    assert WORD not in told
    plain = sa.create_engine(database.engine.url)  # the control
    values = {"id": "1", "conversation_id": place.id, "author_id": ANN, "text": WORD, "at": now()}
    with plain.begin() as connection, pytest.raises(sa.exc.IntegrityError) as refused:
        connection.execute(sa.insert(messages).values(values))
    assert WORD in str(refused.value)
    plain.dispose()


def test_a_search_finds_the_word_in_every_shape(tokenizer):
    search = Search(tokenizer)
    ids = tokenizer.prompt_ids([{"role": "user", "content": f"the word is {WORD}."}])
    for shape in (WORD, f"a {WORD}!", ids, tuple(ids), json.dumps(ids), WORD.encode(), json.dumps({"ids": ids}).encode()):
        assert search.spells(shape)
    for other in ("zyx", ids[:3], b"quon", (1, 2, 3), None, 1.5):
        assert not search.spells(other)
