"""The web connector: the unmodified OpenAI client, feedback, and a real browser, over a real server on loopback."""

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
import pytest_asyncio
from conftest import PATIENT, ROOT, shared, until

from bot.config import AccessConfig, WebConfig
from bot.errors import ConfigError
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.types import Feedback, FeedbackKind
from connectors.web.server import Endpoint, Web
from learning.data.replay_buffer import ReplayBuffer
from learning.data.rewards import compute_reward

HELLO = [{"role": "user", "content": "hello"}]


async def served(live, config: WebConfig, access: AccessConfig = PATIENT) -> AsyncIterator[tuple[str, Web]]:
    door = Endpoint.open(config)
    web = Web(shared(live, access), door)
    running = asyncio.create_task(web.run())
    yield door.url, web
    await web.stop()
    await running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def url(live) -> AsyncIterator[str]:
    async for found, _ in served(live, WebConfig(port=0)):
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(url) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def http(url) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=300) as found:
        yield found


async def standing(live, completion_id: str):
    told = await live.dialogue.explain(completion_id.removeprefix("chatcmpl-"))
    return compute_reward(told.feedback, told.turn.asker_id, live.config.rewards)


async def test_an_openai_client_is_answered_and_the_completion_is_the_turn(live, client, tokenizer):
    assert [model.id async for model in await client.models.list()] == ["kibitz"]
    chat = [{"role": "system", "content": "Be kind."}, *HELLO, {"role": "assistant", "content": "Hey!"}, *HELLO]
    said = await client.chat.completions.create(model="kibitz", messages=chat, seed=1)
    turn = (await live.dialogue.explain(said.id.removeprefix("chatcmpl-"))).turn
    assert said.choices[0].message.content == turn.text
    assert said.system_fingerprint == turn.policy_version
    assert list(turn.prompt_ids) == tokenizer.prompt_ids(chat)  # the client's messages are what the policy saw
    assert said.usage.completion_tokens == len(turn.completion_ids)


