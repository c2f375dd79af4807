"""Clients that keep the history themselves: what of it was said to us is known, and forgotten, and asked for consent."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.migration import MigrationContext
from fake_vllm import FakeVllm

import bot
from bot.chat.dialogue import DialogueManager, History, ReplyOptions
from bot.chat.tracker import StateTracker
from bot.errors import DataError
from bot.memory.recall import Recall, load_retrieval_weights
from bot.memory.scope import Memory
from bot.serving.policy import Policy
from bot.store.forgetting import forget_message, forget_person
from bot.store.histories import fingerprint_text
from bot.store.tables import fingerprints
from bot.store.users import Users
from bot.types import Conversation, Feedback, FeedbackKind, Message, Role, Turn, new_id
from learning.data.replay_buffer import ReplayBuffer

SECRET = "my secret is swordfish"


class Client:
    """A client of the web that sends all that was said before with each question."""

    def __init__(self, dialogue: DialogueManager, vllm: FakeVllm, token: str = "app"):
        self.dialogue, self.vllm, self.token = dialogue, vllm, token

    async def ask(self, text: str, *before: str, person: str = "ann", answer: str = "fine", begun: str = "") -> Turn:
        """Ask after what was said before (a question, its answer, and so on)."""
        self.vllm.says = answer
        roles = ["user", "assistant"] * len(before)
        history = History([{"role": role, "content": said} for role, said in zip(roles, before, strict=False)], begun)
        place = Conversation("web", new_id(), space=self.token)
        options = ReplyOptions(has_client_history=True)
        return await self.dialogue.respond_to_history(Message("", f"{self.token}/{person}", text), history, place, options)


@pytest_asyncio.fixture(loop_scope="session")
async def client(config, database, store, tokenizer, registry) -> AsyncIterator[Client]:
    vllm = FakeVllm(tokenizer)
    policy = Policy(await vllm.start(), config.policy, end_ids=tokenizer.end_ids)
    recall = Recall(Memory(database), None, load_retrieval_weights())
    tracker = StateTracker(store, tokenizer, recall, config.dialogue, config.policy.context_tokens)
    yield Client(DialogueManager(store, tracker, policy), vllm)
    await policy.close()
    await vllm.stop()
    recall.close()


async def test_a_forgotten_completion_is_gone_from_the_later_turns_of_its_client(client, database, store, tokenizer):
    first = await client.ask(SECRET)
    then = await client.ask("thanks", SECRET, first.text)
    last = await client.ask("and now?", SECRET, first.text, "thanks", then.text)
    apart = await client.ask("hello")
    for turn in (then, last):
        assert "swordfish" in tokenizer.hf.decode(turn.prompt_ids)  # the control
    assert set(last.shown) == {first.message_id, first.reply_id, then.message_id, then.reply_id}
    await client.dialogue.forget(first.message_id)
    assert [store.find_turn(one.id) for one in (first, then, last)] == [None] * 3
    assert store.find_turn(apart.id) == apart
    with database.read() as connection:
        kept = set(connection.execute(sa.select(fingerprints.c.message_id)).scalars())
    assert first.message_id not in kept
    assert apart.message_id in kept


@pytest.mark.parametrize(
    "before",
    [
        (f"  {SECRET}\r\n", " fine "),  # clients trim and wrap
        ("something else that its client made of it", "fine"),
        (SECRET, "an answer that its client cut"),
    ],
)
async def test_words_are_known_again_if_the_question_or_the_answer_is(client, store, before):
    first = await client.ask(SECRET)
    then = await client.ask("thanks", *before)
    assert first.message_id in then.shown
    await client.dialogue.forget(first.message_id)
    assert store.find_turn(then.id) is None


async def test_what_was_regenerated_or_continued_is_known_too(client, store):
    first = await client.ask(SECRET)
    client.vllm.says = "well done"
    again = await client.dialogue.regenerate(first.id, "app/ann", ReplyOptions(has_client_history=True))
    then = await client.ask("thanks", "edited", "well done")
    assert again.reply_id in then.shown
    goes_on = await client.ask("edited", begun="well done")
    assert again.reply_id in goes_on.shown
    assert client.vllm.prompt.endswith("well done"), "the answer is continued, not answered"
    await client.dialogue.forget(first.message_id)
    assert store.find_turn(then.id) is store.find_turn(goes_on.id) is None


async def test_of_the_same_words_those_are_meant_that_were_answered_so(client, store):
    first = await client.ask("hello", answer="hey there")
    second = await client.ask("hello", answer="hi")
    after_first = await client.ask("thanks", "hello", "hey there")
    after_second = await client.ask("thanks", "hello", "hi")
    assert set(after_first.shown) == {first.message_id, first.reply_id}
    assert set(after_second.shown) == {second.message_id, second.reply_id}
    await client.dialogue.forget(second.message_id)
    assert store.find_turn(after_first.id) is not None
    assert store.find_turn(after_second.id) is None


async def test_ones_own_words_are_meant_before_those_of_others_and_never_those_of_another_token(client):
    anns = await client.ask("hello")
    bobs = await client.ask("hello", person="bob")
    assert anns.message_id in (await client.ask("thanks", "hello", "fine")).shown
    assert bobs.message_id in (await client.ask("thanks", "hello", "fine", person="bob")).shown
    assert bobs.message_id in (await client.ask("thanks", "hello", "fine", person="cleo")).shown  # they share a client
    other = Client(client.dialogue, client.vllm, token="other")
    assert (await other.ask("thanks", "hello", "fine")).shown == {}


async def test_who_withholds_consent_is_not_learned_from_in_the_history_of_others(
    client, config, database, store, tokenizer
):
    bobs = await client.ask(SECRET, person="bob")
    anns = await client.ask("thanks", SECRET, bobs.text)
    apart = await client.ask("hello")
    for turn in (anns, apart):
        await client.dialogue.record_feedback(Feedback(turn.id, "app/ann", FeedbackKind.APPROVAL))

    def learned() -> set[str]:
        return {one.turn_id for one in ReplayBuffer(store, tokenizer, config).snapshot().rated}

    assert learned() == {anns.id, apart.id}  # the control
    Users(database, config.privacy).record_consent("web", "app/bob", consent=False)
    assert learned() == {apart.id}


async def test_a_forgotten_person_is_gone_from_the_histories_of_others(client, database, registry, store):
    bobs = await client.ask(SECRET, person="bob")
    anns = await client.ask("thanks", SECRET, bobs.text)
    forget_person(database, registry, "web", "app/bob")
    assert store.find_turn(anns.id) is None


async def test_what_is_forgotten_while_it_is_answered_is_not_kept(client, database, store, monkeypatch):
    first = await client.ask(SECRET)
    reply = client.dialogue.policy.reply

    async def meanwhile(*prompt, **options):
        forget_message(database, first.message_id)
        return await reply(*prompt, **options)

    monkeypatch.setattr(client.dialogue.policy, "reply", meanwhile)
    with pytest.raises(DataError, match="forgotten meanwhile"):
        await client.ask("thanks", SECRET, first.text)
    assert store.count_rows()["turns"] == 0


async def test_only_what_was_shown_of_a_long_history_is_named(client, config):
    first = await client.ask(SECRET)
    filler = ["hello", "well"] * config.policy.context_tokens
    turn = await client.ask("thanks", SECRET, first.text, *filler)
    assert first.message_id not in turn.shown
    assert len(turn.prompt_ids) <= config.policy.context_tokens


async def test_an_answer_to_continue_never_bursts_the_budget(client, config):
    turn = await client.ask("x " * 5000, "hello", "fine", begun="and so on " * 2000)
    assert config.policy.context_tokens / 2 < len(turn.prompt_ids) <= config.policy.context_tokens


def test_what_clients_said_before_the_upgrade_is_known_after_it(config, database, store):
    place = store.open_conversation(Conversation("web", new_id(), space="app"))
    asked = Message(place.id, "app/ann", SECRET)
    answer = Message(place.id, "kibitz", "fine", Role.ASSISTANT, reply_to=asked.id)
    elsewhere = store.open_conversation(Conversation("discord", new_id()))
    for message in (asked, answer, Message(elsewhere.id, "ann", SECRET)):
        store.add_message(message)
    script = AlembicConfig()
    script.set_main_option("script_location", str(Path(bot.__file__).parent / "store" / "migrations"))
    with database.engine.begin() as connection:
        script.attributes["connection"] = connection
        command.downgrade(script, "0009")
        assert MigrationContext.configure(connection).get_current_revision() == "0009"
    database.upgrade()
    with database.read() as connection:
        rows = connection.execute(sa.select(fingerprints).order_by(fingerprints.c.message_id)).all()
    assert [tuple(row) for row in rows] == [
        (said.id, "web", "app", "app/ann", fingerprint_text(said.role, said.text)) for said in (asked, answer)
    ]
