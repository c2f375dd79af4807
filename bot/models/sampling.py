"""Sampling: fills in the sampling that the operator did not set, as a model's makers advise for it or for its family.

The defaults in config.py suit only the toy policy, which was made for them.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bot.config import PolicyConfig
from bot.errors import ConfigError, quote_error
from bot.types import SamplingParams

SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p")
# By `model_type` of config.json, for models without advice in generation_config.json: the advice on their makers' model
# cards for chat without thinking.
FAMILIES = {
    "qwen2": SamplingParams(temperature=0.7, top_p=0.8, top_k=20),
    "qwen3": SamplingParams(temperature=0.7, top_p=0.8, top_k=20),
    "qwen3_5": SamplingParams(temperature=0.7, top_p=0.8, top_k=20),
    "llama": SamplingParams(temperature=0.6, top_p=0.9),
    "mistral": SamplingParams(temperature=0.7, top_p=0.95),
    "gemma2": SamplingParams(temperature=1.0, top_p=0.95, top_k=64),
    "gemma3": SamplingParams(temperature=1.0, top_p=0.95, top_k=64),
    "gemma3_text": SamplingParams(temperature=1.0, top_p=0.95, top_k=64),
    "phi3": SamplingParams(temperature=0.7, top_p=0.95),
}
DEFAULT_SAMPLING = SamplingParams(temperature=0.7, top_p=0.95)


def recommend_sampling(model: str, ignored: Collection[str] = ()) -> tuple[SamplingParams, str]:
    """Return the recommended sampling for a model (a directory or a hub name), and its source.

    Raises ConfigError if the model's own advice is invalid, except for the keys in `ignored`, which the operator has set.
    """
    advice = {
        name: value
        for name, value in _read_json(model, "generation_config.json").items()
        if name in SAMPLING_KEYS and value is not None
    }
    followed = {name: value for name, value in advice.items() if name not in ignored}
    for name, value in followed.items():
        try:
            PolicyConfig.model_validate({name: value}, strict=True)
        except ValidationError as error:
            raise ConfigError(
                f"policy.model '{model}': its generation_config.json has {name} {value!r} "
                f"({error.errors()[0]['msg'].lower()}); set policy.{name} yourself, or correct that file"
            ) from error
    if advice:
        return SamplingParams(**followed), "the model's generation_config.json"
    family = _read_json(model, "config.json").get("model_type", "")
    known = FAMILIES.get(family)
    return (DEFAULT_SAMPLING, "no known family") if known is None else (known, f"the family {family}")


def apply_sampling_defaults(policy: PolicyConfig, model: str) -> PolicyConfig:
    """Return the section with the recommended sampling in the keys that nobody set."""
    found, _ = recommend_sampling(model, policy.model_fields_set)
    return policy.fill({name: getattr(found, name) for name in SAMPLING_KEYS})


def describe_sampling(policy: PolicyConfig, model: str) -> str:
    """Describe in one line how answers are sampled, and the source of that."""
    _, source = recommend_sampling(model, policy.model_fields_set)
    own = [f"policy.{name}" for name in SAMPLING_KEYS if name in policy.model_fields_set]
    sampling = apply_sampling_defaults(policy, model).sampling
    drawn = ", ".join(f"{name} {getattr(sampling, name):g}" for name in SAMPLING_KEYS)
    return f"sampling: {drawn} ({source}{'; set by you: ' + ', '.join(own) if own else ''})"


def _read_json(model: str, name: str) -> dict[str, Any]:
    """Read a JSON file of a model; an empty dict if there is none. Raises ConfigError if it is no JSON object."""
    path: str | None = str(Path(model) / name)
    if not Path(model).is_dir():
        from transformers.utils import cached_file

        path = cached_file(
            model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    if path is None or not Path(path).is_file():
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it is a JSON {type(found).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"policy.model '{model}': its {name} cannot be read ({quote_error(error)}); correct it") from error
    return found
