"""Snapshots: what is learned from, what is held out for ever, and why the rest is left out."""

from dataclasses import replace

import pytest
from conftest import answered, react

from bot.chat.dialogue import INTERRUPTED
from bot.config import load
from bot.memory.followups import KINDS
from bot.serving.policy import STOPPED
from bot.store.picks import record_pick, retract_pick
from bot.store.tables import followups
from bot.store.users import record_decision
from bot.types import Candidate, Conversation, Feedback, FeedbackKind, Message, Pick, Selection, new_id
from connectors.reasons import make_acts
from learning.data.replay_buffer import ReplayBuffer
from learning.data.selection import is_held_out, question_key


def snapshot(store, tokenizer, config=None):
    return ReplayBuffer(store, tokenizer, config or load()).snapshot()


def test_a_snapshot_is_rebuilt_from_the_facts_and_uses_the_recorded_ids(store, tokenizer):
    turns = [answered(store, tokenizer, f"hello {number}", "Hey there!") for number in range(40)]
    for number, turn in enumerate(turns):
        react(store, turn, approves=number % 3 > 0)
    first, second = snapshot(store, tokenizer), snapshot(store, tokenizer)
    assert first == second
    assert len(first.training) + len(first.held_out) == 40
    assert 0 < len(first.held_out) < 20
    by_turn = {turn.id: turn for turn in turns}
    for experience in first.training:
        assert experience.completion_ids == by_turn[experience.turn_id].completion_ids
        assert experience.prompt_ids == by_turn[experience.turn_id].prompt_ids
    assert first.without_logprobs == 0


def test_a_chosen_answer_has_no_log_probabilities_to_weigh_by_and_a_correction_of_it_was_not_chosen(store, tokenizer):
    several = Selection(candidates=[Candidate(text="Hey there!"), Candidate(text="Hi")])
    turns = {
        "chosen": answered(store, tokenizer, "hello 1", "Hey there!", selection=several, finish_reason="length"),
        "plain": answered(store, tokenizer, "hello 2", "Hey there!", selection=Selection(is_plain=True)),
        "single": answered(store, tokenizer, "hello 3", "Hey there!"),
        "imported": answered(store, tokenizer, "hello 4", "Hey there!", prompt_ids=None, completion_ids=None, logprobs=None),
    }
    for turn in turns.values():
        react(store, turn, approves=True)
    store.add_feedback(Feedback(turns["chosen"].id, "asker", FeedbackKind.CORRECTION, text="Hi!"))
    found = {(one.turn_id, one.is_correction): one for one in snapshot(store, tokenizer).rated}
    seen = {name: found[turn.id, False] for name, turn in turns.items()}
    assert {name: one.is_selected for name, one in seen.items()} == dict.fromkeys(turns, False) | {"chosen": True}
    assert {name for name, one in seen.items() if one.logprobs is None} == {"chosen", "imported"}
    assert {name: one.mean_logprob for name, one in seen.items()} == dict.fromkeys(turns, -0.5) | {"imported": None}
    assert {name for name, one in seen.items() if not one.is_finished} == {"chosen"}
    correction = found[turns["chosen"].id, True]
    assert (correction.is_selected, correction.mean_logprob, correction.is_finished) == (False, None, True)


def test_what_is_held_out_stays_held_out_when_more_is_said(store, tokenizer):
    for number in range(40):
        react(store, answered(store, tokenizer, f"hello {number}", "Hey there!"), approves=True)
    before = {one.turn_id for one in snapshot(store, tokenizer).held_out}
    for number in range(40):
        react(store, answered(store, tokenizer, f"more {number}", "Hey there!"), approves=False)
    after = snapshot(store, tokenizer)
    assert before <= {one.turn_id for one in after.held_out}
    assert before.isdisjoint({one.turn_id for one in after.training})


def test_an_answer_and_its_regeneration_are_on_the_same_side(store, tokenizer):
    for number in range(30):
        turn = answered(store, tokenizer, f"hello {number}", "Hey there!")
        react(store, turn, approves=False)
        again = replace(turn, id=turn.id[::-1], reply_id=turn.reply_id[::-1], replaces=turn.id)
        store.add_turn(again)
        react(store, again, approves=True)
    found = snapshot(store, tokenizer)
    assert {one.unit for one in found.training}.isdisjoint({one.unit for one in found.held_out})


