"""The web as clients really use it: the unmodified OpenAI client, over real HTTP, with a vLLM that says what it is told."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import httpx
import openai
import pytest
import pytest_asyncio
import sqlalchemy as sa
from conftest import PATIENT
from fake_vllm import FakeVllm
from longest_answer import LongestAnswer

from bot.chat.dialogue import DialogueManager
from bot.chat.reactions import Reactions
from bot.chat.tracker import StateTracker
from bot.config import AccessConfig, ReactionsConfig, WebConfig
from bot.errors import ConfigError
from bot.memory.recall import Recall, load_retrieval_weights
from bot.memory.scope import Memory
from bot.serving.policy import Policy
from bot.serving.readiness import Readiness, make_checks
from bot.store import tables
from bot.store.conversations import ConversationStore
from bot.store.deliveries import Deliveries
from bot.store.feedback import not_retracted
from bot.store.forgetting import forget_person
from bot.store.registry import PolicyRegistry
from bot.store.users import Users
from bot.types import FeedbackKind
from connectors.access import Access
from connectors.base import Services
from connectors.web.openai_api import UNSEEN
from connectors.web.server import Endpoint, Web
from learning.data.replay_buffer import ReplayBuffer

HELLO = [{"role": "user", "content": "hello"}]
PHOTO = "data:image/png;base64," + base64.b64encode(bytes(range(256)) * 12_000).decode()  # 4 MB in a request


@dataclass
class Server:
    """One kibitz on the web."""

    url: str
    vllm: FakeVllm
    store: ConversationStore
    dialogue: DialogueManager
    readiness: Readiness
    failing: list[str]
    http: httpx.AsyncClient
    client: openai.AsyncOpenAI

    async def chat(self, *messages: dict, status: int = 200, **fields: object) -> dict:
        """Ask over plain HTTP, where a client's library would correct what is odd."""
        answer = await self.http.post("/v1/chat/completions", json={"messages": messages or HELLO, **fields})
        assert answer.status_code == status, answer.text
        return answer.json()

    def turn(self, completion_id: str):
        return self.store.find_turn(completion_id.removeprefix("chatcmpl-"))


@asynccontextmanager
async def serving(config, database, tokenizer, web: WebConfig, access: AccessConfig = PATIENT) -> AsyncIterator[Server]:
    vllm, store = FakeVllm(tokenizer), ConversationStore(database)
    policy = Policy(await vllm.start(), config.policy, end_ids=tokenizer.end_ids)
    recall = Recall(Memory(database), None, load_retrieval_weights())
    tracker = StateTracker(store, tokenizer, recall, config.dialogue, config.policy.context_tokens)
    dialogue, readiness = DialogueManager(store, tracker, policy), Readiness(make_checks(policy, database, config.data))
    failing: list[str] = []

    async def forget(platform: str, user: str) -> str:
        return str(await database.call(forget_person, database, PolicyRegistry(database), platform, user))

    desk = SimpleNamespace(find_faults=readiness.list_faults, list_failing_tasks=lambda: failing, forget_person=forget)
    ledger, reactions, users = Deliveries(database), Reactions(ReactionsConfig()), Users(database, config.privacy)
    door = Endpoint.open(web)
    server = Web(Services(dialogue, ledger, reactions, Access(access), users, desk), door)
    running = asyncio.create_task(server.run())
    client = openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)
    async with httpx.AsyncClient(base_url=door.url, timeout=300) as http, client:
        yield Server(door.url, vllm, store, dialogue, readiness, failing, http, client)
    await server.stop()
    await running
    await policy.close()
    await vllm.stop()
    recall.close()


@pytest_asyncio.fixture(loop_scope="session")
async def server(config, database, tokenizer, registry) -> AsyncIterator[Server]:
    async with serving(config, database, tokenizer, WebConfig(port=0)) as found:
        yield found


