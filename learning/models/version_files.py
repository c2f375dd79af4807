"""The files of a version: the kind of its weights, their faults, and their fingerprint.

The serving process checks a version before vLLM loads it, because vLLM checks nothing and may load pickles. Therefore this
module needs no torch, and reads only the header of whole weights.
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bot.store.weights import ADAPTER_FILES, WHOLE

PICKLES = {".bin", ".pt", ".pkl", ".pickle"}


def is_whole(directory: Path) -> bool:
    """Tell whether a version has whole weights; otherwise it is an adapter."""
    return (directory / WHOLE).is_dir()


def find_weights_folder(directory: Path) -> Path:
    """Return the folder of a version's weights."""
    return directory / WHOLE if is_whole(directory) else directory


def find_missing_files(directory: Path) -> list[str]:
    """Return the names of the adapter files that a version lacks."""
    return [name for name in sorted(ADAPTER_FILES) if not (directory / name).is_file()]


def fingerprint(directory: Path) -> str:
    """Return the sha256 of a version's weights."""
    digest = hashlib.sha256()
    for path in sorted(find_weights_folder(directory).glob("*.safetensors")):
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def remove_unfinished(policies: Path) -> None:
    """Remove what killed runs left behind. The caller must hold the lock of runs, so that no run is using it."""
    for leftover in policies.glob("*.unfinished"):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(directories: Iterable[Path]) -> tuple[int, int]:
    """Remove the directories of versions that will never serve. Returns how many there were, and their size in bytes."""
    count = size = 0
    for directory in directories:
        if directory.is_dir():
            size += sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
            count += 1
            shutil.rmtree(directory)
    return count, size


def find_faults(directory: Path, base_model: str, max_rank: int) -> list[str]:
    """Return the faults of a version's weights; none if vLLM may load them."""
    folder = find_weights_folder(directory)
    if not folder.is_dir():
        return [f"{folder}: is missing"]
    found = [f"{path.name}: is a link" for path in folder.iterdir() if path.is_symlink()]
    pickles = [path.name for path in folder.iterdir() if path.suffix in PICKLES]
    found += [f"{name}: a pickle file; weights are safetensors only" for name in pickles]
    return found + (
        _find_whole_faults(folder, base_model) if is_whole(directory) else _find_adapter_faults(folder, base_model, max_rank)
    )


def _find_adapter_faults(adapter: Path, base_model: str, max_rank: int) -> list[str]:
    from safetensors import SafetensorError, safe_open

    if missing := find_missing_files(adapter):
        return [f"{name}: is missing" for name in missing]
    faults = []
    settings = json.loads((adapter / "adapter_config.json").read_text())
    if settings.get("r", 0) > max_rank:
        faults.append(f"rank {settings['r']} is above serving.max_lora_rank {max_rank}")
    for key, allowed in {"bias": "none", "use_dora": False, "modules_to_save": None}.items():
        if settings.get(key, allowed) not in (allowed, None, []):
            faults.append(f"adapter_config.json: {key} is {settings[key]!r}, which vLLM does not serve")
    try:
        with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        return [*faults, f"adapter_model.safetensors: cannot be read ({error})"]
    faults += [f"{name}: not finite" for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    pairs = Counter(name.rsplit(".lora_", 1)[0] for name in tensors)
    faults += [f"{name}: half of a LoRA pair is missing" for name, parts in pairs.items() if parts != 2]
    faults += _find_layer_faults(tensors)
    faults += _find_pair_faults({name: list(tensor.shape) for name, tensor in tensors.items()}, base_model)
    if not any(tensor.any() for name, tensor in tensors.items() if ".lora_B" in name):
        faults.append("all weights are zero: the adapter changes nothing")
    return faults


def _find_pair_faults(adapter: dict[str, list[int]], base_model: str) -> list[str]:
    """Return the faults of an adapter's shapes against a base model in a folder, which may have changed since training."""
    base = _read_shapes(Path(base_model))
    faults = []
    for name, shape in adapter.items():
        layer, _, half = name.removeprefix("base_model.model.").partition(".lora_")
        other = adapter.get(name.replace(".lora_A", ".lora_B"))
        if half.startswith("A") and other is not None and f"{layer}.weight" in base:
            widths = sorted([shape[-1], other[0]])  # some architectures keep the transpose
            if widths != sorted(base[f"{layer}.weight"]):
                faults.append(f"made for another base model, whose {layer} has other dimensions")
    return faults


def _find_whole_faults(folder: Path, base_model: str) -> list[str]:
    """Return the faults of whole weights. For a missing tensor, vLLM would serve the one of the version before."""
    from safetensors import SafetensorError

    try:
        own = _read_shapes(folder)
    except (SafetensorError, OSError) as error:
        return [f"the weights cannot be read ({error})"]
    if not Path(base_model).is_dir():
        return _find_layer_faults(own)
    base = _read_shapes(Path(base_model))
    missing = [f"{name}: is missing" for name in base if name not in own]
    return missing + [f"{name}: has another shape than the base model's" for name in own if own[name] != base.get(name)]


def _find_layer_faults(names: Iterable[str]) -> list[str]:
    layers = {int(found) for name in names for found in re.findall(r"\.layers\.(\d+)\.", name)}
    return [] if layers and layers == set(range(max(layers) + 1)) else ["some layers are missing"]


def _read_shapes(folder: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            found.update({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118 (not a dict)
    return found
