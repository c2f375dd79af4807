"""Evaluation: measure a policy with transformers, in the training process.

It computes log-probabilities of answers and the KL to the base, and samples answers. `learning.judging.gate` draws the
conclusions. The probe checks that vLLM serves the same policy. It does not depend on a database or a server.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bot.models.tokenizer import ChatTokenizer
from bot.types import SamplingParams
from learning.models.trainable import as_base, as_served

if TYPE_CHECKING:
    import torch

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
BATCH_TOKENS = 2048  # padded tokens in one forward pass
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None}
UNTRUNCATED = SamplingParams()


@dataclass(frozen=True)
class Sample:
    """One answer of a model to a prompt, as token ids and as text."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    text: str
    is_finished: bool

    @property
    def is_well_formed(self) -> bool:
        """Whether the answer ended by itself and is well-formed text."""
        return self.is_finished and is_well_formed(self.text)


@dataclass(frozen=True)
class Manner:
    """Style of some answers: the mean number of words, the share that ended by themselves, the share that is well-formed."""

    words: float
    ended: float
    well_formed: float


def summarize_samples(samples: Sequence[Sample]) -> Manner:
    """Return the mean length of answers, and the shares that ended and are well-formed."""
    return Manner(
        words=float(np.mean([len(one.text.split()) for one in samples])),
        ended=float(np.mean([one.is_finished for one in samples])),
        well_formed=float(np.mean([one.is_well_formed for one in samples])),
    )


def is_well_formed(text: str) -> bool:
    """Whether `text` is not empty and has no broken characters and no four words that are repeated three times."""
    if not text.strip() or "\ufffd" in text or "<|" in text:
        return False
    words = re.findall(r"\S+", text)
    grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    return not grams or max(grams.values()) < 3


class TokenizedAnswer(Protocol):
    """An answer and its prompt, as token ids: an Experience, a Sample."""

    @property
    def prompt_ids(self) -> tuple[int, ...]: ...

    @property
    def completion_ids(self) -> tuple[int, ...]: ...


def token_rows(answers: Sequence[TokenizedAnswer]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the (prompt ids, completion ids) row of each answer."""
    return [(one.prompt_ids, one.completion_ids) for one in answers]


def answer_logprobs(model: Any, rows: Rows) -> list["torch.Tensor"]:
    """Return the log-probability (nats) of each completion token of each (prompt ids, completion ids) row.

    The model's own temperature applies. Rows are read one at a time, so that padding cannot change a figure.
    """
    import torch

    found = []
    model.eval()
    with torch.no_grad(), as_served(model):
        for prompt, completion in rows:
            ids = torch.tensor([[*prompt, *completion]], device=model.device)
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
            logprobs = logits.log_softmax(-1)
            found.append(logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu())
    return found


def split_batches(rows: Rows, tokens: int = BATCH_TOKENS) -> Iterator[Rows]:
    """Yield the (prompt ids, completion ids) rows in order, in batches of at most `tokens` when padded, or of one row."""
    start, longest = 0, 0
    for end, (prompt, completion) in enumerate(rows):
        longest = max(longest, len(prompt) + len(completion))
        if end > start and (end - start + 1) * longest > tokens:
            yield rows[start:end]
            start, longest = end, len(prompt) + len(completion)
    if len(rows) > start:
        yield rows[start:]


def pad_batch(batch: Rows, device: Any, pad: int = 0) -> dict[str, "torch.Tensor"]:
    """Return the inputs of a model for some rows: `input_ids` and `attention_mask` (n × the longest)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor([*prompt, *completion], device=device) for prompt, completion in batch]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return {"input_ids": pad_sequence(ids, batch_first=True, padding_value=pad), "attention_mask": mask}


def batched_logprobs(model: Any, rows: Rows) -> list["torch.Tensor"]:
    """Return the same as `answer_logprobs`, except for rounding; padded batches make it faster."""
    import torch

    found: list[torch.Tensor] = []
    model.eval()
    with torch.no_grad(), as_served(model):
        for batch in split_batches(rows):
            for (_, completion), scores in zip(batch, _answer_logits(model, batch), strict=True):
                ids = torch.tensor([*completion], device=scores.device)
                found.append(scores.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0].cpu())
    return found


def _answer_logits(model: Any, batch: Rows) -> list["torch.Tensor"]:
    """Return the logits (tokens × vocabulary) that each row's completion tokens were drawn from."""
    import torch

    inputs = pad_batch(batch, model.device)
    first = min(len(prompt) for prompt, _ in batch) - 1  # earlier positions need no logits
    kept = torch.arange(first, inputs["input_ids"].shape[1], device=model.device)
    logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    return [
        row[len(prompt) - 1 - first : len(prompt) + len(completion) - 1 - first]
        for row, (prompt, completion) in zip(logits, batch, strict=True)
    ]


