"""Thoughts: recorded as they were sampled, and never shown, remembered or split, however the stream is cut."""

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio
import sqlalchemy as sa
from conftest import answered, react, shared
from fake_vllm import FakeVllm
from families import FAMILIES, Family, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from bot import app as kibitz
from bot.chat.dialogue import NO_ANSWER, DialogueManager, render_answer
from bot.config import PolicyConfig, load
from bot.errors import ConfigError, TemplateError
from bot.models.check import check_tokenizer
from bot.models.shape import read_shape
from bot.models.thoughts import UNMARKED, ThoughtFilter, Thoughts
from bot.models.tokenizer import ChatTokenizer
from bot.serving.policy import Policy
from bot.store.tables import messages, turns
from bot.types import Conversation, Message, new_id
from connectors.answers import SORRY
from connectors.local.platforms import DiscordPlatform, Platform, SlackPlatform, WebPlatform
from learning.data.explanation import explain
from learning.data.replay_buffer import ReplayBuffer
from learning.judging.evaluation import generate_greedily

MARKS = Thoughts("<think>", "</think>")
OPENED = Thoughts("<think>", "</think>", is_opened_by_prompt=True)
NEVER = Thoughts("<|never|>", "<|ever|>", is_opened_by_prompt=True)  # the demo policy does not say that
HELLO = [{"role": "user", "content": "hello"}]
PLAIN_MARKS = ["<think>", "</think>", "<thi", "nk>", "</", "think>"]
PIECES = st.sampled_from([*PLAIN_MARKS, "<", " ", "\n", "a", "é", "word ", "👋", "`", "```"])


def told_apart(text: str, thoughts: Thoughts) -> str:
    """What of a whole answer is no thought, found in another way."""
    is_inside = has_thought = thoughts.is_opened_by_prompt
    said, is_after_a_thought = "", False
    for part in re.split("(<think>|</think>)", text):
        is_quoted = said.strip() and (thoughts.is_only_at_start or said.count("`") % 2 == 1)
        if part in ("<think>", "</think>") and (is_inside or not is_quoted):
            is_inside, has_thought = part == "<think>", True
            said = said if said.strip() else ""
        elif not is_inside:
            is_after_a_thought = is_after_a_thought or (has_thought and not said.strip())
            said += part
    return said.lstrip() if is_after_a_thought else said


@given(
    parts=st.lists(PIECES, max_size=30),
    cuts=st.lists(st.integers(0, 120), max_size=40),
    thoughts=st.sampled_from([OPENED, MARKS, UNMARKED]),
)
def test_however_a_stream_is_cut_the_same_is_shown(parts, cuts, thoughts):
    text = "".join(parts)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    said = ThoughtFilter(thoughts)
    shown = [said.add(text[start:end]) for start, end in itertools.pairwise(places)]
    shown.append(said.flush())
    assert "".join(shown) == thoughts.remove_from(text) == told_apart(text, thoughts)
    forms_another = "<think>" in text.replace("<think>", "").replace("</think>", "")  # text like any other
    if "`" not in text and not thoughts.is_only_at_start and not forms_another:
        assert not any("<think>" in "".join(shown[:count]) for count in range(len(shown) + 1))


def test_the_control_pieces_that_are_looked_at_one_by_one_leak():
    pieces = ["Hm <th", "ink>secret</th", "ink> Hello"]
    assert "secret" in "".join(MARKS.remove_from(piece) for piece in pieces)
    assert MARKS.remove_from("".join(pieces)) == "Hm  Hello"
    said = ThoughtFilter(MARKS)
    assert "secret" not in "".join(said.add(piece) for piece in pieces)


