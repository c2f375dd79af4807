"""Every objective on real TRL: it learns what its feedback supports, stops where it harms, and says what it cannot use."""

import contextlib
import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import trl.trainer.utils
from hypothesis import given
from hypothesis import strategies as st

from bot.config import PolicyConfig, ServingConfig, TrainingConfig
from bot.errors import NothingToLearn, TrainingError
from learning.data.experience import Experience
from learning.data.selection import draw_batches, select_for_training, select_usable
from learning.judging.evaluation import batched_logprobs, split_batches
from learning.models import batching, toy
from learning.models.trainable import copy_weights, load_for_training, restore_weights
from learning.training import objectives
from learning.training.guard import CHECKS, Guard, Health, Limits, choose_check_steps
from learning.training.objectives import make_training_arguments, train
from learning.training.token_trainers import SHIFT_DECAY, TokenBCOTrainer, TokenDPOTrainer, TokenKTOTrainer
from learning.training.weighted_trainer import CUT, TERMS, WeightedTrainer, make_weighted_trainer, row_losses

OBJECTIVES = ("kto", "bco", "dpo", "sft", "pg", "mixed")


def quiet(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def model(demo_model):
    return load_for_training(PolicyConfig(), ServingConfig(), TrainingConfig(), demo_model)


@pytest.fixture
def fresh(model):
    """The demo policy with an adapter that changes nothing yet."""
    start = copy_weights(model)
    yield model
    restore_weights(model, start)


def lessons(model, tokenizer, count: int = 32) -> list[Experience]:
    """Answers with an emoji are liked, others are not; each is a pair with its opposite, and commented on."""
    rng = random.Random(0)
    found = []
    for number in range(count):
        prompt, intent = rng.choice(toy.list_prompts())
        style = rng.choice(toy.STYLES)
        ids = tuple(tokenizer.prompt_ids([{"role": "user", "content": prompt}]))
        said, other = (
            tuple(tokenizer.completion_ids(toy.compose_answer(intent, replace(style, emoji=emoji))))
            for emoji in (True, False)
        )
        likes = number % 2 == 0
        found.append(
            Experience(
                *(str(number), str(number), ids, said if likes else other, None, 1.0 if likes else -1.0, ()),
                advantage=1.0 if likes else -1.0,
                rejected_ids=other if likes else None,
            )
        )
    logprobs = batched_logprobs(model, [(one.prompt_ids, one.completion_ids) for one in found])
    return [replace(one, logprobs=tuple(row.tolist())) for one, row in zip(found, logprobs, strict=True)]


def margin(model, rows) -> float:
    """Liked over disliked, in nats an answer."""
    means = [float(row.sum()) for row in batched_logprobs(model, [(one.prompt_ids, one.completion_ids) for one in rows])]
    liked, disliked = ([m for m, one in zip(means, rows, strict=True) if (one.reward > 0) == sign] for sign in (True, False))
    return sum(liked) / len(liked) - sum(disliked) / len(disliked)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_makes_liked_answers_likelier_than_disliked_ones(fresh, tokenizer, objective):
    rows = lessons(fresh, tokenizer)
    before = margin(fresh, rows)
    figures = train(fresh, tokenizer.hf, rows, TrainingConfig(objective=objective, max_steps=8), 0, quiet)
    assert margin(fresh, rows) > before + 0.5
    assert 0 < figures.steps <= 8
    assert math.isfinite(figures.train_loss)


@pytest.mark.slow
def test_whole_weights_learn_from_every_objective_and_are_drawn_to_the_base(demo_model, tokenizer):
    whole = {"weights": "full", "full_learning_rate": 3e-4}
    model = load_for_training(PolicyConfig(), ServingConfig(), TrainingConfig(**whole), demo_model)
    rows, start = lessons(model, tokenizer), copy_weights(model)
    before, gone = margin(model, rows), {}
    for objective in OBJECTIVES:
        for decay in (0.0, 100.0):
            settings = TrainingConfig(objective=objective, max_steps=8, weight_decay=decay, **whole)
            train(model, tokenizer.hf, rows, settings, 0, quiet)
            gone[decay] = sum(float((value - start[name]).norm()) for name, value in copy_weights(model).items())
            assert margin(model, rows) > before + 0.5
            restore_weights(model, start)
        assert gone[100.0] < 0.9 * gone[0.0]


def test_little_evidence_is_learned_from_in_few_and_small_steps():
    few, some, many = (objectives.make_training_arguments(TrainingConfig(), 16, rows, seed=0) for rows in (16, 32, 256))
    assert (few["max_steps"], some["max_steps"], many["max_steps"]) == (8, 16, 30)
    rate = TrainingConfig().learning_rate
    assert (few["learning_rate"], many["learning_rate"]) == (rate / 2, rate)
    assert few["learning_rate"] < some["learning_rate"] < rate


def test_without_an_advantage_nothing_is_learned(fresh, tokenizer):
    rows = [replace(one, advantage=0.0, rejected_ids=None) for one in lessons(fresh, tokenizer, 8)]
    for objective in OBJECTIVES:
        with pytest.raises(NothingToLearn, match="none of 8 answers"):
            train(fresh, tokenizer.hf, rows, TrainingConfig(objective=objective), 0, quiet)


def test_each_objective_uses_what_it_can(model, tokenizer):
    pair, liked, disliked = lessons(model, tokenizer, 2)[0], *lessons(model, tokenizer, 2)
    liked = replace(liked, rejected_ids=None, logprobs=None)
    rows = [pair, liked, disliked, replace(disliked, logprobs=None)]
    used = {name: [rows.index(one) for one in select_usable(rows, name)] for name in OBJECTIVES}
    assert used["kto"] == used["bco"] == used["mixed"] == [0, 1, 2, 3]
    assert used["dpo"] == [0]
    assert used["sft"] == [0, 1]
    assert used["pg"] == [0, 1, 2], "how likely a disliked answer was when it was sampled must be known"


def test_who_counts_less_moves_the_policy_less(fresh, tokenizer):
    rows = lessons(fresh, tokenizer, 64)
    few = [replace(one, weight=0.05) for one in rows]
    for objective in ("kto", "bco", "dpo", "mixed"):
        used = []
        for taught in (few, [*few[:32], *rows[32:]]):
            start = copy_weights(fresh)
            used.append(train(fresh, tokenizer.hf, taught, TrainingConfig(objective=objective, max_steps=1), 0, quiet))
            restore_weights(fresh, start)
        if objective == "dpo":
            assert used[0].rows < used[1].rows < 32
        else:
            assert abs(used[0].train_loss) < abs(used[1].train_loss)


def read_by(model, tokenizer, rows, settings: TrainingConfig, monkeypatch) -> list[list[int]]:
    """The rows that reach the loss of a run, batch by batch."""
    number = {(*row.prompt_ids, *row.completion_ids): place for place, row in enumerate(rows)}
    batches: list[list[int]] = []

    def watched(real):
        def compute_loss(self, model, inputs, *given, **named):
            ids = [
                tuple(row[mask.bool()].tolist())
                for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
            batches.append([number[one] for one in ids if one in number])
            return real(self, model, inputs, *given, **named)

        return compute_loss

    for trainer in (TokenKTOTrainer, TokenBCOTrainer, TokenDPOTrainer, WeightedTrainer):
        monkeypatch.setattr(trainer, "compute_loss", watched(trainer.compute_loss))
    train(model, tokenizer.hf, rows, settings, 0, quiet)
    monkeypatch.undo()
    return batches


def different(tokenizer, count: int) -> list[Experience]:
    """Rows of which each objective can use each, no two of them alike."""
    return [
        Experience(
            *(str(number), str(number)),
            tuple(tokenizer.prompt_ids([{"role": "user", "content": f"hello {number}"}])),
            tuple(tokenizer.completion_ids(f"Hey {number}!")),
            (-1.0,) * len(tokenizer.completion_ids(f"Hey {number}!")),
            *(1.0, ()),
            advantage=1.0,
            rejected_ids=tuple(tokenizer.completion_ids("No.")),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [18, 24, 31, 47])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_row_is_read_in_every_epoch(fresh, tokenizer, objective, count, monkeypatch):
    """KTO left out `count mod batch` rows, the same ones each time, and compared each answer with the same neighbour."""
    rows = different(tokenizer, count)
    batches = read_by(fresh, tokenizer, rows, TrainingConfig(objective=objective, epochs=2), monkeypatch)
    assert {len(batch) for batch in batches} == {16}, "no step is made of a few rows alone"
    seen = [row for batch in batches for row in batch]
    assert set(seen) == set(range(count))
    assert {seen.count(row) for row in range(count)} <= {2, 3}


def test_kto_compares_each_answer_with_another_one_in_each_epoch(fresh, tokenizer, monkeypatch):
    rows = different(tokenizer, 32)
    batches = read_by(fresh, tokenizer, rows, TrainingConfig(epochs=3), monkeypatch)
    before = [{batch[place - 1]: batch[place] for place in range(16)} for batch in batches]
    epochs = [before[start] | before[start + 1] for start in (0, 2, 4)]
    for one, other in pairwise(epochs):
        assert sum(one[row] == other[row] for row in range(32)) < 8, "by chance it is one"


def test_what_a_run_does_not_read_is_not_said_to_be_learned(tokenizer):
    rows = different(tokenizer, 40)
    few = TrainingConfig(max_steps=2, batch_size=16)
    learned, dropped = select_for_training(rows, few, seed=0)
    assert learned == rows[-32:], "the newest"
    assert dropped == {"more than 32 answers (training.max_steps times training.batch_size)": 8}
    assert select_for_training(rows, TrainingConfig(), seed=0) == (rows, {}), "the control"
    plain = [replace(row, rejected_ids=None) for row in rows[:5]]
    pairs = TrainingConfig(objective="dpo")
    assert select_for_training([*plain, *rows[5:]], pairs, seed=0) == (
        rows[5:],
        {"not usable with training.objective 'dpo'": 5},
    )
    light = [replace(row, weight=0.5) for row in rows]
    for seed in range(8):
        learned, dropped = select_for_training(light, pairs, seed)
        assert (len(learned), sum(dropped.values())) == (20, 20), "chance says which, not how many"


def bco_losses(seen: list[list[tuple[float, float]]], decay: float, is_shifted: bool = True) -> list[float]:
    """The losses of steps, written by hand, from the reward and the weight of each answer (below zero: disliked)."""
    found = []
    for step in range(len(seen)):
        means = []
        for sign in (1, -1):
            rows = [
                (decay ** (step - then) * abs(weight), reward)
                for then in range(step + 1)
                for reward, weight in seen[then]
                if weight * sign > 0
            ]
            means.append(sum(weight * reward for weight, reward in rows) / sum(weight for weight, _ in rows))
        shift = sum(means) / 2 if is_shifted else 0.0
        terms = [
            abs(weight) * math.log1p(math.exp(shift - reward if weight > 0 else reward - shift))
            for reward, weight in seen[step]
        ]
        found.append(sum(terms) / len(terms))
    return found


def test_bco_is_a_classifier_between_the_mean_rewards_of_both_classes(fresh, tokenizer, monkeypatch):
    rows = [
        replace(one, weight=1 / (1 + number % 3), advantage=1.5 if one.advantage > 0 else -0.5)
        for number, one in enumerate(lessons(fresh, tokenizer, 16))
    ]
    texts = [(one.prompt_ids, one.completion_ids) for one in rows]
    base = [sum(one.logprobs) for one in rows]
    noise = torch.Generator().manual_seed(0)
    for name, value in fresh.named_parameters():  # it goes on from a policy that has left its base
        if "lora_B" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=noise)
    config, seen, real = TrainingConfig(objective="bco", max_steps=3), [], TokenBCOTrainer.compute_loss

    def watched(self, model, *given, **named):
        rewards = [
            config.beta * (float(row.sum()) - was) for row, was in zip(batched_logprobs(fresh, texts), base, strict=True)
        ]
        seen.append([(reward, one.weight * one.advantage) for reward, one in zip(rewards, rows, strict=True)])
        return real(self, model, *given, **named)

    monkeypatch.setattr(TokenBCOTrainer, "compute_loss", watched)
    figures = train(fresh, tokenizer.hf, rows, config, 0, quiet)
    assert figures.loss == pytest.approx(bco_losses(seen, SHIFT_DECAY), abs=1e-4)
    for control in (bco_losses(seen, SHIFT_DECAY, is_shifted=False), bco_losses(seen, decay=0.0)):  # the last batch's means
        assert abs(figures.loss[-1] - control[-1]) > 2e-3


def losses(term: str, shift: float, advantage: float = 1.0, anchor: float = 0.0) -> torch.Tensor:
    """The losses of a term for two answers of three tokens, whose log-probabilities are `shift` above the base's."""
    reference = torch.full((2, 3), -1.0)
    inputs = {"reference": reference, "behaviour": reference}
    inputs |= {"advantage": torch.tensor([advantage] * 2), "weight": torch.tensor([1.0, 0.5])}
    inputs["term"] = torch.tensor([TERMS.index(term)] * 2)
    settings = TrainingConfig(anchor=anchor)
    return row_losses(reference + torch.tensor([[shift], [0.0]]), torch.ones(2, 3), inputs, settings, 3.0)


def test_the_terms_are_what_they_are_called():
    assert losses("imitate", 0.0).tolist() == pytest.approx([1.0, 0.5])
    assert losses("reinforce", 0.0, advantage=-2.0).tolist() == pytest.approx([-2.0, -1.0])
    assert losses("reinforce", 5.0)[0] == pytest.approx(-CUT * 4.0), "importance weights are cut"
    assert losses("prospect", -100.0, advantage=-1.0)[0] == pytest.approx(-1.0), "a disliked answer is pushed only so far"
    assert losses("prefer", 0.0)[0] == pytest.approx(math.log(2) + 1.0)
    assert losses("prefer", 1.0)[0] < math.log(2), "and less where the preferred one is ahead"


def test_the_anchor_pulls_back_from_both_sides():
    for term in TERMS:
        for shift in (-0.5, 0.5):
            assert losses(term, shift, anchor=1.0)[0] > losses(term, shift)[0]
        assert losses(term, 0.0, anchor=1.0)[0] == losses(term, 0.0)[0]


def spread(lengths: list[torch.Tensor]) -> float:
    """How far lengths lie apart inside a batch, as a share of how far all of them do."""
    return float(torch.stack([batch.std() for batch in lengths]).mean() / torch.cat(lengths).std())


def test_a_batch_holds_prompts_of_like_length_and_answers_of_any(fresh, tokenizer):
    """What an answer's length is must not move a step: batches of short answers make random reactions shorten them."""
    rng = random.Random(0)
    lengths = [(rng.randint(4, 60), rng.randint(4, 60)) for _ in range(256)]
    rows = [Experience("", "", (3,) * own, (4,) * other, None, 1.0, (), advantage=1.0) for own, other in lengths]
    config = TrainingConfig(objective="sft")
    order = draw_batches(len(rows), 16, 16, random.Random(0))
    common = make_training_arguments(config, 16, len(rows), seed=0) | {"max_steps": 16}
    trainer = make_weighted_trainer(fresh, tokenizer.hf, rows, order, config, common)
    labels = [batch["labels"] for batch in trainer.get_train_dataloader()]
    assert sum(len(batch) for batch in labels) == len(rows)
    prompts = [(batch != -100).int().argmax(1).float() for batch in labels]
    answers = [(batch != -100).sum(1).float() for batch in labels]
    assert spread(prompts) < 0.6
    assert spread(answers) > 0.85


def test_a_run_that_does_harm_is_stopped_where_the_policy_was_last_well(fresh, tokenizer):
    rows = lessons(fresh, tokenizer, 16)
    health = iter([Health(liked, 0.1, 16, 16) for liked in (-1.0, -0.9, -3.0)])
    seen = []

    def measure() -> Health:
        seen.append(margin(fresh, rows))
        return next(health)

    guard = Guard(measure, Limits(kl=0.5, well_formed=0.95))
    figures = train(fresh, tokenizer.hf, rows, TrainingConfig(objective="pg", max_steps=6, epochs=50), 0, quiet, [guard])
    assert figures.steps == 4
    assert "lost 2.00 nats" in str(guard.stopped)
    assert guard.kept == 2
    assert margin(fresh, rows) == pytest.approx(seen[1], abs=1e-4), "as it was at the last good check"
    assert seen[2] != pytest.approx(seen[1], abs=1e-3), "the control: it had gone on from there"


@given(st.integers(1, 1000))
def test_the_guard_looks_at_a_run_a_few_times_and_always_at_its_end(steps):
    assert max(choose_check_steps(steps)) == steps
    assert min(choose_check_steps(steps)) >= 1
    assert len(choose_check_steps(steps)) == (CHECKS if steps >= 2 * CHECKS else 1)


@pytest.mark.parametrize(
    ("now", "word"),
    [
        (Health(-1.0, 0.6, 16, 16), "KL"),
        (Health(-1.2, 0.1, 16, 16), "liked"),
        (Health(-1.0, 0.1, 8, 16), "well-formed"),
        (Health(-1.0, 0.1, 13, 16), "well-formed"),
        (Health(float("nan"), 0.1, 16, 16), "liked"),
        (Health(-1.1, 0.4, 16, 16), None),
        (Health(None, 0.4, 16, 16), None),
        (Health(-1.0, 0.1, 15, 16), None),  # one of sixteen is luck
        (Health(-1.2, 0.1, 16, 16, liked_error=0.1), None),  # and so is what a few liked answers lost
        (Health(-1.4, 0.1, 16, 16, liked_error=0.1), "liked"),
    ],
)
def test_the_guard_names_what_is_wrong(now, word):
    guard = Guard(lambda: now, Limits(kl=0.5, well_formed=0.95))
    fault = guard.find_fault(Health(-1.0, 0.0, 16, 16), now)
    assert fault is None if word is None else word in fault


@pytest.mark.parametrize(("now", "is_fault"), [(9, False), (4, True)])
def test_a_policy_that_never_answered_well_is_held_to_its_own_start(now, is_fault):
    guard = Guard(lambda: Health(-1.0, 0.1, now, 16), Limits(kl=0.5, well_formed=0.95))
    fault = guard.find_fault(Health(-1.0, 0.0, 12, 16), Health(-1.0, 0.1, now, 16))
    assert (fault is not None) == is_fault
    assert guard.find_fault(Health(-1.0, 0.0, 16, 16), Health(-1.0, 0.1, now, 16)), "the control: one that did"


def test_what_did_harm_from_the_first_check_on_stays_to_be_measured(fresh, tokenizer):
    rows = lessons(fresh, tokenizer, 16)
    health = iter([Health(liked, 0.1, 16, 16) for liked in (-1.0, -3.0)])
    start = margin(fresh, rows)
    guard = Guard(lambda: next(health), Limits(kl=0.5, well_formed=0.95))
    figures = train(fresh, tokenizer.hf, rows, TrainingConfig(objective="pg", max_steps=6, epochs=50), 0, quiet, [guard])
    assert (figures.steps, guard.kept) == (2, 0)
    assert margin(fresh, rows) != pytest.approx(start, abs=1e-3)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40))), st.integers(1, 200))