async def test_small_pieces_of_a_stream_are_sent_at_once(url):
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as plain:
        assert not plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)  # the control: it is nobody's default
    door = Endpoint.open(WebConfig(port=0))
    with socket.create_connection(door.socket.getsockname()[:2]):
        accepted, _ = door.socket.accept()
        with accepted, door.socket:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_stream_gives_the_text_that_is_stored_and_its_usage(live, client):
    stream = await client.chat.completions.create(
        model="kibitz", messages=HELLO, stream=True, stream_options={"include_usage": True}, seed=2
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    turn = (await live.dialogue.explain(chunks[0].id.removeprefix("chatcmpl-"))).turn
    assert text == turn.text
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage.completion_tokens == len(turn.completion_ids)
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_says_how_long_an_answer_may_be_and_what_ends_it(live, client, stream):
    async def ask(**options):
        said = await client.chat.completions.create(model="kibitz", messages=HELLO, seed=3, stream=stream, **options)
        if not stream:
            return said.id, said.choices[0].message.content, said.choices[0].finish_reason
        chunks = [chunk async for chunk in said]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return chunks[0].id, text, chunks[-1].choices[0].finish_reason

    _, whole, reason = await ask()
    assert (len(whole) > 4, reason) == (True, "stop")  # the control
    one, text, reason = await ask(max_tokens=1)
    turn = (await live.dialogue.explain(one.removeprefix("chatcmpl-"))).turn
    assert (len(turn.completion_ids), turn.sampling.max_tokens, reason) == (1, 1, "length")
    assert whole.startswith(text)
    stop = whole[2:4]
    one, text, reason = await ask(stop=[stop, "never said"])
    turn = (await live.dialogue.explain(one.removeprefix("chatcmpl-"))).turn
    assert (text, turn.text, reason) == (whole[: whole.index(stop)],) * 2 + ("stop",)
    assert turn.sampling.stop == [stop, "never said"]
    assert len(turn.logprobs) == len(turn.completion_ids)
    await live.dialogue.record_feedback(Feedback(turn.id, "local", FeedbackKind.APPROVAL))
    learned = ReplayBuffer(live.store, live.dialogue.tracker.tokenizer, live.config).snapshot()
    assert (turn.id in {row.turn_id for row in learned.rated}) == bool(text.strip())


async def test_a_named_conversation_is_remembered_by_kibitz_and_an_unnamed_one_is_not(live, client, tokenizer):
    first = await client.chat.completions.create(model="kibitz", messages=HELLO, extra_body={"conversation": "mine"})
    second = await client.chat.completions.create(model="kibitz", messages=HELLO, extra_body={"conversation": "mine"})
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    turn = (await live.dialogue.explain(second.id.removeprefix("chatcmpl-"))).turn
    assert list(turn.prompt_ids) == tokenizer.prompt_ids([*HELLO, answer, *HELLO])
    alone = await client.chat.completions.create(model="kibitz", messages=HELLO)
    turn = (await live.dialogue.explain(alone.id.removeprefix("chatcmpl-"))).turn
    assert list(turn.prompt_ids) == tokenizer.prompt_ids(HELLO)


async def test_who_goes_away_has_stopped_the_answer_and_the_half_of_it_is_not_trained_on(
    live, client, tokenizer, monkeypatch
):
    stopped, reply, goes_away = [], live.policy.reply, True

    async def slowly(*prompt, on_text, stop, **options):
        async def shown(text: str) -> None:
            on_text(text)
            if goes_away:
                await stop.wait()  # no answer is over before its client is gone

        return await reply(*prompt, on_text=shown, stop=stop, **options)

    monkeypatch.setattr(live.policy, "reply", slowly)
    for seed in range(40):
        goes_away = len(stopped) % 2 == 0
        stream = await client.chat.completions.create(model="kibitz", messages=HELLO, stream=True, seed=seed)
        chunks = aiter(stream)
        turn_id = (await anext(chunks)).id.removeprefix("chatcmpl-")
        if goes_away:
            await stream.close()
        else:
            assert [chunk async for chunk in chunks]
        await until(lambda turn_id=turn_id: live.store.find_turn(turn_id) is not None)
        turn = live.store.find_turn(turn_id)
        if goes_away and turn.finish_reason == "stop":
            continue  # a short answer may be over with its first event
        stopped.append(turn)
        if len(stopped) == 6:
            break
    assert len(stopped) == 6
    halves = [turn for turn in stopped if turn.finish_reason == "stopped"]
    assert halves == stopped[::2]
    assert all(turn.completion_ids[-1:] != (tokenizer.hf.eos_token_id,) for turn in halves)
    for turn in stopped:
        await live.dialogue.record_feedback(Feedback(turn.id, "local", FeedbackKind.APPROVAL))
    learned = ReplayBuffer(live.store, tokenizer, live.config).snapshot()
    used = {row.turn_id for row in [*learned.training, *learned.held_out]}
    assert used.isdisjoint(turn.id for turn in halves)
    assert {turn.id for turn in stopped} - used == {turn.id for turn in halves}  # the whole ones are learned from


@pytest.mark.parametrize(
    ("given", "worth"),
    [
        ({"value": True}, 1.0),
        ({"value": False, "metric_name": "thumb"}, -1.0),
        ({"value": 0.25}, 0.25),
        ({"value": -1}, -1.0),
        ({"value": "It was rude.", "metric_name": "comment"}, None),
        ({"value": "Hey there!", "metric_name": "demonstration"}, -0.5),
    ],
)
async def test_feedback_in_every_shape_reaches_its_turn_and_can_be_taken_back(live, client, http, given, worth):
    said = await client.chat.completions.create(model="kibitz", messages=HELLO)
    answer = await http.post("/v1/feedback", json={"inference_id": said.id, **given})
    assert answer.status_code == 200, answer.text
    earned = await standing(live, said.id)
    assert (earned and earned.value) == worth
    path = f"/v1/feedback/{answer.json()['feedback_id']}"
    assert (await http.delete(path)).status_code == 200
    assert await standing(live, said.id) is None
    assert len((await live.dialogue.explain(said.id.removeprefix("chatcmpl-"))).feedback) == 2  # kept, and taken back


async def test_the_last_opinion_of_a_user_counts(live, client, http):
    said = await client.chat.completions.create(model="kibitz", messages=HELLO)
    for value in (True, 0.5, False, -0.25):
        await http.post("/v1/feedback", json={"inference_id": said.id, "value": value})
    assert (await standing(live, said.id)).value == -0.25


async def test_an_answer_is_regenerated_and_the_first_one_was_not_wanted(live, client, http):
    body = {"conversation": "again", "user": "ann"}
    first = await client.chat.completions.create(model="kibitz", messages=HELLO, extra_body=body, seed=1)
    second = await client.chat.completions.create(model="kibitz", messages=[], extra_body={**body, "regenerates": first.id})
    told = await live.dialogue.explain(first.id.removeprefix("chatcmpl-"))
    assert [row.kind for row in told.feedback] == [FeedbackKind.REGENERATE]
    assert (await live.dialogue.explain(second.id.removeprefix("chatcmpl-"))).turn.replaces == told.turn.id


async def test_bad_requests_are_told_in_one_line_and_nothing_is_stored(live, client, http):
    said = await client.chat.completions.create(model="kibitz", messages=HELLO)
    before = live.store.count_rows()
    bad = [
        ("/v1/chat/completions", {}, 400, "messages is empty; send at least one"),
        ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
        ("/v1/feedback", {"inference_id": "chatcmpl-none", "value": True}, 404, "no completion with the id"),
        ("/v1/feedback", {"inference_id": said.id, "value": 3}, 400, "[-1, 1]"),
        ("/v1/feedback", {"inference_id": said.id, "value": "good"}, 400, "value must be text for comment"),
        ("/v1/feedback", {"inference_id": said.id}, 400, "value"),
    ]
    for path, body, status, line in bad:
        answer = await http.post(path, json=body)
        message = answer.json()["error"]["message"]
        assert (answer.status_code, line in message, "\n" in message) == (status, True, False), answer.text
    assert (await http.post("/v1/feedback", content=b"{}", headers={"Content-Type": "text/plain"})).status_code == 415
    large = b'{"messages": "' + b"x" * 3_000_000
    assert (await http.post("/v1/feedback", content=large, headers={"Content-Type": "application/json"})).status_code == 413
    assert (await http.delete("/v1/feedback/none")).status_code == 404
    assert live.store.count_rows() == before


@pytest.mark.parametrize(
    "text",
    ["\ud800 lone", "nul \0 byte", "\u202eright to left", "z" + "\u0301" * 5000, "👍" * 300, "x" * 1_000_000, "[" * 20_000],
)
async def test_texts_of_every_kind_are_answered_at_bounded_cost(live, http, text):
    body = json.dumps({"messages": [{"role": "user", "content": text}]})
    answer = await http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), answer.text  # 400: JSON that is not UTF-8 text
    if answer.status_code == 200:
        turn = (await live.dialogue.explain(answer.json()["id"].removeprefix("chatcmpl-"))).turn
        assert len(turn.prompt_ids) <= live.config.policy.context_tokens


