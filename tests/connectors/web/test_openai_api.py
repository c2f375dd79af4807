"""What clients of the OpenAI API send, and what it means."""

import json

import pytest

from bot.errors import DataError
from bot.types import FeedbackKind, Reason
from connectors.web.openai_api import UNSEEN, CompletionRequest, FeedbackRequest, parse
from connectors.web.server import PAGE

USER = {"role": "user", "content": "hello"}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def completion(*messages: dict, **fields: object) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"messages": messages or [USER], **fields}).encode())


def asked(*messages: dict) -> tuple[str, list[tuple[str, str]], str]:
    question, history = completion(*messages).split_question()
    return question, [(said["role"], said["content"]) for said in history.before], history.partial_answer


def test_roles_that_the_policy_does_not_know_become_those_that_it_does():
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]}
    told = {"role": "tool", "tool_call_id": "1", "content": "rain"}
    question, before, _ = asked({"role": "developer", "content": "Be kind."}, USER, call, told, {**USER, "content": "so?"})
    assert question == "so?"
    assert before == [("system", "Be kind."), ("user", "hello"), ("user", "rain")]
    del call["content"]
    assert asked(USER, call, told)[0] == "rain"


@pytest.mark.parametrize(
    ("roles", "question", "begun"),
    [
        ("su", "u1", ""),
        ("uau", "u2", ""),
        ("uas", "s2", ""),  # a note after an answer is what is asked now
        ("us", "u0", ""),  # a note after a question bears on it
        ("s", "s0", ""),
        ("ua", "u0", "a1"),
        ("uaa", "u0", "a1\na2"),
        ("a", "", "a0"),
    ],
)
def test_a_history_may_end_with_anybody(roles, question, begun):
    names = {"u": "user", "a": "assistant", "s": "system"}
    chat = [{"role": names[role], "content": f"{role}{at}"} for at, role in enumerate(roles)]
    found, before, found_begun = asked(*chat)
    assert (found, found_begun) == (question, begun)
    said = [text for _, text in before] + [found, *found_begun.split("\n")]
    assert sorted(filter(None, said)) == sorted(one["content"] for one in chat), "nothing is lost"


def test_null_is_as_good_as_nothing_in_every_optional_field():
    names = [name for name in CompletionRequest.model_fields if name != "messages"]
    assert completion(**dict.fromkeys(names)) == completion()
    assert completion(stream_options={"include_usage": None}) == completion()
    rating = FeedbackRequest(inference_id="x", value=True)
    nothing = {name: None for name in FeedbackRequest.model_fields if name not in ("inference_id", "value")}
    assert parse(FeedbackRequest, json.dumps({"inference_id": "x", "value": True, **nothing}).encode()) == rating


def test_what_cannot_be_read_is_named_to_the_policy_and_told_to_the_person_once():
    with_picture = {"role": "user", "content": [{"type": "text", "text": "what is this?"}, PICTURE]}
    assert asked(with_picture)[0] == "what is this?[image]"
    assert completion(with_picture).has_unseen
    answer = {"role": "assistant", "content": f"{UNSEEN}I do not know."}
    later = completion(with_picture, answer, USER)
    assert not later.has_unseen
    assert ("assistant", "I do not know.") in asked(with_picture, answer, USER)[1], "the policy did not say the rest"


def test_limits_and_stops_are_read_in_each_of_their_shapes():
    assert completion(max_tokens=7).token_limit == 7
    assert completion(max_tokens=7, max_completion_tokens=5).token_limit == 5
    assert completion(stop="\n").stops == ("\n",)
    assert completion(stop=["a", "b"]).stops == ("a", "b")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"n": 2}, "n must be 1"),
        ({"tool_choice": "required"}, "calls no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "calls no tools"),
        ({"function_call": {"name": "x"}}, "calls no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type must be 'text'"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"user": "a\0b"}, "user"),
        ({"user": "x" * 65}, "user"),
    ],
)
def test_what_kibitz_cannot_do_is_refused_in_one_line(fields, line):
    with pytest.raises(DataError) as error:
        completion(**fields)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_what_asks_for_nothing_special_is_taken():
    assert completion(n=1, tool_choice="auto", tools=[{"type": "function"}], response_format={"type": "text"}, seed=-1)


@pytest.mark.parametrize(
    ("value", "kind", "rating"),
    [
        ("true", FeedbackKind.APPROVAL, None),
        ("1", FeedbackKind.APPROVAL, None),
        ("false", FeedbackKind.DISAPPROVAL, None),
        ("0", FeedbackKind.DISAPPROVAL, None),
        ("-1", FeedbackKind.RATING, -1.0),
        ("0.5", FeedbackKind.RATING, 0.5),
        ("1.0", FeedbackKind.RATING, 1.0),
    ],
)
def test_a_dislike_is_a_dislike_also_as_a_number(value, kind, rating):
    given = parse(FeedbackRequest, f'{{"inference_id": "x", "value": {value}}}'.encode()).make_feedback("x", "ann")
    assert (given.kind, given.value) == (kind, rating)


@pytest.mark.parametrize("fields", [{"value": 0.0}, {"value": 2}, {"episode_id": "e", "value": True}])
def test_an_opinion_that_would_be_lost_is_refused(fields):
    with pytest.raises(DataError):
        parse(FeedbackRequest, json.dumps({"inference_id": "x", **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"stop": ["END"] * 20}, r"stop: List should have at most 16 items after validation, not 20"),
        ({"stop": ["", "there"]}, r"stop\.0: String should have at least 1 character"),
        ({"stop": ""}, r"stop\.0: String should have at least 1 character"),
        ({"stop": ["there", "x" * 257]}, r"stop\.1: String should have at most 256 characters"),
        ({"stop": 5}, "stop: must be a text or a list, not 5"),
        ({"messages": [USER, {"role": "user", "content": 5}]}, r"messages\.1\.content: must be a text or a list, not 5"),
        ({"messages": [{"role": "user", "content": [{"text": 5}]}]}, r"messages\.0\.content\.0\.text: Input should be a"),
        ({"user": "a\0b"}, r"user: contains the character U\+0000"),
        ({"n": 2}, "n must be 1: kibitz gives one answer at a time"),
    ],
)
def test_what_a_field_of_several_types_breaks_is_told_and_no_name_of_a_library(fields, told):
    with pytest.raises(DataError, match=f"^{told}"):
        completion(**fields)


@pytest.mark.parametrize(("value", "shown"), [([1], r"\[1\]"), ({"a": 1}, '{"a": 1}')])
def test_a_value_of_feedback_that_is_neither_a_number_nor_a_text_is_told(value, shown):
    with pytest.raises(DataError, match=f"^value: must be true, false, a number or a text, not {shown}$"):
        parse(FeedbackRequest, json.dumps({"inference_id": "x", "value": value}).encode())


def test_each_reason_is_taken_and_the_page_shows_them_all():
    for reason in Reason:
        body = json.dumps({"inference_id": "x", "metric_name": "reason", "value": reason}).encode()
        given = parse(FeedbackRequest, body).make_feedback("x", "ann")
        assert (given.kind, given.signal, given.text) == (FeedbackKind.COMMENT, reason.signal, reason)
    assert json.dumps(list(Reason)) in PAGE.read_text()


def test_a_stop_may_be_one_text_or_a_list_of_texts():
    assert completion(stop="END").stops == completion(stop=["END"]).stops == ("END",)
