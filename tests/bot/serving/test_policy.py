"""Several answers in one request: each is read as one alone would be."""

import asyncio

import pytest
import pytest_asyncio
from fake_vllm import FakeVllm

from bot.errors import ReplyInterrupted, RequestRefused, ServingError
from bot.models.thoughts import Thoughts
from bot.serving.policy import STOPPED, Policy

TEXTS = ["Hey there!", "Hello.", "Good morning to you all."]


@pytest_asyncio.fixture(loop_scope="session")
async def vllm(tokenizer):
    found = FakeVllm(tokenizer, says=TEXTS)
    await found.start()
    yield found
    await found.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def policy(config, tokenizer, vllm):
    found = Policy(vllm.url, config.policy, end_ids=tokenizer.end_ids)
    yield found
    await found.close()


async def test_several_answers_that_arrive_interleaved_come_back_by_index_with_their_own_tokens(policy, vllm, tokenizer):
    replies = await policy.sample_replies([5, 6], 3, seed=7, max_tokens=40, cache_salt="salt")
    assert [one.text for one in replies] == TEXTS
    for index, (text, reply) in enumerate(zip(TEXTS, replies, strict=True)):
        assert list(reply.completion_ids) == tokenizer.completion_ids(text)
        assert reply.logprobs == (-0.5 - index,) * len(reply.completion_ids)
        assert (reply.finish_reason, reply.prompt_ids, reply.policy_version) == ("stop", (5, 6), "policy-0")
        assert (reply.sampling.seed, reply.sampling.max_tokens) == (7 + index, 40)
    [body] = vllm.asked
    assert (body["n"], body["seed"], body["max_tokens"], body["cache_salt"]) == (3, 7, 40, "salt")
    alone = await policy.reply([5, 6], seed=7)  # the control
    assert (alone.text, alone.sampling.seed, "n" in vllm.asked[-1]) == (TEXTS[0], 7, False)


async def test_stops_and_limits_and_thoughts_hold_for_each_answer(config, tokenizer, policy, vllm):
    cut = await policy.sample_replies([5], 3, stops=["there", "to you"])
    assert [one.text for one in cut] == ["Hey ", "Hello.", "Good morning "]
    assert [one.finish_reason for one in cut] == ["stop"] * 3
    assert list(cut[1].completion_ids) == tokenizer.completion_ids(TEXTS[1]), "it has no stop, and is read to its end"
    assert len(cut[0].completion_ids) < len(tokenizer.completion_ids(TEXTS[0]))
    short = await policy.sample_replies([5], 3, max_tokens=3)
    assert {len(one.completion_ids) for one in short} == {3}
    assert {one.finish_reason for one in short} == {"length"}
    vllm.says = ["<think>hm</think>Yes.", "No <b>.", "<think>never ends"]
    thinking = Policy(vllm.url, config.policy, end_ids=tokenizer.end_ids, thoughts=Thoughts("<think>", "</think>"))
    thought = await thinking.sample_replies([5], 3)
    assert [one.text for one in thought] == ["Yes.", "No <b>.", ""]
    assert list(thought[0].completion_ids) == tokenizer.completion_ids(vllm.says[0])
    await thinking.close()


async def test_answers_that_are_stopped_end_where_they_are(policy, vllm):
    vllm.goes_on.clear()
    stop = asyncio.Event()
    asking = asyncio.create_task(policy.sample_replies([5], 2, stop=stop))
    while not vllm.asked:
        await asyncio.sleep(0.01)
    stop.set()
    vllm.goes_on.set()
    replies = await asking
    assert {one.finish_reason for one in replies} == {STOPPED}
    assert all(TEXTS[index].startswith(one.text) and one.text != TEXTS[index] for index, one in enumerate(replies))
    assert await policy.drain("policy-0", 5), "nothing is in flight any more"


async def test_a_refused_number_of_answers_is_not_asked_for_twice(policy, vllm):
    vllm.most = 2
    with pytest.raises(RequestRefused, match=r"policy-0 did not answer: .*\(400\).*n must be at most 2"):
        await policy.sample_replies([5], 3)
    assert vllm.paths.count("/v1/completions") == 1
    assert len(await policy.sample_replies([5], 2)) == 2, "the control"
    vllm.broken.add("/v1/completions")
    with pytest.raises(ServingError) as failed:
        await policy.sample_replies([5], 2)
    assert not isinstance(failed.value, RequestRefused)
    assert vllm.paths.count("/v1/completions") == 4, "a failure is tried again"


async def test_answers_of_a_stream_that_breaks_off_are_an_interruption_with_the_first_text(config):
    async def cut(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        event = b'data: {"choices":[{"index":1,"text":"Half an","logprobs":null,"finish_reason":null}]}\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + event)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(cut, "127.0.0.1", 0)
    broken = Policy(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", config.policy)
    with pytest.raises(ReplyInterrupted) as error:
        await broken.sample_replies([1], 2)
    assert error.value.text == "Half an"
    await broken.close()
    server.close()


async def test_the_real_vllm_gives_several_answers_by_index_which_differ(live, tokenizer):
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "tell me a joke"}])
    replies = await live.policy.sample_replies(prompt, 4, seed=2**63 - 2)
    assert len({one.text for one in replies}) > 1
    for one in replies:
        assert len(one.logprobs) == len(one.completion_ids) > 0
        assert tokenizer.decode_answer(one.completion_ids).strip() == one.text.strip()
    again = await live.policy.sample_replies(prompt, 2, seed=5)
    alone = await live.policy.reply(prompt, seed=again[1].sampling.seed)
    assert alone.completion_ids == again[1].completion_ids, "the recorded seed is that of the answer"
    assert again[0].completion_ids != again[1].completion_ids, "the control"