async def test_a_page_of_another_site_cannot_talk_through_a_browser(url, http):
    assert (await http.get("/", headers={"Host": "evil.example"})).status_code == 400
    assert (await http.get("/")).headers["content-security-policy"].startswith("default-src 'none'")


async def test_tokens_name_their_users_who_see_only_what_is_theirs(live, monkeypatch):
    monkeypatch.setenv("KIBITZ_TOKENS", "ann:one, bob:two")
    async for url, _ in served(live, WebConfig(port=0, tokens_env="KIBITZ_TOKENS")):
        ann, bob, nobody = (
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in ("one", "two", "x")
        )
        with pytest.raises(openai.AuthenticationError):
            await nobody.chat.completions.create(model="kibitz", messages=HELLO)
        said = await ann.chat.completions.create(model="kibitz", messages=HELLO, extra_body={"conversation": "shared"})
        assert (await live.dialogue.explain(said.id.removeprefix("chatcmpl-"))).turn.asker_id == "ann"
        again = await bob.chat.completions.create(model="kibitz", messages=HELLO, extra_body={"conversation": "shared"})
        turn = (await live.dialogue.explain(again.id.removeprefix("chatcmpl-"))).turn
        assert turn.conversation_id != (await live.dialogue.explain(said.id.removeprefix("chatcmpl-"))).turn.conversation_id
        async with httpx.AsyncClient(base_url=url) as http:
            for token, status in (("two", 404), ("one", 200)):
                body = {"inference_id": said.id, "value": True}
                answer = await http.post("/v1/feedback", json=body, headers={"Authorization": f"Bearer {token}"})
                assert answer.status_code == status
            stolen = f"/v1/feedback/{answer.json()['feedback_id']}"
            assert (await http.delete(stolen, headers={"Authorization": "Bearer two"})).status_code == 404
        for one in (ann, bob, nobody):
            await one.close()


