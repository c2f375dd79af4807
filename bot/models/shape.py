"""ModelShape: reads the dimensions of a model from its config and the headers of its weights, without torch."""

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bot.errors import ConfigError, quote_error

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
BIASED = {"CodeGenForCausalLM", "GPTJForCausalLM", "PhiForCausalLM"}  # architectures whose output layer has a bias
POINTER = b"version https://git-lfs"  # the beginning of a Git LFS pointer
DTYPE_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder, and its number of parameters."""

    family: str
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    query_width: int  # width of all query heads together
    key_width: int  # width of all key heads together; the values have the same
    vocabulary: int
    positions: int = 0  # 0: unknown
    saved_dtype: str = ""

    @property
    def billions(self) -> float:
        """Parameters, in billions."""
        return self.parameters / 1e9

    @property
    def size_label(self) -> str:
        """The number of parameters in short form: 135M, 1.72B."""
        return f"{self.billions:.3g}B" if self.billions >= 1 else f"{self.parameters / 1e6:.3g}M"

    def count_adapter_parameters(self, rank: int) -> int:
        """Count the parameters of a LoRA adapter on all linear layers but the output layer."""
        widths = (
            2 * (self.hidden + self.query_width) + 2 * (self.hidden + self.key_width) + 3 * (self.hidden + self.intermediate)
        )
        return rank * self.layers * widths


def read_shape(model: str) -> ModelShape:
    """Read the shape of a model in a directory, or of a hub model.

    Raises ConfigError if its config or its weights cannot be read.
    """
    settings, parameters = read_settings(model), count_parameters(Path(model))
    try:
        return make_shape(settings, parameters)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise make_config_error(model, error) from error


def read_settings(model: str) -> dict[str, Any]:
    """Read the config.json of a model in a directory, or of a hub model. Raises ConfigError if that fails."""
    file = Path(model) / "config.json"
    try:
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"it is a JSON {type(found).__name__}, not an object")
            return found
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(model).to_dict()
    except Exception as error:  # transformers runs the checks of an architecture, which may raise anything
        raise make_config_error(model, error) from error


def make_config_error(model: str, error: Exception) -> ConfigError:
    """Return the error for a model whose config.json is wrong."""
    return ConfigError(
        f"policy.model '{model}': its config.json cannot be used ({quote_error(error)}); "
        "name a decoder model as transformers saves it"
    )


def make_shape(settings: dict[str, Any], parameters: int = 0) -> ModelShape:
    """Return the shape that the settings of a config.json describe; `parameters` = 0 computes them from the dimensions."""
    text = settings.get("text_config") or settings
    hidden = int(text.get("hidden_size") or text["n_embd"])
    layers = int(text.get("num_hidden_layers") or text["n_layer"])
    heads = int(text.get("num_attention_heads") or text["n_head"])
    intermediate = int(text.get("intermediate_size") or text.get("n_inner") or 4 * hidden)
    vocabulary = int(text.get("vocab_size") or settings["vocab_size"])
    width = int(text.get("head_dim") or hidden // heads)
    queries, keys = width * heads, width * int(text.get("num_key_value_heads") or heads)
    experts = int(text.get("num_local_experts") or text.get("num_experts") or 1)
    feed_forward = 3 * hidden * (experts * int(text.get("moe_intermediate_size") or intermediate))
    layer = 2 * hidden * (queries + keys) + feed_forward + 2 * hidden
    is_tied = bool(settings.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    return ModelShape(
        family=str(text.get("model_type") or settings.get("model_type") or ""),
        parameters=parameters or (1 if is_tied else 2) * vocabulary * hidden + layers * layer + hidden,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        query_width=queries,
        key_width=keys,
        vocabulary=vocabulary,
        positions=int(text.get("max_position_embeddings") or text.get("n_positions") or 0),
        saved_dtype=find_saved_dtype(settings),
    )


def find_saved_dtype(settings: dict[str, Any]) -> str:
    """Return the number format that a config.json names, such as bfloat16; "" if it names none."""
    places = (settings.get("text_config") or settings, settings)
    named = [place.get(key) for place in places for key in ("dtype", "torch_dtype")]
    return str(next(filter(None, named), "")).removeprefix("torch.")


def count_parameters(directory: Path) -> int:
    """Count the parameters in the safetensors files of a directory; 0 without such files."""
    return sum(prod(shape) for shape in read_all_tensor_shapes(directory).values())


def list_weight_files(directory: Path) -> list[Path]:
    """List the files that transformers would load: one file, or the shards that an index names, which may be missing.

    Raises ConfigError if an index cannot be read.
    """
    for name in WEIGHTS_FILES:
        whole, index = directory / name, directory / f"{name}.index.json"
        if os.path.lexists(whole):  # a broken link counts: reading it raises an error
            return [whole]
        if index.is_file():
            try:
                return [directory / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise make_unreadable_error(index, quote_error(error)) from error
    return []


def read_all_tensor_shapes(directory: Path) -> dict[str, list[int]]:
    """Read the shape of each tensor in the safetensors files of a directory; empty without such files."""
    files = [file for file in list_weight_files(directory) if file.suffix == ".safetensors"]
    return {name: shape for file in files for name, shape in read_tensor_shapes(file).items()}


def has_output_bias(model: str) -> bool:
    """Tell whether the output layer adds a bias to the logits, by the architecture's name or the headers of the weights.

    Raises ConfigError if config.json or a header cannot be read.
    """
    settings = read_settings(model)
    is_known = bool(set(settings.get("architectures") or []) & BIASED) or bool(settings.get("lm_head_bias"))
    return is_known or any(name.endswith("lm_head.bias") for name in read_all_tensor_shapes(Path(model)))


def read_tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Read the shape of each tensor from the header of a safetensors file.

    Raises ConfigError if the file is missing, damaged or cut off.
    """
    try:
        with safe_open(file, framework="np") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        raise make_unreadable_error(file, quote_error(error)) from error


def make_unreadable_error(file: Path, why: str) -> ConfigError:
    """Return the error for a file of weights that is missing or damaged."""
    if _is_pointer(file):
        return ConfigError(f"{file} cannot be read (it is a Git LFS pointer, not the file itself); run git lfs pull")
    return ConfigError(f"{file} cannot be read ({why}); download it again")


def _is_pointer(file: Path) -> bool:
    """Tell whether a file is a Git LFS pointer, which stands for a large file that Git did not fetch."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(POINTER)) == POINTER
    except OSError:
        return False
