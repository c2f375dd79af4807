"""ModelShape: how large a model is, read from its config and the headers of its weights, without torch.

It knows no memory and no settings: `bot.memory_budget` and `bot.sizes` ask it.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from bot.errors import ConfigError

BITS = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder, and how many parameters it has."""

    family: str
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    queries: int  # width of all query heads together
    keys: int  # width of all key heads together, which is that of the values
    vocabulary: int
    positions: int = 0  # 0: not known
    saved_as: str = ""

    @property
    def billions(self) -> float:
        """Parameters, in billions."""
        return self.parameters / 1e9

    @property
    def size(self) -> str:
        """How many parameters it has, as people say it: 135M, 1.72B."""
        return f"{self.billions:.3g}B" if self.billions >= 1 else f"{self.parameters / 1e6:.3g}M"

    def adapter_parameters(self, rank: int) -> int:
        """Count the parameters of a LoRA adapter on all linear layers but the output layer."""
        widths = 2 * (self.hidden + self.queries) + 2 * (self.hidden + self.keys) + 3 * (self.hidden + self.intermediate)
        return rank * self.layers * widths


def read_shape(model: str) -> ModelShape:
    """Read the shape of a model in a directory, or of a hub model that transformers can find.

    Raises ConfigError where its config cannot be read.
    """
    directory = Path(model)
    try:
        if (directory / "config.json").is_file():
            settings = json.loads((directory / "config.json").read_text())
        else:
            from transformers import AutoConfig

            settings = AutoConfig.from_pretrained(model).to_dict()
        return shape_of(settings, count_parameters(directory))
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"policy.model '{model}': its config.json cannot be used ({type(error).__name__}: {first}); "
            "name a decoder model as transformers saves it"
        ) from error


def shape_of(settings: dict[str, Any], parameters: int = 0) -> ModelShape:
    """Make a shape from the settings in a config.json; without a count, parameters are computed from the dimensions."""
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
        queries=queries,
        keys=keys,
        vocabulary=vocabulary,
        positions=int(text.get("max_position_embeddings") or text.get("n_positions") or 0),
        saved_as=str(text.get("dtype") or text.get("torch_dtype") or settings.get("torch_dtype") or ""),
    )


def count_parameters(directory: Path) -> int:
    """Count the parameters in the safetensors files of a directory; 0 where there are none."""
    return sum(prod(shape) for file in sorted(directory.glob("*.safetensors")) for shape in tensor_shapes(file).values())


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Read the shape of each tensor from the header of a safetensors file. Raises ValueError where it has none."""
    return {name: entry["shape"] for name, entry in read_header(file)[0].items()}


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Read what a safetensors file says of each tensor, and where its data begins. Raises ValueError where it is none."""
    with file.open("rb") as opened:
        start = opened.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= size <= min(100_000_000, file.stat().st_size):
            raise ValueError(f"{file.name} is no safetensors file")
        header = json.loads(opened.read(size))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + size