@pytest.mark.parametrize(("streamed", "wanted"), [(1, [1, 3]), (2, [2, 3]), (64, [3, 3])])
async def test_a_streamed_answer_is_chosen_from_fewer_candidates(config, database, tokenizer, registry, streamed, wanted):
    async with serving(config, database, tokenizer, WebConfig(port=0, candidates=streamed)) as server:
        server.vllm.says = ["Hey there!", "Hello, my friend!", "Hi"]
        server.dialogue.sampler.selector, server.dialogue.sampler.candidates = LongestAnswer(), 3
        asked = {"model": "kibitz", "messages": HELLO}
        stream = await server.client.chat.completions.create(**asked, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        whole = await server.client.chat.completions.create(**asked)
        assert [body.get("n", 1) for body in server.vllm.asked] == wanted
        assert "".join(pieces) == server.vllm.says[streamed > 1]
        assert (len([piece for piece in pieces if piece]) > 1) == (streamed == 1)
        assert whole.choices[0].message.content == server.vllm.says[1]
        assert server.turn(whole.id).is_selected


async def test_a_chat_with_tools_and_a_developer_is_answered(server):
    said = await server.client.chat.completions.create(
        model="kibitz",
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": "how is the weather?"},
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "w", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "it is raining"},
        ],
        tools=[{"type": "function", "function": {"name": "w", "parameters": {}}}],
    )
    assert said.choices[0].message.content == "Hey there!"
    at = [server.vllm.prompt.find(text) for text in ("Be kind.", "how is the weather?", "it is raining")]
    assert -1 < at[0] < at[1] < at[2]


async def test_null_in_each_optional_field_is_taken(server):
    names = ("user", "stream", "stream_options", "model", "seed", "max_tokens", "stop", "n", "response_format", "tools")
    assert (await server.chat(*HELLO, **dict.fromkeys(names)))["choices"][0]["message"]["content"] == "Hey there!"


async def test_an_answer_that_was_begun_is_continued(server):
    chat = [*HELLO, {"role": "assistant", "content": "Once upon a time"}]
    said = await server.client.chat.completions.create(model="kibitz", messages=chat)
    assert server.vllm.prompt.endswith("Once upon a time")
    assert said.choices[0].message.content == "Hey there!"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_photo_is_dropped_and_said_to_be_unseen_and_the_chat_goes_on(server, stream):
    asked = {"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": PHOTO}}
    chat = [{"role": "user", "content": list(asked)}]

    async def ask() -> str:
        said = await server.client.chat.completions.create(model="kibitz", messages=chat, stream=stream)
        if not stream:
            return said.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in said])

    answer = await ask()
    assert answer == f"{UNSEEN}Hey there!"
    assert "what is this?[image]" in server.vllm.prompt
    chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": "thanks"}]
    assert await ask() == "Hey there!"
    assert UNSEEN.strip() not in server.vllm.prompt
    turns = server.store.count_rows()["turns"]
    too_large = [{"role": "user", "content": PHOTO}]  # the control: as a text it counts
    await server.chat(*too_large, status=413)
    assert server.store.count_rows()["turns"] == turns == 2


@pytest.mark.parametrize("size", [7, 100, 4096])
async def test_a_photo_is_dropped_however_its_request_arrives_in_pieces(server, size):
    words = 'a "url": "data:image/png;base64,' + "A" * 300  # in a text it is a text
    photo = {"type": "image_url", "image_url": {"url": PHOTO[:3000]}}
    body = json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": words}, photo]}]}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    answer = await server.http.post("/v1/chat/completions", content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text
    assert server.store.read_message(server.turn(answer.json()["id"]).message_id).text == f"{words}[image]"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_has_as_many_tokens_as_it_may_and_ends_before_a_stop(server, config, tokenizer, stream):
    server.vllm.says = "one two\nthree four"

    async def ask(**options):
        said = await server.client.chat.completions.create(model="kibitz", messages=HELLO, stream=stream, **options)
        if not stream:
            return server.turn(said.id), said.choices[0].message.content, said.choices[0].finish_reason
        chunks = [chunk async for chunk in said]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return server.turn(chunks[0].id), text, chunks[-1].choices[0].finish_reason

    turn, text, reason = await ask()
    assert (text, reason, turn.sampling.max_tokens) == ("one two\nthree four", "stop", config.policy.max_tokens)
    turn, text, reason = await ask(max_completion_tokens=2, max_tokens=3)
    assert (len(turn.completion_ids), turn.text, reason) == (2, text, "length")
    turn, _, reason = await ask(max_tokens=10**6)
    assert (turn.sampling.max_tokens, reason) == (config.policy.max_tokens, "stop")
    turn, text, reason = await ask(stop="\nthree")
    assert (turn.text, text, reason, turn.sampling.stop) == ("one two", "one two", "stop", ["\nthree"])
    assert len(turn.logprobs) == len(turn.completion_ids)
    await server.http.post("/v1/feedback", json={"inference_id": turn.id, "value": True})
    [learned] = ReplayBuffer(server.store, tokenizer, config).snapshot().rated
    assert learned.completion_ids == turn.completion_ids
    assert learned.logprobs == turn.logprobs


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"seed": 2**63}, "seed"),
        ({"n": 2}, "n must be 1"),
        ({"tool_choice": "required"}, "calls no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"user": "\0"}, "user"),
    ],
)
async def test_a_clients_mistake_is_a_clients_mistake(server, fields, line):
    error = (await server.chat(status=400, **fields))["error"]
    assert line in error["message"]
    assert error["type"] == "invalid_request_error"
    assert server.vllm.asked == []