def next_logprobs(model: Any, prefixes: Sequence[Sequence[int]]) -> list["torch.Tensor"]:
    """Return the log-probabilities (vocabulary,) of the token after each prefix, without padding.

    A prefix that begins a longer one is read together with it.
    """
    import torch

    model.eval()
    found: dict[tuple[int, ...], torch.Tensor] = {}
    wanted = {tuple(prefix) for prefix in prefixes}
    with torch.no_grad(), as_served(model):
        for longest in sorted(wanted, key=len, reverse=True):
            if longest in found:
                continue
            begun = [prefix for prefix in wanted if prefix == longest[: len(prefix)] and prefix not in found]
            places = torch.tensor([len(prefix) - 1 for prefix in begun], device=model.device)
            logits = model(input_ids=torch.tensor([longest], device=model.device)).logits[0, places]
            found.update(zip(begun, logits.float().log_softmax(-1).cpu(), strict=True))
    return [found[tuple(prefix)] for prefix in prefixes]


def perplexity(logprobs: Sequence["torch.Tensor"]) -> float:
    """Return exp of the mean negative log-probability over all tokens of answers, as `answer_logprobs` returns them."""
    return float(np.exp(-np.concatenate(logprobs).mean()))


def kl_to_base(model: Any, samples: Sequence[Sample]) -> float:
    """Return KL(policy || base) per token (nats) of a model in training, along the policy's own samples.

    At each position it compares the whole distributions of the next token. That is never below zero and varies far less
    than the log-ratio of the sampled tokens (Amini et al., 2025, "Better Estimation of the KL Divergence Between Language
    Models", arXiv:2504.10637).
    """
    import torch

    total, tokens = 0.0, 0
    model.eval()
    with torch.no_grad(), as_served(model):
        for batch in split_batches(token_rows(samples)):
            own = _answer_logits(model, batch)
            with as_base(model):
                base = _answer_logits(model, batch)
            for mine, other in zip(own, base, strict=True):
                logps = mine.float().log_softmax(-1)
                total += float((logps.exp() * (logps - other.float().log_softmax(-1))).sum())
                tokens += len(mine)
    return total / max(tokens, 1)


def pad_id(tokenizer: Any) -> int:
    """Return the token id that a transformers tokenizer pads with."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def generate(
    model: Any,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    seed: int,
    truncation: SamplingParams = UNTRUNCATED,
    batch_size: int | None = None,
) -> list[Sample]:
    """Sample one answer to each prompt, in batches. Rows are padded before what differs between them.

    The model's own temperature applies, which `learning.models.trainable` puts into its logits. `truncation`
    (`PolicyConfig.truncation`) cuts unlikely tokens.
    """
    import torch

    torch.manual_seed(seed)
    kept = {"top_p": truncation.top_p, "top_k": truncation.top_k, "min_p": truncation.min_p}
    choice = {"do_sample": True, "temperature": 1.0, **kept}
    return _generate(model, tokenizer, prompts, max_tokens, choice, batch_size)


def generate_greedily(
    model: Any, tokenizer: ChatTokenizer, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[Sample]:
    """Return the answer of the likeliest tokens to each prompt."""
    return _generate(model, tokenizer, prompts, max_tokens, GREEDY)


def _generate(
    model: Any,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    choice: dict[str, Any],
    batch_size: int | None = None,
) -> list[Sample]:
    """Return one answer to each prompt. `choice` tells transformers how to choose its tokens."""
    import torch

    from learning.models.batching import count_samples_at_once
    from learning.models.generation import generate_rows
    from learning.models.prefix import read_prefix

    ends, pad = tokenizer.end_ids, pad_id(tokenizer.hf)
    samples: dict[int, Sample] = {}
    model.eval()
    batch_size = batch_size or count_samples_at_once(model, max(map(len, prompts), default=0) + max_tokens)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # so that little of a batch is padding
    for start in range(0, len(prompts), batch_size):
        rows = order[start : start + batch_size]
        batch = [prompts[row] for row in rows]
        width = max(map(len, batch))
        with torch.no_grad(), as_served(model):
            past, common = read_prefix(model, batch)
            padded = [(row[:common], [pad] * (width - len(row)), row[common:]) for row in batch]
            ids = torch.tensor([[*first, *gap, *rest] for first, gap, rest in padded], device=model.device)
            mask = torch.tensor([[1] * common + [0] * len(gap) + [1] * len(rest) for _, gap, rest in padded])
            settings = {"pad_token_id": pad, "eos_token_id": sorted(ends), **choice}
            found = generate_rows(model, ids, mask.to(model.device), past, max_tokens, settings)
        for row, prompt, said in zip(rows, batch, found, strict=True):
            end = next((place for place, token in enumerate(said, 1) if token in ends), None)
            text = tokenizer.decode_answer(said[:end])
            samples[row] = Sample(tuple(prompt), tuple(said[:end]), text, is_finished=end is not None)
    return [samples[row] for row in range(len(prompts))]


def means(rows: Sequence["torch.Tensor"]) -> list[float]:
    """Return the mean of each row."""
    return [float(row.mean()) for row in rows]