async def test_who_is_denied_or_too_fast_is_told_so(live, monkeypatch):
    monkeypatch.setenv("KIBITZ_TOKENS", "ann:one, bob:two")
    access = AccessConfig(deny_users=["bob"], messages_per_minute=2)
    async for url, _ in served(live, WebConfig(port=0, tokens_env="KIBITZ_TOKENS"), access):
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            statuses = []
            for token in ("two", "one", "one", "one"):
                headers = {"Authorization": f"Bearer {token}"}
                answer = await http.post("/v1/chat/completions", json={"messages": HELLO}, headers=headers)
                statuses.append(answer.status_code)
            assert statuses == [403, 200, 200, 429]


async def test_people_decide_whether_they_teach_and_can_be_forgotten(live, client, http):
    me = {"user": "privacy-test"}
    assert (await http.get("/v1/privacy", params=me)).json() == {"consent": True}
    assert (await http.put("/v1/privacy", params=me, json={"consent": False})).json() == {"consent": False}
    assert (await http.get("/v1/privacy", params=me)).json() == {"consent": False}
    assert (await http.get("/v1/privacy", params={"user": "somebody else"})).json() == {"consent": True}
    assert (await http.put("/v1/privacy", params=me, json={"consent": "perhaps"})).status_code == 400
    said = [await client.chat.completions.create(model="kibitz", messages=HELLO, user="privacy-test") for _ in range(2)]
    turns = [one.id.removeprefix("chatcmpl-") for one in said]
    deleted = (await http.delete(f"/v1/chat/completions/{said[0].id}")).json()
    assert deleted == {"id": said[0].id, "object": "chat.completion.deleted", "deleted": True}
    assert [live.store.find_turn(one) is None for one in turns] == [True, False]
    assert (await http.delete(f"/v1/chat/completions/{said[0].id}")).status_code == 404
    assert (await http.delete("/v1/privacy", params=me)).json()["consent"] is False
    assert [live.store.find_turn(one) is None for one in turns] == [True, True]


async def test_sigterm_ends_answers_whole_and_then_the_process(live, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path / "config.toml"
    config.write_text(
        f'data_dir = "{tmp_path / "data"}"\n[policy]\nmodel = "{live.config.policy.model}"\n'
        f'[serving]\nurl = "{live.policy.admin.url}"\n[web]\nport = {port}\n[learning]\nenabled = false\n'
    )
    command = [sys.executable, "-m", "bot", "serve", "--config", str(config)]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.DEVNULL)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300) as http:
        for _ in range(3000):
            with contextlib.suppress(httpx.HTTPError):
                if (await http.get("/readyz")).is_success:
                    break
            await asyncio.sleep(0.1)
        begun: list[int] = []

        async def ask(number: int) -> str:
            asked = {"messages": [{"role": "user", "content": "tell me a joke"}], "stream": True, "user": f"user{number}"}
            async with http.stream("POST", "/v1/chat/completions", json=asked) as response:
                begun.append(number)
                return [line async for line in response.aiter_lines() if line][-1]

        asking = [asyncio.create_task(ask(number)) for number in range(8)]
        await until(lambda: len(begun) == 8)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.gather(*asking) == ["data: [DONE]"] * 8
    assert await asyncio.wait_for(process.wait(), 300) == 0, "systemd takes anything else for a failure"
    database = Database(f"sqlite:///{tmp_path / 'data' / 'kibitz.db'}")
    assert ConversationStore(database).count_rows()["turns"] == 8
    database.close()


async def test_what_operators_scrape(live, http):
    assert (await http.get("/healthz")).text == "ok"
    async with asyncio.timeout(300):  # where the machine is slow a look may fail
        while (await http.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.1)
    metrics = (await http.get("/metrics")).text
    assert f'kibitz_live{{version="{live.policy.version}"}} 1.0' in metrics
    assert f"kibitz_turns {live.store.count_rows()['turns']}.0" in metrics