def test_batches_hold_all_rows_in_order_and_no_more_tokens_than_they_may(lengths, tokens):
    rows = [([0] * prompt, [0] * completion) for prompt, completion in lengths]
    found = list(split_batches(rows, tokens))
    assert [row for batch in found for row in batch] == rows
    for batch in found:
        assert batch
        assert len(batch) == 1 or len(batch) * max(len(prompt) + len(completion) for prompt, completion in batch) <= tokens
    for batch, after in pairwise(found):  # none is smaller than it must be
        together = [*batch, after[0]]
        assert len(together) * max(len(prompt) + len(completion) for prompt, completion in together) > tokens


def test_a_loss_that_is_no_number_is_an_error_for_people(fresh, tokenizer):
    parameter = next(parameter for name, parameter in fresh.named_parameters() if "lora_B" in name)
    parameter.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"NaN; lower training\.learning_rate"):
        train(fresh, tokenizer.hf, lessons(fresh, tokenizer, 8), TrainingConfig(objective="sft"), 0, quiet)


def trained(model, tokenizer, room: int, monkeypatch, objective: str) -> tuple[list[str], torch.Tensor]:
    """What a run says, and where it moves the weights, where so many bytes are free."""
    monkeypatch.setattr(batching, "find_usable_memory", lambda: room)
    start, said = copy_weights(model), []
    settings = TrainingConfig(objective=objective, max_steps=3, batch_size=16)
    train(model, tokenizer.hf, lessons(model, tokenizer), settings, 0, lambda *row: said.append(row[0]))
    moved = torch.cat([(value - start[name]).flatten() for name, value in copy_weights(model).items()])
    restore_weights(model, start)
    return said, moved