def test_what_the_asker_said_next_counts_where_the_operator_lets_it(store, database, tokenizer):
    said = {"ann": "approval", "bob": "approval", "cleo": "other", "dora": "repetition"}
    turns = {}
    for author, kind in said.items():
        turns[author] = turn = answered(store, tokenizer, f"hello from {author}", "Hey there!", author=author)
        after = Message(turn.conversation_id, "ann" if author == "bob" else author, f"{kind}, says {author}")
        store.add_message(after)
        with database.begin() as connection:
            chances = dict.fromkeys(KINDS, 0.05) | {kind: 0.8}
            connection.execute(followups.insert(), {"turn_id": turn.id, "message_id": after.id, "chances": chances})
    settings = load()
    assert snapshot(store, tokenizer).rated == []  # the control: off, nobody has said anything
    counting = settings.model_copy(update={"rewards": settings.rewards.model_copy(update={"followup": 0.5})})
    found = snapshot(store, tokenizer, counting)
    assert {one.asker: one.reward for one in found.rated} == {"ann": pytest.approx(0.4), "dora": pytest.approx(-0.2)}
    assert found.dropped == {"no opinion that counts": 2}
    assert {one.followup_id for one in found.rated} >= set(found.followup_ids)
    assert all(one.followup_id for one in found.rated)
    react(store, turns["ann"], True, "ann")
    both = snapshot(store, tokenizer, counting).rated[0]
    assert (both.asker, both.reward) == ("ann", 1.0), "who says it twice counts once"


@pytest.mark.parametrize("reason", [INTERRUPTED, STOPPED])
def test_half_an_answer_is_not_learned_from_and_a_whole_one_is(store, tokenizer, reason):
    half = answered(store, tokenizer, "a", "Hey!", finish_reason=reason)
    whole = answered(store, tokenizer, "b", "Hey!")
    for turn in (half, whole):
        react(store, turn, approves=True)
    found = snapshot(store, tokenizer)
    assert [one.turn_id for one in [*found.training, *found.held_out]] == [whole.id]
    assert found.dropped == {"the answer broke off": 1}


def test_every_turn_that_is_left_out_is_counted_under_a_reason(store, tokenizer):
    react(store, answered(store, tokenizer, "a", "Hey!", finish_reason=INTERRUPTED), approves=True)
    react(store, answered(store, tokenizer, "b", " "), approves=True)
    split = answered(
        store, tokenizer, "c", "Hey!", place=store.open_conversation(Conversation("discord", "general", "guild", "1"))
    )
    elsewhere = store.open_conversation(Conversation("discord", "general", "guild", "2"))
    for name in ("ann", "bob"):
        store.add_message(Message(elsewhere.id, name, "hello"))
    react(store, split, approves=True, user="ann")
    react(store, split, approves=False, user="bob")
    taken_back = answered(store, tokenizer, "d", "Hey!")
    given = react(store, taken_back, approves=True)
    store.add_feedback(Feedback(taken_back.id, given.user_id, given.kind, given.signal, retracts=True))
    react(store, answered(store, tokenizer, "e" * 300, "Hey!"), approves=True)
    found = snapshot(store, tokenizer, load(training={"max_length": 32}))
    assert found.dropped == {
        "the answer broke off": 1,
        "the answer is empty": 1,
        "opinions cancel out": 1,
        "no opinion that counts": 1,
        "longer than training.max_length (32)": 1,
    }
    assert found.turns == 5
    assert not found.training
    assert not found.held_out


@pytest.mark.parametrize(
    ("place", "counts"),
    [
        (Conversation("discord", "general", "guild", "2"), True),  # another mention: on Discord each is a conversation
        (Conversation("discord", "general", "guild", "1"), True),
        (Conversation("discord", "random", "guild", "1"), False),
        (Conversation("discord", "general", "another guild", "1"), False),
        (Conversation("slack", "general", "guild", "1"), False),
    ],
)
def test_who_wrote_in_the_channel_took_part_whichever_conversation_it_was(store, tokenizer, place, counts):
    turn = answered(
        store, tokenizer, "a", "Hey!", place=store.open_conversation(Conversation("discord", "general", "guild", "1"))
    )
    store.add_message(Message(store.open_conversation(place).id, "bob", "good morning"))
    react(store, turn, approves=True, user="bob")
    found = snapshot(store, tokenizer)
    assert [one.opinion_holders for one in found.rated] == ([("bob",)] if counts else [])


