"""An answer is chosen from several, and whatever fails in choosing costs the choice, never the answer."""

import asyncio
import logging
from dataclasses import dataclass

import pytest
import pytest_asyncio
from fake_vllm import FakeVllm
from longest_answer import LongestAnswer

from bot.chat.dialogue import DialogueManager, ReplyOptions
from bot.chat.selecting import IS_REFUSED, IS_STOPPED
from bot.chat.tracker import StateTracker
from bot.errors import ServingError
from bot.memory.recall import Recall, load_retrieval_weights
from bot.memory.scope import Memory
from bot.serving.policy import STOPPED, Policy
from bot.serving.selection import SamplingPlan
from bot.types import Conversation, Feedback, FeedbackKind, Message, Pick, Selection, Turn, new_id

HERE = Conversation("test", "lobby")
TEXTS = ["Hey there!", "Good morning to you all.", "Hello."]
LONGEST = TEXTS[1]


@dataclass
class Talk:
    """One kibitz with a selector, and the pieces of text that it showed while it answered."""

    dialogue: DialogueManager
    vllm: FakeVllm
    selector: LongestAnswer
    shown: list[str]

    async def ask(self, text: str = "hello", **options) -> Turn:
        self.shown.clear()
        return await self.dialogue.respond(Message("", "ann", text), ReplyOptions(self.shown.append, **options), HERE)

    @property
    def counts(self) -> list[int]:
        """How many answers each request was for."""
        return [body.get("n", 1) for body in self.vllm.asked]


@pytest_asyncio.fixture(loop_scope="session")
async def talk(config, database, store, tokenizer, registry):
    vllm, selector = FakeVllm(tokenizer, says=TEXTS), LongestAnswer()
    policy = Policy(await vllm.start(), config.policy, end_ids=tokenizer.end_ids)
    recall = Recall(Memory(database), None, load_retrieval_weights())
    tracker = StateTracker(store, tokenizer, recall, config.dialogue, config.policy.context_tokens)
    yield Talk(DialogueManager(store, tracker, policy, selector, candidates=3), vllm, selector, [])
    await policy.close()
    await vllm.stop()
    recall.close()


def warnings(caplog) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


async def test_the_chosen_answer_is_shown_once_and_stored_with_all_that_it_was_chosen_from(talk, store, tokenizer):
    turn = await talk.ask("good morning", seed=3)
    assert talk.shown == [turn.text] == [LONGEST]
    assert (talk.selector.plans, talk.selector.choices) == ([("ann", 3)], [(None, TEXTS)])
    stored = store.find_turn(turn.id)
    assert stored == turn
    assert stored.is_selected
    assert (stored.selection.head, stored.selection.chosen) == ("head-1", 1)
    assert [one.text for one in stored.selection.candidates] == TEXTS
    assert list(stored.completion_ids) == tokenizer.completion_ids(LONGEST)
    assert stored.sampling.seed == 4
    plain = DialogueManager(store, talk.dialogue.tracker, talk.dialogue.policy)  # the control
    turn = await plain.respond(Message("", "ann", "hello"), ReplyOptions(talk.shown.append), HERE)
    assert (turn.selection, turn.is_selected, talk.counts) == (None, False, [3, 1])
    assert len(talk.shown) > 2, "it grows"


async def test_fewer_candidates_may_be_asked_for_and_with_one_nothing_is_selected(talk):
    assert (await talk.ask(candidates=2)).text == LONGEST
    assert (await talk.ask(candidates=64)).text == LONGEST
    turn = await talk.ask(candidates=1)
    assert (turn.text, turn.selection) == (TEXTS[0], None)
    assert talk.selector.plans == [("ann", 2), ("ann", 3)], "for one there is nothing to plan"
    talk.selector.planned = SamplingPlan(99)
    await talk.ask()
    assert talk.counts == [2, 3, 1, 3]


@pytest.mark.parametrize("plan", [SamplingPlan(is_plain=True), SamplingPlan(why="the head is too young"), SamplingPlan()])
async def test_a_single_answer_grows_and_says_why_it_is_single(talk, store, plan):
    talk.selector.planned = plan
    turn = await talk.ask()
    assert "".join(talk.shown) == turn.text == TEXTS[0]
    assert len(talk.shown) > 1
    assert (talk.counts, talk.selector.choices) == ([1], [])
    noted = Selection(is_plain=plan.is_plain, why=plan.why) if plan != SamplingPlan() else None
    assert store.find_turn(turn.id).selection == noted
    assert not turn.is_selected


@pytest.mark.parametrize(
    ("says", "text", "why"),
    [
        (["", "Hey!", " \n"], "Hey!", "of 3 answers 1 had text"),
        (["", "", ""], "", "of 3 answers none had text"),
        (["", "Hey!", "Hello there!"], "Hello there!", ""),
    ],
)
async def test_blank_answers_are_not_chosen_from(talk, says, text, why):
    talk.vllm.says = says
    turn = await talk.ask()
    assert (turn.text, turn.selection.why, turn.is_selected) == (text, why, not why)
    assert talk.shown == [text] * bool(text)
    assert talk.selector.choices == ([] if why else [(None, says[1:])])


