"""The probe of a version: places at which the server must hold the same tokens likely as the trainer does.

It is made of answers to prompts that are nobody's words: it stays with the version, whoever is forgotten. It knows no
server: `learning.deployment` asks the questions.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bot.tokenizer import ChatTokenizer
from learning.evaluation import generate

if TYPE_CHECKING:
    import torch

    from learning.model import Model

PROMPTS = ("hello", "good night", "what should i eat?", "tell me something about yourself")
FILE = "probe.json"
LONGEST = 512  # tokens of prompt and answer
PROBED = 16  # tokens of an answer, in steps of four
TOP = 8  # likeliest next tokens


def prefixes(model: "Model", tokenizer: ChatTokenizer, max_tokens: int, seed: int) -> list[list[int]]:
    """Token ids up to places inside a model's answers."""
    prompts = [tokenizer.prompt_ids([{"role": "user", "content": text}]) for text in PROMPTS]
    samples = generate(model, tokenizer, prompts, max_tokens, seed)
    return [
        [*sample.prompt_ids, *sample.completion_ids[:cut]]
        for sample in samples
        if len(sample.prompt_ids) + len(sample.completion_ids) <= LONGEST
        for cut in range(0, min(len(sample.completion_ids), PROBED), 4)
    ]


def write(
    directory: Path,
    places: Sequence[Sequence[int]],
    candidate: Sequence["torch.Tensor"],
    parent: Sequence["torch.Tensor"],
) -> None:
    """Save what a candidate holds the likeliest next tokens to be at each place, and what its parent holds of the same ones
    (log-probabilities of the vocabulary, nats).
    """
    rows = []
    for place, own, other in zip(places, candidate, parent, strict=True):
        tokens = own.topk(TOP).indices
        values = {"candidate": own[tokens].tolist(), "parent": other[tokens].tolist()}
        rows.append({"prompt_ids": [*place], "tokens": tokens.tolist(), **values})
    (directory / FILE).write_text(json.dumps(rows))