@pytest.mark.parametrize("objective", ["kto", "bco", "dpo", "pg"])
def test_a_batch_that_is_read_in_parts_moves_the_weights_the_same_way(fresh, tokenizer, monkeypatch, objective):
    said, whole = trained(fresh, tokenizer, 2**36, monkeypatch, objective)
    assert not [line for line in said if "memory" in line]
    said, parts = trained(fresh, tokenizer, 2**20, monkeypatch, objective)
    assert "memory: 4 answers at once, 4 times a step, with gradient checkpointing" in said
    assert torch.nn.functional.cosine_similarity(whole, parts, dim=0) > 0.9
    assert 0.8 < parts.norm() / whole.norm() < 1.25


def test_out_of_memory_the_batch_is_halved_and_the_run_goes_on(fresh, tokenizer, monkeypatch):
    real, said, sizes = objectives.make_weighted_trainer, [], []

    def short_of_memory(*arguments):
        trainer = real(*arguments)
        sizes.append(trainer.args.per_device_train_batch_size)
        if sizes[-1] > 4:
            monkeypatch.setattr(trainer, "training_step", out_of_memory)
        return trainer

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(objectives, "make_weighted_trainer", short_of_memory)
    settings = TrainingConfig(objective="pg", max_steps=2)
    figures = train(fresh, tokenizer.hf, lessons(fresh, tokenizer, 16), settings, 0, lambda *row: said.append(row[0]))
    assert sizes == [16, 8, 4]
    assert figures.steps == 2
    assert "out of memory; going on with 8 answers at a time" in said