def test_a_pick_of_somebody_who_took_no_part_ranks_nothing(store, tokenizer):
    first = answered(store, tokenizer, "a", "Hey!")
    second = replace(first, id=new_id(), reply_id=new_id(), text="No.", replaces=first.id)
    second = replace(second, completion_ids=tuple(tokenizer.completion_ids("No.")))
    store.add_turn(second)
    for turn, rank in ((first, 2.0), (second, 1.0)):
        react(store, turn, approves=True)
        store.add_feedback(Feedback(turn.id, "a passer-by", FeedbackKind.RANK, value=rank))
    found = snapshot(store, tokenizer)
    assert not any(one.rejected_ids for one in [*found.training, *found.held_out])
    for turn, rank in ((first, 2.0), (second, 1.0)):
        store.add_feedback(Feedback(turn.id, "asker", FeedbackKind.RANK, value=rank))
    found = snapshot(store, tokenizer)
    assert [one.turn_id for one in [*found.training, *found.held_out] if one.rejected_ids] == [second.id], "the control"


@pytest.mark.parametrize("prefers_new", [True, False])
def test_a_pick_after_a_regeneration_gives_a_pair_of_one_person_and_one_prompt(store, tokenizer, prefers_new):
    first = answered(store, tokenizer, "a", "Hey!")
    second = replace(first, id=new_id(), reply_id=new_id(), text="No.", replaces=first.id)
    second = replace(second, completion_ids=tuple(tokenizer.completion_ids("No.")))
    store.add_turn(second)
    given = [Feedback(first.id, "asker", FeedbackKind.REGENERATE, "regenerate")]
    store.add_feedback(given[0])
    config = load(learning={"held_out": 1e-9})

    def drawn() -> list:
        return sorted(snapshot(store, tokenizer, config).training, key=lambda one: one.turn_id != first.id)

    assert [(one.turn_id, one.reward, one.rejected_ids) for one in drawn()] == [(first.id, -0.5, None)]
    record_pick(store, Pick(second.id, "asker", not prefers_new))  # another one is picked later
    given += record_pick(store, Pick(second.id, "asker", prefers_new))
    for act in make_acts(set(), ["wrong", "too long"], first.id, "asker"):
        store.add_feedback(act)  # reasons have no worth
    rewards = [one.reward for one in drawn()]
    assert rewards == ([-1.0, 1.0] if prefers_new else [0.5, -1.0]), "a pick of the first outweighs that another was wanted"
    better, worse = (second, first) if prefers_new else (first, second)
    [pair] = [one for one in drawn() if one.rejected_ids is not None]
    assert (pair.turn_id, pair.completion_ids, pair.rejected_ids) == (better.id, better.completion_ids, worse.completion_ids)
    assert (pair.prompt_ids, pair.opinion_holders) == (first.prompt_ids, ("asker",))
    assert sorted(pair.feedback_ids) == sorted(one.id for one in given), "the two acts, and the regeneration"
    retract_pick(store, Pick(second.id, "asker", prefers_new))
    assert [(one.turn_id, one.reward, one.rejected_ids) for one in drawn()] == [(first.id, -0.5, None)], "the control"


def test_who_ranked_answers_that_are_compared_taught_the_run(store, tokenizer):
    """Otherwise forgetting them would not withdraw what they taught."""
    first = answered(store, tokenizer, "a", "Hey!")
    second = replace(first, id=new_id(), reply_id=new_id(), text="No.", replaces=first.id)
    second = replace(second, completion_ids=tuple(tokenizer.completion_ids("No.")))
    store.add_turn(second)
    thumbs = [react(store, turn, approves=True).id for turn in (first, second)]
    ranks = [Feedback(turn.id, "asker", FeedbackKind.RANK, value=rank) for turn, rank in ((first, 2.0), (second, 1.0))]
    place, learning = store.read_conversation(first.conversation_id), {"held_out": 1e-9}
    for given in ranks:
        store.add_feedback(given)
    store.add_message(Message(place.id, "bob", "good morning"))
    found = snapshot(store, tokenizer, load(learning=learning))
    assert found.feedback_ids == sorted([*thumbs, *(one.id for one in ranks)])
    alone = answered(store, tokenizer, "quite another thing", "Hey!")
    thumb = react(store, alone, approves=True)
    store.add_feedback(rank := Feedback(alone.id, "asker", FeedbackKind.RANK, value=1.0))
    found = snapshot(store, tokenizer, load(learning=learning))
    assert thumb.id in found.feedback_ids
    assert rank.id not in found.feedback_ids, "the control: there was nothing to compare it with"


