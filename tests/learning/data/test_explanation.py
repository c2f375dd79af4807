"""An explanation tells how an answer was chosen, or why it was not."""

import pytest
from conftest import answered, react

from bot.config import load
from bot.types import Candidate, Selection
from learning.data.explanation import explain
from learning.data.replay_buffer import ReplayBuffer

CANDIDATES = [Candidate(text="Hi"), Candidate(text="Hey there!", score=1.2, chance=0.7)]
MOVED = {"questions": 0.1, "length": 0.41, "emoji": -0.5, "lists": -0.2}


@pytest.mark.parametrize(
    ("selection", "wanted"),
    [
        (
            Selection(head="head-3", chosen=1, candidates=CANDIDATES, moved=MOVED),
            [
                "chosen from 2 answers by head-3, with chance 0.70",
                "against the mean of these answers (log odds): emoji -0.50, length +0.41, lists -0.20",
            ],
        ),
        (
            Selection(head="head-3", chosen=0, candidates=CANDIDATES),
            ["chosen from 2 answers by head-3, with chance 0.00"],
        ),
        (
            Selection(is_plain=True),
            ["a plain sample: drawn without a choice, for comparison with chosen answers"],
        ),
        (Selection(why="the head is too young"), ["not chosen from several answers: the head is too young"]),
        (None, []),
    ],
)
def test_why_tells_how_an_answer_was_chosen(store, registry, tokenizer, selection, wanted):
    turn = answered(store, tokenizer, "hello", "Hey there!", selection=selection)
    react(store, turn, approves=True)
    account = explain(turn.id, ReplayBuffer(store, tokenizer, load()), registry)
    for lines in (account.lines(), account.lines_without_names()):
        said = [line for line in lines if "chos" in line or "plain sample" in line or "log odds" in line]
        assert said == wanted