@pytest.mark.parametrize("fault", ["raises", "hangs", "has too few candidates"])
async def test_a_choice_that_fails_gives_the_first_answer_and_one_line_in_the_log(talk, caplog, monkeypatch, fault):
    async def hang(*_) -> Selection:
        await asyncio.Event().wait()

    async def say_little(*_) -> Selection:
        return Selection()

    if fault == "raises":
        talk.selector.error = ZeroDivisionError("a bug")
    else:
        monkeypatch.setattr("bot.chat.selecting.CHOICE_SECONDS", 0.01)
        monkeypatch.setattr(talk.selector, "choose", hang if fault == "hangs" else say_little)
    turn = await talk.ask()
    assert (talk.shown, turn.text, turn.is_selected) == ([TEXTS[0]], TEXTS[0], False)
    name = {"raises": "ZeroDivisionError", "hangs": "TimeoutError"}.get(fault, "ValueError")
    assert turn.selection.why == f"the choice failed ({name})"
    [line] = warnings(caplog)
    assert line.startswith("the choice failed, so the first answer is given: ")
    assert len(line.splitlines()) == 1


async def test_a_selector_that_cannot_plan_costs_no_answer(talk, caplog, monkeypatch):
    monkeypatch.setattr(talk.selector, "plan", lambda *_: 1 / 0)
    turn = await talk.ask()
    assert (turn.text, turn.selection.why) == (TEXTS[0], "the selector has no plan (ZeroDivisionError)")
    assert len(warnings(caplog)) == 1


async def test_a_server_that_refuses_several_answers_gives_one_and_the_operator_is_told_once(talk, caplog):
    talk.vllm.most = 1
    turns = [await talk.ask(f"hello {number}") for number in range(3)]
    assert {(turn.text, turn.selection.why) for turn in turns} == {(TEXTS[0], IS_REFUSED)}
    assert len(talk.shown) > 1, "it grows"
    [line] = warnings(caplog)
    assert line.startswith("vLLM refuses 3 answers in one request, so one is sampled")
    assert "n must be at most 1" in line
    assert talk.vllm.paths.count("/v1/completions") == 4, "it is asked for several once"


async def test_a_prompt_that_is_refused_is_no_reason_to_select_no_more(talk, caplog):
    with pytest.raises(ServingError, match="out of range"):
        await talk.ask(seed=2**64)
    assert warnings(caplog) == []
    assert (await talk.ask()).is_selected


async def test_an_answer_that_is_stopped_is_not_chosen(talk):
    stop, talk.shown = asyncio.Event(), []
    talk.vllm.goes_on.clear()
    asking = asyncio.create_task(
        talk.dialogue.respond(Message("", "ann", "hello"), ReplyOptions(talk.shown.append, stop=stop), HERE)
    )
    while not talk.vllm.asked:
        await asyncio.sleep(0.01)
    stop.set()
    talk.vllm.goes_on.set()
    turn = await asking
    assert (turn.finish_reason, turn.selection, talk.selector.choices) == (STOPPED, Selection(why=IS_STOPPED), [])
    assert "".join(talk.shown) == turn.text
    assert any(text.startswith(turn.text) for text in TEXTS)


async def test_answers_that_break_off_keep_the_beginning_of_one(talk, monkeypatch):
    async def cut(path, body):
        yield {"choices": [{"index": 2, "text": "Half an", "logprobs": None, "finish_reason": None}]}
        raise TimeoutError

    monkeypatch.setattr(talk.dialogue.policy.admin, "stream", cut)
    turn = await talk.ask()
    assert (turn.text, turn.finish_reason, turn.selection, talk.shown) == ("Half an", "interrupted", None, ["Half an"])


async def test_a_regenerated_answer_is_chosen_too_and_feedback_is_noticed_once(talk, caplog):
    first = await talk.ask()
    assert talk.selector.noticed == 0
    again = await talk.dialogue.regenerate(first.id, "ann")
    assert (again.is_selected, again.replaces, talk.selector.noticed) == (True, first.id, 1), "it is feedback"
    given = Feedback(first.id, "ann", FeedbackKind.APPROVAL, "👍", event_id=new_id())
    assert await talk.dialogue.record_feedback(given)
    assert not await talk.dialogue.record_feedback(Feedback(first.id, "ann", given.kind, "👍", event_id=given.event_id))
    assert await talk.dialogue.retract(given.id, "ann")
    assert talk.selector.noticed == 3
    talk.selector.error = ZeroDivisionError("a bug")
    assert await talk.dialogue.record_feedback(Feedback(first.id, "bob", FeedbackKind.APPROVAL))
    assert len(warnings(caplog)) == 1, "the feedback is stored all the same"


async def test_a_pick_and_its_retraction_are_noticed_as_other_feedback_is(talk):
    first = await talk.ask()
    again = await talk.dialogue.regenerate(first.id, "ann")
    noticed = talk.selector.noticed
    await talk.dialogue.record_pick(Pick(again.id, "ann", prefers_new=True))
    assert talk.selector.noticed == noticed + 1
    assert await talk.dialogue.retract_pick(Pick(again.id, "ann", prefers_new=True))
    assert talk.selector.noticed == noticed + 2