@pytest.mark.parametrize(
    "foreign",
    [
        {"completion_ids": (5, 6, 7)},  # they spell something else
        {"completion_ids": (10**6,)},
        {"prompt_ids": (1, 10**6)},
        {"prompt_ids": (1, -1)},
    ],
)
def test_token_ids_of_another_tokenizer_are_not_learned_from(store, tokenizer, foreign):
    react(store, answered(store, tokenizer, "a", "Hey!", **foreign), approves=True)
    ours = answered(store, tokenizer, "b", "Hey!")
    react(store, ours, approves=True)
    found = snapshot(store, tokenizer)
    assert found.dropped == {"its token ids are from another tokenizer": 1}
    assert [one.turn_id for one in found.rated] == [ours.id], "the control"


def test_a_correction_teaches_the_text_that_was_wanted(store, tokenizer):
    turn = answered(store, tokenizer, "hello", "Good day to you.")
    store.add_feedback(Feedback(turn.id, "asker", FeedbackKind.CORRECTION, text="Hey there!"))
    found = snapshot(store, tokenizer)
    unwanted, wanted = found.training + found.held_out
    assert unwanted.reward < 0 < wanted.reward
    assert tokenizer.hf.decode(wanted.completion_ids, skip_special_tokens=True) == "Hey there!"
    assert wanted.completion_ids[-1] == tokenizer.hf.eos_token_id
    assert found.without_logprobs == 1


def test_the_newest_turns_are_used_where_there_are_too_many(store, tokenizer):
    turns = [answered(store, tokenizer, f"hello {number}", "Hey there!") for number in range(10)]
    for turn in turns:
        react(store, turn, approves=True)
    found = snapshot(store, tokenizer, load(learning={"max_turns": 4, "fresh": 1.0}))
    used = {one.turn_id for one in found.training + found.held_out}
    assert used == {turn.id for turn in turns[-4:]}
    assert sum(found.dropped.values()) == 6


def test_a_run_reads_no_more_turns_than_it_draws_from_and_draws_what_it_would_draw_of_all(store, tokenizer, monkeypatch):
    for number in range(120):
        turn = answered(store, tokenizer, f"hello {number}", "Hey there!")
        react(store, turn, approves=number % 3 > 0)
        if number % 4 == 0:  # its opinions cancel out: it is no use
            react(store, turn, approves=number % 3 == 0)
            store.add_message(Message(turn.conversation_id, "bob", "hi"))
            react(store, turn, approves=number % 3 == 0, user="bob")
        if number % 5 == 0:
            again = replace(turn, id=new_id(), reply_id=new_id(), text="Hi!", completion_ids=None, replaces=turn.id)
            store.add_turn(again)
            react(store, again, approves=number % 3 == 0)
    config = load(learning={"max_turns": 24, "fresh": 0.5})
    found, read = {}, {}
    turns_of = store.read_turns
    for page in (10_000, 7):
        monkeypatch.setattr("learning.data.replay_buffer.PAGE", page)
        counted: list[str] = []

        def count(ids, counted=counted):
            wanted = list(ids)
            counted += wanted
            return turns_of(wanted)

        monkeypatch.setattr(store, "read_turns", count)
        one = snapshot(store, tokenizer, config)
        found[page], read[page] = [one.training, one.held_out, one.turns], len(counted)
        assert one.dropped.total() == one.turns - 24
    assert found[7] == found[10_000]
    assert read[10_000] == found[7][2] == 144
    assert read[7] < 80
    assert len(ReplayBuffer(store, tokenizer, config).read_rated()) > 80, "the control: there were more to read"


def test_what_people_said_of_another_base_models_answers_is_learned_from_as_texts(config, store, registry, tokenizer):
    turn = answered(store, tokenizer, "hello", "Hey there!")
    place = store.read_conversation(turn.conversation_id)
    said = [one.id for one in store.read_messages(place.id)]
    elsewhere = answered(store, tokenizer, "the sky is blue", "It is.")
    later = answered(
        *(store, tokenizer, "and now?", "Good night."),
        place=place,
        shown=dict.fromkeys(said) | {elsewhere.message_id: 0.9},
        prompt_ids=(5, 6, 7),
        completion_ids=(8, 9),
    )
    react(store, later, approves=True)
    assert ReplayBuffer(store, tokenizer, config).snapshot().dropped == {"its token ids are from another tokenizer": 1}
    registry.set_base("/models/another")
    (found,) = ReplayBuffer(store, tokenizer, config).snapshot().rated
    chat = [("user", "hello"), ("assistant", "Hey there!"), ("user", "and now?")]
    assert list(found.prompt_ids) == tokenizer.prompt_ids([{"role": role, "content": text} for role, text in chat])
    assert list(found.completion_ids) == tokenizer.completion_ids("Good night.")
    assert found.logprobs is None


