"""Evaluation: what is measured of a policy with transformers, in the training process, and intervals of what was measured.

Log-probabilities of answers, KL to the base, sampled answers. What follows from it is the question of
`learning.judging.gate`, and whether vLLM serves the same policy that of the probe. It knows no database and no server.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bot.models.sampling import PLAIN_SAMPLING
from bot.models.tokenizer import ChatTokenizer
from learning.models.trainable import as_base, as_served

if TYPE_CHECKING:
    import torch

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
BATCH_TOKENS = 2048  # of one forward pass
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None}


@dataclass(frozen=True)
class Sample:
    """One answer that a model gave to a prompt, as token ids and as text."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    text: str
    is_finished: bool

    @property
    def is_well_formed(self) -> bool:
        """Whether the answer ended by itself and reads as text."""
        return self.is_finished and is_well_formed(self.text)


@dataclass(frozen=True)
class Manner:
    """What answers are like: their mean number of words, the share that ended by themselves and that is well-formed."""

    words: float
    ended: float
    well_formed: float


def summarize_samples(samples: Sequence[Sample]) -> Manner:
    """Return what answers are like."""
    return Manner(
        words=float(np.mean([len(one.text.split()) for one in samples])),
        ended=float(np.mean([one.is_finished for one in samples])),
        well_formed=float(np.mean([one.is_well_formed for one in samples])),
    )


def is_well_formed(text: str) -> bool:
    """Whether `text` reads as text: not empty, no broken characters, no loop of the same four words."""
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
    """The (prompt ids, completion ids) row of each answer."""
    return [(one.prompt_ids, one.completion_ids) for one in answers]


def answer_logprobs(model: Any, rows: Rows) -> list["torch.Tensor"]:
    """The log-probability (nats) of each completion token of each (prompt ids, completion ids) row, one row at a time.

    At the model's own temperature. One row at a time, so that padding cannot change a figure.
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
    """The rows (prompt ids, completion ids) in order, in batches of no more than `tokens` when padded, or of one row."""
    start, longest = 0, 0
    for end, (prompt, completion) in enumerate(rows):
        longest = max(longest, len(prompt) + len(completion))
        if end > start and (end - start + 1) * longest > tokens:
            yield rows[start:end]
            start, longest = end, len(prompt) + len(completion)
    if len(rows) > start:
        yield rows[start:]


def pad_batch(batch: Rows, device: Any, pad: int = 0) -> dict[str, "torch.Tensor"]:
    """The rows as a model takes them: `input_ids` and `attention_mask` (n × the longest)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor([*prompt, *completion], device=device) for prompt, completion in batch]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return {"input_ids": pad_sequence(ids, batch_first=True, padding_value=pad), "attention_mask": mask}


def batched_logprobs(model: Any, rows: Rows) -> list["torch.Tensor"]:
    """As `answer_logprobs`, in padded batches: faster, and the same but for rounding."""
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
    """The logits (tokens × vocabulary) that each row's completion tokens were drawn from."""
    import torch

    inputs = pad_batch(batch, model.device)
    first = min(len(prompt) for prompt, _ in batch) - 1  # what comes before needs no logits
    kept = torch.arange(first, inputs["input_ids"].shape[1], device=model.device)
    logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    return [
        row[len(prompt) - 1 - first : len(prompt) + len(completion) - 1 - first]
        for row, (prompt, completion) in zip(logits, batch, strict=True)
    ]


def next_logprobs(model: Any, prefixes: Sequence[Sequence[int]]) -> list["torch.Tensor"]:
    """The log-probabilities (vocabulary,) of the token after each prefix, without padding.

    Prefixes that begin a longer one are read with it, once.
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
    """exp of the mean negative log-probability of all tokens of answers, as `answer_logprobs` gives them."""
    return float(np.exp(-np.concatenate(logprobs).mean()))


def kl_to_base(model: Any, samples: Sequence[Sample]) -> float:
    """KL(policy || base) for each token (nats) of a model in training, along the policy's own samples.

    At each place the two distributions of the next token are compared whole, which is never below zero and far steadier than
    the log-ratio of the sampled tokens alone (Amini et al., 2025, "Better Estimation of the KL Divergence Between Language
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


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Inside, what is sampled does not change what is drawn after it."""
    import torch

    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def pad_id(tokenizer: Any) -> int:
    """The token id that a transformers tokenizer pads with."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def generate(
    model: Any,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    seed: int,
    truncation: Mapping[str, float] | None = None,
    greedy: bool = False,
    batch_size: int | None = None,
) -> list[Sample]:
    """Sample one answer to each prompt, in batches padded on the left.

    At the model's own temperature, which `learning.models.trainable` puts into its logits; `truncation`
    (`PolicyConfig.truncation`) cuts unlikely tokens away.
    """
    import torch

    from learning.models.batching import count_samples_at_once

    torch.manual_seed(seed)
    ends, pad = tokenizer.end_ids, pad_id(tokenizer.hf)
    samples: dict[int, Sample] = {}
    model.eval()
    batch_size = batch_size or count_samples_at_once(model, max(map(len, prompts), default=0) + max_tokens)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # so that little of a batch is padding
    for start in range(0, len(prompts), batch_size):
        rows = order[start : start + batch_size]
        batch = [prompts[row] for row in rows]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(row)) + [*row] for row in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        sampling = {"do_sample": True, **PLAIN_SAMPLING, **(truncation or {})}
        with torch.no_grad(), as_served(model):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                pad_token_id=pad,
                eos_token_id=sorted(ends),
                **(GREEDY if greedy else sampling),
            )
        for row, prompt, said in zip(rows, batch, out[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(said, 1) if token in ends), None)
            text = tokenizer.decode_answer(said[:end])
            samples[row] = Sample(tuple(prompt), tuple(said[:end]), text, is_finished=end is not None)
    return [samples[row] for row in range(len(prompts))]


def means(rows: Sequence["torch.Tensor"]) -> list[float]:
    """Return the mean of each row."""
    return [float(row.mean()) for row in rows]
