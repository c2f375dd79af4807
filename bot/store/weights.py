"""The weights of a version: how their files are called, and how they are deleted."""

import shutil
from pathlib import Path

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
WHOLE = "model"  # the folder of whole weights in a version's directory


def discard_weights(directory: Path) -> None:
    """Delete the weights of a version that will never serve. The same feedback and seed would make the same bytes again.

    The files that reports and explanations read are kept.
    """
    shutil.rmtree(directory / WHOLE, ignore_errors=True)
    for name in ADAPTER_FILES:
        (directory / name).unlink(missing_ok=True)
