"""Prefix: read the common prefix of the rows of a batch once.

Every prompt begins with the persona and examples of the chat template; for the built-in model they are two thirds of all
tokens. Keys and values of the prefix are computed for one row and shared by all, and gradients flow through them. Tokens,
positions and the loss are the same, but a step is cheaper, and so are samples.
"""

import functools
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel

LEAST = 16  # tokens of a prefix that are worth a second pass, at least
KNOWN = {"input_ids", "attention_mask", "use_cache"}  # with any other argument, rows are read in full


def share_prefixes(model: "PreTrainedModel") -> None:
    """Patch a model to read the common prefix of a batch's rows once, whenever it is called without a cache.

    The model is not changed if some layers do not attend to all earlier tokens (sliding windows, states), or if positions
    depend on the length of a row.
    """
    import torch

    if not has_full_attention(model.config.get_text_config()):
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


def read_prefix(model: "PreTrainedModel", prompts: Sequence[Sequence[int]]) -> "tuple[Cache | None, int]":
    """Read the common prefix of prompts once, for answers to be generated to all of them.

    Returns its keys and values, one row for each prompt, and its number of tokens; (None, 0) if it is too short, or if the
    model is one that `share_prefixes` leaves alone.
    """
    import torch

    columns = zip(*(one[:-1] for one in prompts), strict=False)  # generation needs a token to begin with
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    if len(prompts) < 2 or common < LEAST or not has_full_attention(model.config.get_text_config()):
        return None, 0
    once = model(input_ids=torch.tensor([[*prompts[0][:common]]], device=model.device), use_cache=True, logits_to_keep=1)
    once.past_key_values.batch_repeat_interleave(len(prompts))
    return once.past_key_values, common


def count_common_tokens(ids: "torch.Tensor", mask: "torch.Tensor | None") -> int:
    """Count the tokens that all rows of `ids` (n × length) begin with: none is padding, one is left; 0 for one row."""
    if len(ids) < 2:
        return 0
    alike = (ids == ids[:1]).all(0)
    if mask is not None:
        alike = alike & mask.bool().all(0)
    return min(int(alike.long().cumprod(0).sum()), ids.shape[1] - 1)


def has_full_attention(settings: Any) -> bool:
    kinds = set(getattr(settings, "layer_types", None) or ["full_attention"])
    rope = (getattr(settings, "rope_parameters", None) or {}).get("rope_type")
    grows = rope in ("dynamic", "longrope")  # positions depend on a row's length, so a prefix alone reads differently
    return kinds == {"full_attention"} and not getattr(settings, "sliding_window", None) and not grows
