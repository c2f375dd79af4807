"""Sampling: how answers are drawn where the operator does not say: as the model's makers advise, or as its family does best.

What config.py has as defaults is right for the toy policy alone, which was made to be sampled as it is. It knows no
server and no training.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bot.config import Config

KEYS = ("temperature", "top_p", "top_k", "min_p")
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
# By `model_type` of config.json, for models whose generation_config.json says nothing: what their makers' model cards advise
# for chat without thinking.
FAMILIES: dict[str, dict[str, float]] = {
    "qwen2": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "qwen3": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "qwen3_5": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "llama": {"temperature": 0.6, "top_p": 0.9},
    "mistral": {"temperature": 0.7, "top_p": 0.95},
    "gemma2": {"temperature": 1.0, "top_p": 0.95, "top_k": 64},
    "gemma3": {"temperature": 1.0, "top_p": 0.95, "top_k": 64},
    "gemma3_text": {"temperature": 1.0, "top_p": 0.95, "top_k": 64},
    "phi3": {"temperature": 0.7, "top_p": 0.95},
}
OTHERS = {"temperature": 0.7, "top_p": 0.95}


def is_truncated(sampling: Mapping[str, Any]) -> bool:
    """Return whether some tokens could not be drawn: what top_p, top_k and min_p cut away, a trainer cannot reproduce."""
    return sampling.get("top_p", 1.0) < 1.0 or sampling.get("top_k", 0) > 0 or sampling.get("min_p", 0.0) > 0.0


def advised(model: str) -> tuple[dict[str, float], str]:
    """Return the sampling that suits a model (a directory or a hub name), and where that is from."""
    own = {
        name: value for name, value in _json(model, "generation_config.json").items() if name in KEYS and value is not None
    }
    if own:
        return PLAIN | own, "the model's generation_config.json"
    family = _json(model, "config.json").get("model_type", "")
    return PLAIN | FAMILIES.get(family, OTHERS), f"the family {family}" if family in FAMILIES else "no known family"


def apply_sampling_defaults(config: Config, model: str) -> Config:
    """Return the config with what it does not say about sampling filled in as suits the model."""
    found, _ = advised(model)
    return config.model_copy(update={"policy": config.policy.fill(found)})


def describe_sampling(config: Config, model: str) -> str:
    """Describe in one line how answers are drawn, and who says so."""
    _, source = advised(model)
    own = [f"policy.{name}" for name in KEYS if name in config.policy.model_fields_set]
    drawn = ", ".join(f"{name} {value:g}" for name, value in apply_sampling_defaults(config, model).policy.sampling.items())
    return f"sampling: {drawn} ({source}{'; set by you: ' + ', '.join(own) if own else ''})"


def _json(model: str, name: str) -> dict[str, Any]:
    """A JSON file of a model; empty where it has none."""
    path: str | None = str(Path(model) / name)
    if not Path(model).is_dir():
        from transformers.utils import cached_file

        path = cached_file(
            model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    try:
        return dict(json.loads(Path(path or "").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