def test_names_that_one_client_makes_up_count_as_one_person_unless_the_operator_trusts_them(store, tokenizer):
    for number in range(200):  # one token, which names somebody else each time
        place = store.open_conversation(Conversation("web", f"chat {number}", space="app"))
        name = f"app/made up {number}"
        turn = answered(store, tokenizer, f"hello {number}", "Hey there!", author=name, place=place)
        react(store, turn, approves=True, user=name)
    for number in range(20):
        place = store.open_conversation(Conversation("discord", f"room {number}", space="server"))
        turn = answered(store, tokenizer, f"good night {number}", "Hey!", author=f"person {number}", place=place)
        react(store, turn, approves=False, user=f"person {number}")

    def share_of_app(trusted: bool) -> tuple[int, float]:
        found = snapshot(store, tokenizer, load(web={"trust_user_names": trusted})).training
        counted = [(one.opinion_holders, one.weight * abs(one.advantage)) for one in found]
        app = sum(worth for names, worth in counted if names[0].startswith("app"))
        return len({name for names, _ in counted for name in names if name.startswith("app")}), app / sum(
            worth for _, worth in counted
        )

    people, share = share_of_app(trusted=False)
    assert people == 1
    assert share <= load().rewards.person_cap + 1e-6
    people, share = share_of_app(trusted=True)  # the control
    assert people > 100
    assert share > load().rewards.person_cap


def test_two_names_of_one_client_have_one_opinion_and_each_takes_back_their_own(store, tokenizer):
    place = store.open_conversation(Conversation("web", "chat", space="app"))
    turn = answered(store, tokenizer, "hello", "Hey there!", author="app/ann", place=place)
    store.add_message(Message(place.id, "app/bob", "hello too"))
    for user in ("app/ann", "app/bob"):
        react(store, turn, approves=True, user=user)
    store.add_feedback(Feedback(turn.id, "app/ann", FeedbackKind.APPROVAL, signal="test", retracts=True))
    [one] = snapshot(store, tokenizer).rated
    assert (one.opinion_holders, one.reward) == (("app",), 1.0)


def test_the_newest_prompts_that_nobody_judged_are_found_and_none_that_is_held_out(store, tokenizer):
    config = load(learning={"held_out": 0.3})
    turns = [answered(store, tokenizer, f"hello {number}", "Hey there!", author="ann") for number in range(40)]
    react(store, turns[39], approves=True)
    answered(store, tokenizer, "hello 38", "Again?", author="ann")  # the same prompt
    place = store.open_conversation(Conversation("import", new_id(), space="file"))
    answered(store, tokenizer, "hello import", "Hey there!", author="ann", place=place)
    found = ReplayBuffer(store, tokenizer, config).find_unjudged(16)
    kept = [turn for turn in turns[:39] if not is_held_out(question_key(f"hello {turns.index(turn)}"), 0.3)]
    assert [one.prompt_ids for one in found] == [turn.prompt_ids for turn in reversed(kept)][:16]
    assert len(kept) < 39, "the control"


def test_prompts_of_who_does_not_consent_and_too_long_or_foreign_ones_are_not_found(store, database, tokenizer):
    config = load(learning={"held_out": 0.001}, training={"max_length": 64})
    turns = {author: answered(store, tokenizer, f"{author} says hello", "Hey there!", author=author) for author in "abcd"}
    with database.begin() as connection:
        record_decision(connection, ("test", "b"), consent=False)
    found = ReplayBuffer(store, tokenizer, config).find_unjudged(16)
    assert {one.turn_id for one in found} == {turns[author].id for author in "acd"}
    answered(store, tokenizer, "hello " * 80, "Hey there!")
    answered(store, tokenizer, "of another model", "Hey there!", completion_ids=(10**6,))
    assert ReplayBuffer(store, tokenizer, config).find_unjudged(16) == found