def test_what_liked_answers_may_lose_grows_as_the_temperature_falls():
    first, now = Health(-1.0, 0.1, 16, 16), Health(-1.2, 0.1, 16, 16)
    warm, cool = (Limits(kl=0.5, well_formed=0.95, temperature=temperature) for temperature in (1.0, 0.7))
    assert "liked answers lost 0.20" in Guard(lambda: now, warm).find_fault(first, now)
    assert Guard(lambda: now, cool).find_fault(first, now) is None


def test_the_tokens_of_answers_alone_are_scored(fresh, tokenizer, monkeypatch):
    rows = lessons(fresh, tokenizer, 16)
    scored: list[int] = []

    class Counted:
        @staticmethod
        def apply(hidden, *rest):
            scored.append(len(hidden))
            return theirs.apply(hidden, *rest)

    theirs = trl.trainer.utils._ChunkedLogProbFunction
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Counted)
    losses = []
    for scores_prompts in (False, True):
        if scores_prompts:  # the control
            monkeypatch.setattr(objectives, "scoring_answers_alone", contextlib.nullcontext)
        scored.clear()
        start = copy_weights(fresh)
        losses.append(train(fresh, tokenizer.hf, rows, TrainingConfig(max_steps=1), 0, quiet).loss)
        restore_weights(fresh, start)
        answers = sum(len(row.completion_ids) for row in rows)
        assert (max(scored) > 2 * answers) if scores_prompts else (set(scored) == {answers})
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