def test_a_door_that_would_let_anybody_in_or_cannot_be_had_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"web\.host has value '0\.0\.0\.0'"):
        Endpoint.open(WebConfig(host="0.0.0.0"))
    with pytest.raises(ConfigError, match="a variable that is not set"):
        Endpoint.open(WebConfig(tokens_env="KIBITZ_NO_SUCH"))
    monkeypatch.setenv("KIBITZ_TOKENS", "justatoken")
    with pytest.raises(ConfigError, match="NAME:TOKEN"):
        Endpoint.open(WebConfig(tokens_env="KIBITZ_TOKENS"))
    door = Endpoint.open(WebConfig(port=0))
    with pytest.raises(ConfigError, match=r"web\.port"):
        Endpoint.open(WebConfig(port=door.socket.getsockname()[1]))
    door.socket.close()


@pytest.mark.skipif(not shutil.which("chromedriver") or not shutil.which("chromium"), reason="Debian's chromium is not here")
async def test_a_person_chats_on_the_page(live, url, tmp_path, request):
    before = live.store.count_rows()
    pictures = ROOT / "docs" if request.config.getoption("--picture") else tmp_path
    said = await asyncio.to_thread(a_visit, url, tmp_path, pictures)
    after = live.store.count_rows()
    assert after["turns"] - before["turns"] == 3
    last = said["ids"][-1]
    kinds = [row.kind for row in (await live.dialogue.explain(last)).feedback]
    thumbs = [FeedbackKind.APPROVAL, FeedbackKind.APPROVAL, FeedbackKind.DISAPPROVAL]
    assert kinds == [FeedbackKind.APPROVAL, *thumbs, FeedbackKind.COMMENT, FeedbackKind.CORRECTION]
    told = await live.dialogue.explain(last)
    assert compute_reward(told.feedback, told.turn.asker_id, live.config.rewards).value == -1.0
    assert [row.text for row in told.feedback][-2:] == ["too long", "Sleep well!"]
    assert told.feedback[0].signal == "pick"
    assert said["shown"] == "Sleep well!"


def a_visit(url: str, tmp_path: Path, pictures: Path) -> dict:
    """Two questions, one regenerated answer, a pick, 👍, its removal, 👎 with a reason, a correction, in Chromium."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=900,760"]
    quiet = [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path}",
    ]
    for flag in [*flags, *quiet]:
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    wait = WebDriverWait(browser, 300)
    try:
        browser.get(url)

        def answered(count: int) -> list:
            wait.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, ".assistant .opinions")) == count)
            return browser.find_elements(By.CSS_SELECTOR, ".assistant")

        def press(box, title: str) -> None:
            box.find_element(By.CSS_SELECTOR, f"[aria-label='{title}']").click()

        def pressed(box, title: str, state: str) -> None:
            one = box.find_element(By.CSS_SELECTOR, f"[aria-label='{title}']")
            wait.until(lambda _: one.get_attribute("aria-pressed") == state)

        for count, text in enumerate(["hello", "i can't sleep"], start=1):
            browser.find_element(By.ID, "text").send_keys(text)
            browser.find_element(By.ID, "send").click()
            answered(count)
        press(answered(2)[1], "answer again")
        last = answered(3)[2]
        press(last, "this answer is better")
        pressed(last, "this answer is better", "true")
        press(last, "good answer")
        pressed(last, "good answer", "true")
        assert browser.save_screenshot(str(pictures / "chat-page.png"))
        press(last, "good answer")
        pressed(last, "good answer", "false")
        press(last, "bad answer")
        pressed(last, "bad answer", "true")
        box = last.find_element(By.CSS_SELECTOR, ".why input[type=checkbox]")
        box.click()
        wait.until(lambda _: box.is_enabled())
        press(last, "say what it should have been")
        box = last.find_element(By.TAG_NAME, "textarea")
        box.clear()
        box.send_keys("Sleep well!")
        press(last, "send the correction")
        wait.until(lambda _: last.find_element(By.CLASS_NAME, "words").text == "Sleep well!")
        assert browser.find_element(By.ID, "alert").text == ""
        return {
            "ids": [box.get_attribute("data-turn") for box in browser.find_elements(By.CSS_SELECTOR, ".assistant")],
            "shown": last.find_element(By.CLASS_NAME, "words").text,
        }
    finally:
        browser.quit()