@pytest.mark.parametrize(
    ("thoughts", "text", "shown"),
    [
        (MARKS, " plain ", " plain "),
        (MARKS, "\n<think>\nhm\n</think>\n\nHello <3", "Hello <3"),
        (OPENED, "hm</think>\n\nHello", "Hello"),
        (OPENED, "hm, this takes long", ""),
        (MARKS, "<think>hm", ""),
        (MARKS, "Hello<think>hm", "Hello"),
        (MARKS, "Hello <thin", "Hello <thin"),
        (MARKS, "\n</think>Hello", "Hello"),
        (MARKS, " \n", " \n"),
        (MARKS, "<think>one</think>\n<think>two</think>\nHello", "Hello"),
        (MARKS, "<think>one</think>Hello <think>two</think>there", "Hello there"),
        (MARKS, "It writes `<think>` first.", "It writes `<think>` first."),
        (MARKS, "So:\n```\n<think>hm</think>\n```\nYes.", "So:\n```\n<think>hm</think>\n```\nYes."),
        (MARKS, "<think>`</think>It is `a`<think>hm", "It is `a`"),
        (OPENED, "`<think>` again</think>Hello", "Hello"),
        (UNMARKED, "<think>hm</think>\n\nHello", "Hello"),
        (UNMARKED, "\n<think>hm", ""),
        (UNMARKED, "<think>one</think><think>two</think>Hello", "Hello"),
        (UNMARKED, "The tag <think> opens a thought.", "The tag <think> opens a thought."),
        (UNMARKED, "<think>hm</think>It ends with </think>.", "It ends with </think>."),
    ],
)
def test_what_is_shown_of_an_answer(thoughts, text, shown):
    assert thoughts.remove_from(text) == shown


def test_without_marks_nothing_is_taken_away():
    said = ThoughtFilter(None)
    assert said.add(" <think>hm</think>") + said.flush() == " <think>hm</think>"


@pytest.mark.parametrize("name", ["Qwen 3.5", "a thinker"])
def test_a_turn_with_a_thought_is_learned_from_as_it_was_sampled(name, store, config, demo_model, registry, tmp_path):
    tokenizer = ChatTokenizer(make_tokenizer(demo_model, FAMILIES[name], tmp_path / "tokenizer"), thinking(name))
    ids = [*tokenizer.hf.encode("hm, a greeting\n</think>\n\nHey there!"), *tokenizer.completion_ids("")[-1:]]
    details = {"completion_ids": tuple(ids), "logprobs": (-0.5,) * len(ids)}
    turn = answered(store, tokenizer, "hello", "Hey there!", **details)
    react(store, turn, True)
    leaked = answered(store, tokenizer, "good night", "hm, a greeting Hey there!", **details)
    react(store, leaked, True)
    found = ReplayBuffer(store, tokenizer, config).snapshot()
    assert [one.completion_ids for one in found.rated] == [tuple(ids)]
    assert found.dropped["its token ids are from another tokenizer"] == 1, "the control"


