"""Generation: sample answers in a batch that gets smaller as answers end.

Most answers are much shorter than the longest one, and transformers would go on computing all rows until that one ends.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

from learning.models.prefix import has_full_attention

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

FEW = 8  # rows; fewer take about as long as one
ENDED = 0.25  # share of rows that have ended before the others go on alone: to begin again costs as much as some steps


class EnoughEnded(StoppingCriteria):
    """Stops generation once enough rows have one of the tokens `ends` behind their first `width` tokens."""

    def __init__(self, width: int, ends: torch.Tensor):
        self.width, self.ends = width, ends

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return for each row (n,) whether to stop: all rows or none."""
        ended = torch.isin(input_ids[:, self.width :], self.ends).any(1)
        return (ended.sum() >= ENDED * len(ended)).expand(len(ended))


def generate_rows(
    model: "PreTrainedModel",
    ids: torch.Tensor,
    mask: torch.Tensor,
    past: "Cache | None",
    max_tokens: int,
    settings: dict[str, Any],
) -> Sequence[Sequence[int]]:
    """Return the tokens that a model adds to each row of `ids` (n × length), at most `max_tokens`, padded behind the end.

    `past` holds what the model knows of the first tokens. `settings` are further arguments of `generate`. Whenever a
    share ENDED of the rows has ended, the others go on alone, unless the model keeps more of a row than keys and values.
    """
    found: list[list[int]] = [[] for _ in ids]
    rows, ends = torch.arange(len(ids)), torch.tensor(settings["eos_token_id"], device=ids.device)
    can_shrink = has_full_attention(model.config.get_text_config())
    while len(rows) and max_tokens:
        width = ids.shape[1]
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=past,
            max_new_tokens=max_tokens,
            stopping_criteria=[EnoughEnded(width, ends)] if can_shrink and len(rows) > FEW else [],
            return_dict_in_generate=True,
            **settings,
        )
        added, past = out.sequences[:, width:], out.past_key_values
        for row, tokens in zip(rows.tolist(), added.tolist(), strict=True):
            found[row] += tokens
        max_tokens -= added.shape[1]
        left = (~torch.isin(added, ends).any(1)).nonzero()[:, 0]
        rows, ids = rows[left.cpu()], out.sequences[left]
        mask = torch.cat([mask, torch.ones_like(added)], 1)[left]
        if len(rows) and max_tokens:
            past.batch_select_indices(left)
    return found