async def test_the_model_is_found_by_its_name(server):
    assert (await server.client.models.retrieve("kibitz")).id == "kibitz"
    with pytest.raises(openai.NotFoundError, match="the one here is 'kibitz'"):
        await server.client.models.retrieve("gpt/none")


async def test_pages_of_other_sites_may_use_the_api_where_the_operator_says_so(config, database, tokenizer, registry):
    web = WebConfig(port=0, cors_origins=["https://chat.example"])
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    async with serving(config, database, tokenizer, web) as server:
        answer = await server.http.options("/v1/chat/completions", headers={"Origin": "https://chat.example", **asks})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert answer.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
        answer = await server.http.get("/v1/feedback/none", headers={"Origin": "https://chat.example"})
        assert answer.headers["access-control-allow-origin"] == "https://chat.example", "errors can be read too"
        answer = await server.http.options("/v1/models", headers={"Origin": "https://evil.example", **asks})
        assert answer.status_code == 403
        assert "web.cors_origins" in answer.json()["error"]["message"]
        answer = await server.http.get("/v1/models", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_every_page_may_not_use_the_api_without_a_token(monkeypatch):
    with pytest.raises(ConfigError, match=r"web\.cors_origins has value '\*'"):
        Endpoint.open(WebConfig(port=0, cors_origins=["*"]))
    monkeypatch.setenv("KIBITZ_TOKENS", "ann:one")
    Endpoint.open(WebConfig(port=0, cors_origins=["*"], tokens_env="KIBITZ_TOKENS")).socket.close()
    for name in ("team/ann", "x" * 49):  # "team/ann" would be Ann, as the token "team" names her
        monkeypatch.setenv("KIBITZ_TOKENS", f"{name}:one")
        with pytest.raises(ConfigError, match="without a slash"):
            Endpoint.open(WebConfig(port=0, tokens_env="KIBITZ_TOKENS"))


async def test_a_foreign_host_is_told_which_setting_lets_it_in(server):
    for host in ("evil.example", "127.0.0.1.evil.example", "[::1"):
        answer = await server.http.get("/v1/models", headers={"Host": host})
        assert answer.status_code == 400
        assert "web.tokens_env" in answer.json()["error"]["message"]
    for host in ("localhost:8080", "[::1]:8080", "127.0.0.1"):
        assert (await server.http.get("/v1/models", headers={"Host": host})).status_code == 200


async def test_what_is_unknown_is_told_as_json(server):
    for method, path, status in (("GET", "/v1/none", 404), ("PUT", "/v1/models", 405)):
        answer = await server.http.request(method, path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_disk_is_told_as_json_and_logged_in_one_line_and_it_recovers(server, database, caplog, stream):
    def full(connection, *_):
        connection.execute("PRAGMA max_page_count = 1")  # SQLite takes its present size, and says that the disk is full

    def has_room(connection, *_):
        connection.execute("PRAGMA max_page_count = 1000000")

    question = {"role": "user", "content": "swordfish " * 2000}
    sa.event.listen(database.engine, "checkout", full)
    with caplog.at_level(logging.WARNING):
        error = (await server.chat(question, status=503, stream=stream))["error"]
    sa.event.remove(database.engine, "checkout", full)
    sa.event.listen(database.engine, "checkout", has_room)
    assert error["type"] == "server_error"
    [line] = [record.getMessage() for record in caplog.records if record.name.startswith("connectors")]
    assert "has no room left on its disk" in line
    assert line.split("(")[1].split(")")[0] in error["message"]
    assert "swordfish" not in caplog.text
    assert "\n" not in line
    assert (await server.http.post("/v1/chat/completions", json={"messages": [question]})).status_code == 200


async def test_what_fails_after_the_first_word_is_told_in_the_stream(server, monkeypatch, caplog):
    def fails(*_):
        raise ZeroDivisionError("swordfish")

    monkeypatch.setattr(server.store, "add_turn", fails)
    async with server.http.stream("POST", "/v1/chat/completions", json={"messages": HELLO, "stream": True}) as answer:
        events = [line async for line in answer.aiter_lines() if line]
    assert answer.status_code == 200
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in caplog.text
    assert "swordfish" not in caplog.text


async def test_readiness_is_open_and_asks_vllm_for_nothing_and_metrics_want_a_token(
    config, database, tokenizer, registry, monkeypatch
):
    monkeypatch.setenv("KIBITZ_TOKENS", "ann:one")
    monkeypatch.setattr("bot.serving.readiness.MAX_AGE_SECONDS", 3600.0)  # as slow as this machine may be
    async with serving(config, database, tokenizer, WebConfig(port=0, tokens_env="KIBITZ_TOKENS")) as server:
        assert (await server.http.get("/readyz")).status_code == 503  # nobody has looked yet
        await server.readiness.check()
        asked = len(server.vllm.paths)
        for _ in range(20):
            answer = await server.http.get("/readyz")
            assert (answer.status_code, answer.text) == (200, "ready")
        server.failing.append("learning")
        answer = await server.http.get("/readyz")
        assert (answer.status_code, answer.text) == (200, "ready\nfailing: learning"), "people are answered all the same"
        server.failing.clear()
        assert len(server.vllm.paths) == asked == 1
        await server.vllm.stop()
        await server.readiness.check()
        answer = await server.http.get("/readyz")
        assert (answer.status_code, answer.text) == (503, "vLLM generates nothing")
        assert (await server.http.get("/metrics")).status_code == 401
        assert (await server.http.get("/metrics", headers={"Authorization": "Bearer one"})).status_code == 200
        assert (await server.http.get("/healthz")).status_code == 200


async def test_a_client_that_makes_names_up_is_held_to_what_its_token_and_its_address_may(
    config, database, tokenizer, registry, monkeypatch
):
    monkeypatch.setenv("KIBITZ_TOKENS", "app:one,other:two")
    access = AccessConfig(messages_per_minute=2, opinions_per_minute=1)
    async with serving(config, database, tokenizer, WebConfig(port=0, tokens_env="KIBITZ_TOKENS"), access) as server:
        asked = [
            await server.http.post(
                "/v1/chat/completions",
                json={"messages": HELLO, "user": f"name{number}"},
                headers={"Authorization": "Bearer one"},
            )
            for number in range(30)
        ]
        assert [answer.status_code for answer in asked] == [200] * 20 + [429] * 10
        same_address = {"Authorization": "Bearer two"}
        answer = await server.http.post("/v1/chat/completions", json={"messages": HELLO}, headers=same_address)
        assert answer.status_code == 429
        judged = [
            await server.http.post(
                "/v1/feedback",
                json={"inference_id": asked[0].json()["id"], "value": True, "user": f"name{number}"},
                headers={"Authorization": "Bearer one"},
            )
            for number in range(15)
        ]
        assert [answer.status_code for answer in judged] == [200] * 10 + [429] * 5


async def test_decisions_and_what_is_taken_back_have_the_limits_of_messages_and_opinions(
    config, database, tokenizer, registry, monkeypatch
):
    monkeypatch.setenv("KIBITZ_TOKENS", "app:one,other:two")
    access = AccessConfig(messages_per_minute=2, opinions_per_minute=2, source_messages_per_minute=5)
    web = WebConfig(port=0, tokens_env="KIBITZ_TOKENS")
    async with serving(config, database, tokenizer, web, access) as server:
        server.http.headers["Authorization"] = "Bearer one"

        async def decide(method: str, user: str) -> int:
            body = {"json": {"consent": True}} if method == "PUT" else {}
            answer = await server.http.request(method, "/v1/privacy", params={"user": user}, **body)
            assert answer.status_code == 200 or answer.headers["Retry-After"] == "60"
            return answer.status_code

        assert [await decide("PUT", "ann") for _ in range(3)] == [200, 200, 429]
        assert await decide("DELETE", "ann") == 429
        assert await decide("GET", "ann") == 200
        names = [f"name{number}" for number in range(10)]
        assert [await decide(method, name) for name in names[:2] for method in ("PUT", "DELETE")] == [200] * 3 + [429]
        assert {await decide(method, name) for name in names for method in ("PUT", "DELETE")} == {429}
        server.http.headers["Authorization"] = "Bearer two"  # at the same address
        assert await decide("PUT", "ann") == 429
        with database.read() as connection:
            decided = connection.execute(sa.select(tables.users.c.user_id)).scalars()
            assert set(decided) == {"app/ann", "app/name0", "app/name1"}


async def test_to_take_an_opinion_back_counts_as_one(config, database, tokenizer, registry):
    access = AccessConfig(messages_per_minute=100, opinions_per_minute=3)
    async with serving(config, database, tokenizer, WebConfig(port=0), access) as server:
        said = await server.chat()
        given = await server.http.post("/v1/feedback", json={"inference_id": said["id"], "value": True})
        path = f"/v1/feedback/{given.json()['feedback_id']}"
        assert [(await server.http.delete(path)).status_code for _ in range(4)] == [200, 200, 429, 429]
        turn = server.turn(said["id"])
        assert len(server.store.read_feedback_on([turn.id])[turn.id]) == 3


async def test_feedback_without_a_name_is_that_of_who_asked_and_dry_runs_are_not_recorded(server):
    said = await server.client.chat.completions.create(model="kibitz", messages=HELLO, user="ann")

    async def feedback(**fields: object) -> httpx.Response:
        return await server.http.post("/v1/feedback", json=fields)

    def opinions() -> list[tuple[str, str]]:
        rows = server.store.read_feedback_on([server.turn(said.id).id])
        return [(row.user_id, row.kind) for one in rows.values() for row in one if not row.retracts]

    assert (await feedback(inference_id=said.id, value=False, dryrun=True)).status_code == 200
    assert opinions() == []
    given = await feedback(inference_id=said.id, value=0)
    assert opinions() == [("local/ann", FeedbackKind.DISAPPROVAL)]
    path = f"/v1/feedback/{given.json()['feedback_id']}"
    assert (await server.http.delete(path, params={"user": "bob"})).status_code == 404
    assert (await server.http.delete(path, params={"user": "x" * 65})).status_code == 400
    assert (await server.http.delete(path)).status_code == 200
    await feedback(inference_id=said.id, value=True, user="bob")
    assert opinions()[-1] == ("local/bob", FeedbackKind.APPROVAL)


async def test_feedback_on_an_episode_is_on_its_last_answer(server):
    chats = [await server.chat(conversation="mine") for _ in range(2)]
    alone = await server.chat()
    assert chats[0]["episode_id"] == chats[1]["episode_id"] != alone["episode_id"]
    for episode, wanted in (("mine", chats[1]), (chats[1]["episode_id"], chats[1]), (alone["episode_id"], alone)):
        answer = await server.http.post("/v1/feedback", json={"episode_id": episode, "value": True})
        given = server.store.find_feedback(answer.json()["feedback_id"])
        assert given.turn_id == server.turn(wanted["id"]).id
    assert (await server.http.post("/v1/feedback", json={"episode_id": "none", "value": True})).status_code == 404


async def test_a_pick_is_two_acts_that_are_taken_back_as_one_and_each_reason_is_its_own(server):
    first = await server.client.chat.completions.create(model="kibitz", messages=HELLO)
    second = await server.chat(*HELLO, regenerates=first.id)

    async def give(metric: str, value: object, on: str = second["id"], status: int = 200) -> dict:
        body = {"inference_id": on, "metric_name": metric, "value": value}
        answer = await server.http.post("/v1/feedback", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def said() -> list[set[str]]:
        rows = [
            server.store.read_feedback_on([turn])[turn] for turn in (server.turn(first.id).id, server.turn(second["id"]).id)
        ]
        return [{row.text or f"{row.kind} ({row.signal})" for row in not_retracted(given)} for given in rows]

    again = "regenerate (regenerate)"
    this = await give("pick", True)
    assert said() == [{again, "disapproval (pick)"}, {"approval (pick)"}]
    assert await give("pick", True) == this, "the same pick again changes nothing"
    earlier = await give("pick", 0)
    assert said() == [{again, "approval (pick)"}, {"disapproval (pick)"}]
    gone = await server.http.delete(f"/v1/feedback/{this['feedback_id']}")
    assert gone.status_code == 404, "it was replaced"
    assert (await server.http.delete(f"/v1/feedback/{earlier['feedback_id']}")).status_code == 200
    assert said() == [{again}, set()]

    given = [await give("reason", reason) for reason in ("too long", "tone")]
    assert said()[1] == {"too long", "tone"}
    await server.http.delete(f"/v1/feedback/{given[0]['feedback_id']}")
    assert said()[1] == {"tone"}

    for refused in (
        {"metric": "pick", "value": 0.5},
        {"metric": "reason", "value": "ugly"},
        {"metric": "reason", "value": True},
    ):
        assert "value" in (await give(**refused, status=400))["error"]["message"]
    told = await give("pick", True, on=first.id, status=400)
    assert "there is nothing to pick" in told["error"]["message"]
    assert said() == [{again}, {"tone"}], "the control: what was refused is not recorded"