@pytest.mark.parametrize("is_token", [True, False])
@pytest.mark.parametrize(
    ("opening", "closing"),
    [("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("<thought>", "</thought>"), ("[THINK]", "[/THINK]")],
)
@pytest.mark.parametrize("begins_open", [True, False])
def test_marks_are_known_by_the_vocabulary_or_by_the_template(demo_model, tmp_path, opening, closing, is_token, begins_open):
    thinker = FAMILIES["a thinker"]
    source = thinker.template.replace("<think>", opening if begins_open else f"{opening}{closing}")
    tokens = ["<|bot|>", "<|person|>", *((opening, closing) if is_token else ())]
    family = replace(thinker, template=source, special=tokens)
    tokenizer = ChatTokenizer(make_tokenizer(demo_model, family, tmp_path / "tokenizer"))
    assert tokenizer.thoughts == Thoughts(opening, closing, begins_open, is_special=is_token)
    said = f"hm, a greeting{closing}\n\nHello" if begins_open else f"{opening}hm, a greeting{closing}\n\nHello"
    assert tokenizer.decode_answer([*tokenizer.hf.encode(said), tokenizer.hf.eos_token_id]) == "Hello"


def test_the_mark_that_the_prompt_opens_is_the_one_that_counts(demo_model, tmp_path):
    thinker = FAMILIES["a thinker"]
    family = replace(thinker, template=thinker.template.replace("<think>", "<reasoning>"))
    tokenizer = ChatTokenizer(make_tokenizer(demo_model, family, tmp_path / "tokenizer"))
    assert {"<think>", "</think>"} <= set(map(str, tokenizer.hf.added_tokens_decoder.values())), "its vocabulary has others"
    assert (tokenizer.thoughts.opening, tokenizer.thoughts.is_opened_by_prompt) == ("<reasoning>", True)


def test_a_mark_that_a_person_writes_opens_no_thought(tokenizer):
    """Of the demo policy, whose vocabulary and template have none."""
    shown = tokenizer.neutralise("what does ```<think>``` do, and </think>?")
    assert "<think>" not in shown
    assert "</think>" not in shown
    assert shown.replace("\u200b", "") == "what does ```<think>``` do, and </think>?"


def test_a_model_that_answers_in_channels_is_refused(demo_model, tmp_path):
    template = (
        "{% for said in messages %}<|start|>{{ said.role }}{% if said.role == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>{{ said.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    family = Family(template, "<|end|>", "<|return|>", None, ["<|start|>", "<|channel|>", "<|message|>"])
    model = make_tokenizer(demo_model, family, tmp_path / "tokenizer")
    shape = replace(read_shape(demo_model), vocabulary=10**6)
    with pytest.raises(ConfigError, match=r"answers in channels \(<\|channel\|>\), .*; name a model"):
        check_tokenizer(PolicyConfig(model=model), model, shape)
    plain = replace(family, template=template.replace("<|channel|>final", ""))
    model = make_tokenizer(demo_model, plain, tmp_path / "tokenizer")
    assert check_tokenizer(PolicyConfig(model=model), model, shape).thoughts == UNMARKED, "the control"


def thinking(name: str) -> dict[str, bool]:
    return {"enable_thinking": True} if name.startswith("Qwen") else {}


async def test_thoughts_are_recorded_and_neither_handed_over_nor_in_the_text(live, tokenizer):
    prompt = tokenizer.prompt_ids(HELLO)
    plain = await live.policy.reply(prompt, temperature=0.0)
    first, *_, last = re.findall(r"\w+", plain.text)
    marks = Thoughts(first[-2:], last[:2], is_special=True)
    assert marks.remove_from(plain.text) != plain.text, plain.text
    thinker = Policy(live.policy.admin.url, live.config.policy, thoughts=marks)
    pieces: list[str] = []
    reply = await thinker.reply(prompt, temperature=0.0, on_text=pieces.append)
    await thinker.close()
    assert reply.text == "".join(pieces) == marks.remove_from(plain.text)
    assert reply.completion_ids == plain.completion_ids
    assert len(reply.logprobs) == len(reply.completion_ids)


async def test_the_server_stops_where_the_template_ends_an_answer(live, tokenizer):
    prompt = tokenizer.prompt_ids(HELLO)
    plain = await live.policy.reply(prompt, temperature=0.0)
    assert (plain.finish_reason, plain.completion_ids[-1]) == ("stop", tokenizer.hf.eos_token_id)
    end = plain.completion_ids[len(plain.completion_ids) // 2]
    sooner = Policy(live.policy.admin.url, live.config.policy, end_ids=[end])
    reply = await sooner.reply(prompt, temperature=0.0)
    await sooner.close()
    cut = plain.completion_ids.index(end)
    assert reply.completion_ids == plain.completion_ids[: cut + 1]
    assert reply.finish_reason == "stop"
    assert reply.text == tokenizer.hf.decode(plain.completion_ids[:cut])


def test_sampling_for_the_gate_stops_there_too(demo_model, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model)
    prompts = [tokenizer.prompt_ids(HELLO)]
    (plain,) = generate_greedily(model, tokenizer, prompts, 32)
    end = next(one for one in map(tokenizer.hf.decode, plain.completion_ids) if one in "!?.,")
    template = "{% for said in messages %}<|im_start|>{{ said.role }}\n{{ said.content }}" + end + "\n{% endfor %}"
    family = Family(template, end, "<|im_end|>")
    other = ChatTokenizer(make_tokenizer(demo_model, family, tmp_path / "tokenizer"))
    assert len(other.end_ids) == 2
    (sooner,) = generate_greedily(model, other, prompts, 32)
    assert sooner.is_finished
    assert sooner.completion_ids == plain.completion_ids[: len(sooner.completion_ids)] != plain.completion_ids
    assert sooner.text == plain.text.partition(end)[0]


async def test_a_thought_that_does_not_end_is_an_answer_of_nothing_and_is_not_remembered(live, tokenizer):
    lost = Policy(live.policy.admin.url, PolicyConfig(max_tokens=3), thoughts=NEVER)
    dialogue = DialogueManager(live.store, live.dialogue.tracker, lost)
    place = await dialogue.open(Conversation("test", new_id()))
    turn = await dialogue.respond(Message(place.id, "ann", "hello"))
    assert (turn.text, turn.finish_reason, len(turn.completion_ids)) == ("", "length", 3)
    assert render_answer(turn) == NO_ANSWER
    thought = tokenizer.hf.decode(turn.completion_ids)
    await lost.close()
    after = await live.dialogue.respond(Message(place.id, "ann", "and now?"))
    shown = tokenizer.hf.decode(after.prompt_ids)
    assert "hello" in shown
    assert thought not in shown
    assert NO_ANSWER not in shown


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def scripted(demo_model, tokenizer, tmp_path_factory) -> AsyncIterator[tuple[kibitz.Kibitz, FakeVllm]]:
    """A kibitz whose model thinks without a mark of it in vocabulary and template, on a vLLM that says what it is told."""
    vllm = FakeVllm(tokenizer)
    await vllm.start()
    data, dialogue = str(tmp_path_factory.mktemp("thinks")), {"embedder": "none"}
    config = load(data_dir=data, policy={"model": demo_model}, serving={"url": vllm.url}, dialogue=dialogue)
    async with kibitz.running(config, demo_model, lambda text: None) as running:
        yield running, vllm
    await vllm.stop()


@pytest.mark.parametrize("make", [DiscordPlatform, SlackPlatform, WebPlatform])
@pytest.mark.parametrize("size", [1, 5, 1000])
async def test_thoughts_are_neither_shown_nor_remembered_nor_explained_on_any_platform(scripted, make, size):
    running, vllm = scripted
    said = "<think>secret one</think>\n<think>secret two</think>\n\nHello, `<think>` is a mark."
    vllm.says, vllm.cut = said, lambda text: [text[at : at + size] for at in range(0, len(text), size)]
    platform = make(shared(running))
    await platform.start()
    await is_answered(platform, "hello", "Hello, `<think>` is a mark.")
    vllm.says, vllm.cut = "<think>secret three, which takes too long" + " and longer" * 500, None
    await is_answered(platform, "hello", NO_ANSWER)
    await platform.stop()
    with running.database.read() as connection:
        stored = str(connection.execute(sa.select(turns)).all() + connection.execute(sa.select(messages)).all())
    assert "is a mark." in stored
    assert "secret" not in stored
    buffer = ReplayBuffer(running.store, running.dialogue.tracker.tokenizer, running.config)
    with running.database.read() as connection:
        newest = connection.scalars(sa.select(turns.c.id).order_by(turns.c.id.desc()).limit(2)).all()
    for turn_id in newest:
        assert "secret" not in "\n".join(explain(turn_id, buffer, running.registry).lines())


async def is_answered(platform: Platform, text: str, wanted: str) -> None:
    """Say something, and wait until what a person is shown is what is wanted; fail where it never is."""
    place = platform.place(direct=True)
    await platform.say(place, "ann", text)
    shown = ""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(60):
            while shown != wanted:
                await asyncio.sleep(0.05)
                shown = answers[-1].text if (answers := platform.answers(place)) else ""
    assert shown == wanted


@pytest.mark.parametrize("make", [DiscordPlatform, SlackPlatform, WebPlatform])
async def test_who_asked_gets_a_line_where_nothing_but_a_thought_was_said(live, make, monkeypatch):
    monkeypatch.setattr(live.policy, "thoughts", NEVER)
    platform = make(shared(live))
    await platform.start()
    await is_answered(platform, "hello", NO_ANSWER)
    await platform.stop()


async def test_who_asked_gets_an_apology_where_the_template_fails(live, monkeypatch):
    def fail(messages, **arguments):
        raise ValueError("no such chat")

    monkeypatch.setattr(live.dialogue.tracker.tokenizer.template, "_apply", fail)
    place = await live.dialogue.open(Conversation("test", new_id()))
    with pytest.raises(TemplateError):
        await live.dialogue.respond(Message(place.id, "ann", "hello"))
    platform = DiscordPlatform(shared(live))
    await platform.start()
    await is_answered(platform, "hello", SORRY)
    await platform.stop()
