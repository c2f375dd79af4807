"""Prefix: what all rows of a batch begin with is read once.

The persona and examples of a chat template begin every prompt; of the built-in model's they are two thirds of all tokens.
Keys and values of a common beginning are computed for one row and shared by all, and gradients flow through them: the
tokens, the positions and the loss are the same, a step is cheaper. It knows no objective.
"""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LEAST = 16  # tokens that are worth a second pass
KNOWN = {"input_ids", "attention_mask", "use_cache"}  # what a batch may be given with; anything else is read row by row


def share_prefixes(model: "PreTrainedModel") -> None:
    """Have a model read what the rows of a batch have in common once, where it is not asked for a cache.

    Where some layers do not see all that came before (sliding windows, states), or positions depend on what follows, nothing
    changes.
    """
    import torch

    if not _has_full_attention(model.config.get_text_config()):
        return
    decoder = model.get_decoder()
    plain = decoder.forward

    @functools.wraps(plain)
    def forward(*args: Any, **given: Any) -> Any:
        asked = {name for name, value in given.items() if value is not None}
        common = 0
        tells_all = decoder.gradient_checkpointing or decoder.config.output_hidden_states
        if not args and asked <= KNOWN and given.get("use_cache") is False and not tells_all:
            common = count_common_tokens(given["input_ids"], given.get("attention_mask"))
        if common < LEAST:
            return plain(*args, **given)
        ids, mask = given["input_ids"], given.get("attention_mask")
        once = plain(input_ids=ids[:1, :common], use_cache=True)
        once.past_key_values.batch_repeat_interleave(len(ids))
        found = plain(input_ids=ids[:, common:], attention_mask=mask, past_key_values=once.past_key_values, use_cache=True)
        shared = once.last_hidden_state.expand(len(ids), -1, -1)
        found.last_hidden_state = torch.cat([shared, found.last_hidden_state], 1)
        found.past_key_values = None
        return found

    decoder.forward = forward


def count_common_tokens(ids: "torch.Tensor", mask: "torch.Tensor | None") -> int:
    """How many tokens all rows of `ids` (n × length) begin with, none of them padding, less than all; 0 for one row."""
    if len(ids) < 2:
        return 0
    alike = (ids == ids[:1]).all(0)
    if mask is not None:
        alike = alike & mask.bool().all(0)
    return min(int(alike.long().cumprod(0).sum()), ids.shape[1] - 1)


def _has_full_attention(settings: Any) -> bool:
    kinds = set(getattr(settings, "layer_types", None) or ["full_attention"])
    rope = (getattr(settings, "rope_parameters", None) or {}).get("rope_type")
    grows = rope in ("dynamic", "longrope")  # with how long a row is: its beginning alone would be read otherwise
    return kinds == {"full_attention"} and not getattr(settings, "sliding_window", None) and not grows
