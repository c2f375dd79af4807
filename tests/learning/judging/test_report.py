"""What a run leaves to be read: its report, and of each turn why it is what it is."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import answered, converse, react

from bot.config import load
from bot.errors import DataError
from bot.store.forgetting import forget_message
from bot.types import Conversation, Feedback, FeedbackKind, Message, PolicyState, SamplingParams, new_id, now
from learning.data.explanation import TrainingUse, explain
from learning.data.replay_buffer import ReplayBuffer
from learning.judging import report
from learning.training.run import train_version


def quiet(*_) -> None:
    """Show no progress."""


def test_a_report_says_what_was_learned_and_why_the_rest_was_not(trained):
    read, version = trained.outcome.snapshot, trained.version
    found = report.collect(version, "passed")
    assert found.trained_on == len(read.trained_on)
    assert found.held_out == len(read.held_out)
    assert sum(found.left_out.values()) == read.turns - len(read.trained_on) - len(read.held_out)
    assert len(found.loss) == 6
    assert [check.step for check in found.checks] == [0, 2, 4, 6]
    assert found.checks[0].gained == (0.0, 0.0, 0.0), "nothing has been learned yet"
    gain, low, high = found.checks[-1].gained
    assert low < gain < high
    assert len(found.samples) == 12
    assert {row.name for row in found.style} >= {"words", "emoji"}
    written = json.loads(json.dumps(asdict(found)))
    assert written["checks"][0]["gained"] == [0.0, 0.0, 0.0]
    assert list(written["samples"][0]) == ["question", "before", "after"]
    found = replace(found, samples=[replace(found.samples[0], question="<script>alert(1)</script>")])
    page = report.render_html(found)
    assert page.count("data:image/png;base64,") == 3
    assert "doubly robust" in page
    assert found.worth_gain[1] <= found.worth_gain[0] <= found.worth_gain[2]
    assert found.worth[1] - found.worth[0] == pytest.approx(found.worth_gain[0], abs=0.2)
    without = replace(found, reward_model=None, worth_gain=None)
    assert "doubly robust" not in report.render_html(without)  # the control: too little was rated
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page, "the control: the question is there"


def test_a_report_without_samples_or_files_says_so(trained):
    version, store = trained.version, trained.store
    forget_message(store.database, store.find_turns_with_feedback()[0].message_id)
    assert "No samples: a person was forgotten since" in report.render_html(report.collect(version, "passed"))
    (Path(version.path) / "manifest.json").unlink()
    with pytest.raises(DataError, match="has no files"):
        report.collect(version, "passed")


def test_a_run_of_an_older_kibitz_that_measured_less_has_a_report(trained):
    file = Path(trained.version.path) / "metrics.json"
    kept = json.loads(file.read_text())
    older = {name: kept[name] for name in ("kl", "checks", "loss")} | {"evidence": {"of": "another shape"}}
    older["checks"] = [{name: value for name, value in check.items() if name != "liked_error"} for check in kept["checks"]]
    file.write_text(json.dumps(older))
    found = report.collect(trained.version, "passed")
    assert (found.kl, found.gain, found.well_formed, found.stopped) == (kept["kl"], (None, None, None), None, None)
    assert report.render_html(found).count("not recorded") == 1


def test_what_changed_most_comes_first():
    rows = [report.Answered("", "one two three", f"one two {word}😀") for word in ("three", "four")] * 5
    assert report.compare_style(rows)[0].name == "emoji"
    assert report.compare_style([]) == []


def test_a_turn_is_explained_with_its_reward_and_the_runs_that_used_it(trained, tokenizer):
    version, registry = trained.version, trained.registry
    buffer = ReplayBuffer(trained.store, tokenizer, trained.config)
    rows = json.loads((Path(version.path) / "manifest.json").read_text())["rows"]
    account = explain(rows[0][0], buffer, registry)
    assert [used.policy for used in account.uses] == [version.name]
    assert (account.uses[0].advantage, account.uses[0].weight) == (rows[0][3], rows[0][4])
    assert account.decision.reward.value == rows[0][2]
    lines = "\n".join(account.lines())
    assert re.search(rf"used by {version.name}: advantage [+-]\d\.\d\d, weight 1\.00", lines)
    with pytest.raises(DataError, match="there is no turn 'nothing'"):
        explain("nothing", buffer, registry)
    shutil.rmtree(version.path)
    assert f"used by {version.name}, whose files are gone" in explain(rows[0][0], buffer, registry).lines()


def test_an_explanation_says_how_an_answer_was_sampled_and_nothing_where_that_is_unknown(store, registry, tokenizer):
    sampling = SamplingParams(temperature=1.0, max_tokens=128)
    sampled = answered(store, tokenizer, "hello", "Hey!", sampling=sampling)
    imported = answered(store, tokenizer, "hi", "Ho!", prompt_ids=None, completion_ids=None, logprobs=None)
    buffer = ReplayBuffer(store, tokenizer, load())
    told = {turn.id: explain(turn.id, buffer, registry).lines() for turn in (sampled, imported)}
    [line] = [line for line in told[sampled.id] if "sampled with" in line]
    assert line.endswith("sampled with temperature 1, at most 128 tokens")
    assert line.startswith(f"prompt {len(sampled.prompt_ids)} tokens, answer {len(sampled.completion_ids)} tokens, log-pro")
    assert not [line for line in told[imported.id] if "token" in line or "sampled" in line]


def test_an_explanation_says_what_smoothing_makes_of_an_advantage():
    assert TrainingUse("policy-1", 0.5).describe() == "used by policy-1: advantage +0.50, weight 1.00"
    line = TrainingUse("policy-1", 0.5, 0.4, smoothing=0.9).describe()
    assert "+0.50 (90% from similar answers, unless it was compared with another answer)" in line
    assert "weight 0.40 (reduced because its people said more than their share)" in line


OPINIONS = {  # who says what -> whether it counts
    "asker": None,
    "regular": None,
    "stranger": "the person never wrote in this channel",
    "silent": "the person does not consent to learning",
    "regrets": "it was retracted or repeated later",
    "wavers": "the person changed their opinion later",
}


def test_why_and_a_run_count_the_same_opinions_and_it_says_why_not_the_others(config, store, registry, tokenizer):
    """Both ways to ask once computed the reward anew, without consent and without who took part."""
    turn = answered(
        store,
        tokenizer,
        "hello",
        "Hey there!",
        place=store.open_conversation(Conversation("discord", "general", "guild", "1")),
    )
    elsewhere = store.open_conversation(Conversation("discord", "general", "guild", "2"))  # each mention is one
    for name in ("regular", "silent", "regrets", "wavers"):
        store.add_message(Message(elsewhere.id, name, "good morning"))
    buffer = ReplayBuffer(store, tokenizer, config)
    buffer.users.record_consent("discord", "silent", False)
    for name in OPINIONS:
        given = react(store, turn, approves=True, user=name)
        if name == "regrets":
            store.add_feedback(replace(given, id=new_id(), at=now(), retracts=True))
        if name == "wavers":
            react(store, turn, approves=False, user=name)
    account = explain(turn.id, buffer, registry)
    first = {row.user_id: reason for row, reason in reversed(account.decision.feedback)}
    assert first == OPINIONS
    snapshot = buffer.snapshot()
    [learned] = [*snapshot.training, *snapshot.held_out]
    assert set(learned.opinion_holders) == {"asker", "regular", "wavers"}
    assert learned.reward == account.decision.reward.value
    assert learned.feedback_ids == account.decision.reward.feedback_ids
    lines = "\n".join(account.lines_without_names())
    assert "does not count: the person never wrote in this channel" in lines
    assert "stranger" not in lines, "a chat is told no names"
    assert "stranger" in "\n".join(account.lines())


def test_why_says_that_a_turn_as_a_whole_teaches_nothing(config, store, registry, tokenizer):
    unwilling = answered(store, tokenizer, "hello", "Hey there!")
    long = answered(store, tokenizer, "long " * 300, "Hey there!")
    held_out = [answered(store, tokenizer, f"hello {number}", "Hey there!") for number in range(16)]
    for turn in (unwilling, long, *held_out):
        react(store, turn, approves=True)
    small = config.model_copy(update={"training": config.training.model_copy(update={"max_length": 64})})
    buffer = ReplayBuffer(store, tokenizer, small)

    def lines(turn):
        return explain(turn.id, buffer, registry).lines()

    assert "not trained on: longer than training.max_length (64)" in lines(long)
    apart = {one.turn_id for one in buffer.snapshot().held_out}
    told = {turn.id for turn in held_out if "held out: used to judge candidates, not to train them" in lines(turn)}
    assert told == apart & {turn.id for turn in held_out} != set()
    assert not any("not trained on" in line for line in lines(unwilling)), "the control"
    buffer.users.record_consent("test", "asker", False)
    assert "not trained on: a person whose words it contains does not consent" in lines(unwilling)


def test_what_was_taken_back_is_told_and_the_next_report_names_it(trained, tokenizer):
    config, version, store, registry = trained.config, trained.version, trained.store, trained.registry
    rows = json.loads((Path(version.path) / "manifest.json").read_text())["rows"]
    [given] = store.read_feedback_on([rows[0][0]])[rows[0][0]]
    store.add_feedback(replace(given, id="later", at=given.at.replace(year=given.at.year + 1), event_id=None, retracts=True))
    lines = explain(rows[0][0], ReplayBuffer(store, tokenizer, config), registry).lines()
    assert any("does not count: it was retracted" in line for line in lines)
    again = train_version(config, quiet)
    told = report.collect(registry.get(again.policy), "")
    assert told.taken_back == [rows[0][0]]
    assert rows[0][0] in report.render_html(told)
    assert rows[0][0] not in report.render_html(replace(told, taken_back=[])), "the control"
    assert registry.get(version.name).state in (PolicyState.CANDIDATE, PolicyState.REJECTED)


def test_an_opinion_of_somebody_who_took_no_part_teaches_nothing(config, store, registry, tokenizer):
    converse(store, tokenizer, likes_emoji=True, count=32)
    turn = answered(store, tokenizer, "hello", "Hey there!")
    store.add_feedback(Feedback(turn.id, "a passer-by", FeedbackKind.DISAPPROVAL))
    found = ReplayBuffer(store, tokenizer, config).snapshot()
    assert found.dropped == {"no opinion that counts": 1}
    react(store, turn, approves=True)
    assert not ReplayBuffer(store, tokenizer, config).snapshot().dropped, "the control: the asker's counts"
