"""The commands that show versions of the policy, take them live and take them back."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from bot import output_files
from bot.chat.texts import describe_pause, describe_status, describe_wait
from bot.cli.options import JsonFile, command, path_option
from bot.config import Config
from bot.data_directory import HEALTH_FILE, is_locked
from bot.errors import ConfigError, VerdictOutdated
from bot.output import check_writable, console, write_json
from bot.store.stores import open_stores
from bot.supervision import describe_failures, read_failures
from bot.types import PolicyState
from learning.models import version_files


@command()
def status(config: Config) -> None:
    """What is live, what was said, what was learned."""
    is_running = is_locked(config.data, "serve")
    # First: the database may be what fails.
    lines = describe_failures(read_failures(config.data / HEALTH_FILE)) if is_running else []
    console.print("\n".join([f"running: {'yes' if is_running else 'no'}", *lines]), markup=False)
    _, store, registry = open_stores(config)
    console.print(describe_status(store, registry))


@command()
def policies(config: Config) -> None:
    """List every policy version."""
    _, _, registry = open_stores(config)
    table = Table("version", "state", "parent", "KL", "gain", "made", "why not")
    for version in registry.all():
        figures = version.metrics
        table.add_row(
            version.name,
            f"[bold green]{version.state}" if version.state == PolicyState.LIVE else version.state,
            version.parent or "",
            _format_number(figures.kl),
            _format_number(figures.gain),
            f"{version.created_at:%Y-%m-%d %H:%M}",
            "; ".join(figures.reasons) or figures.outcome,
        )
    console.print(table)


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


@command()
def rollback(config: Config) -> None:
    """Take the live version back; the one that it replaced answers again."""
    _, _, registry = open_stores(config)
    taken_back, live = registry.roll_back()
    running = "; the running kibitz follows at once" if is_locked(config.data, "serve") else ""
    console.print(f"{taken_back.name} was taken back, {live.name} is live{running}")


@command()
def deploy(
    config: Config,
    version: Annotated[str, typer.Argument(help="A candidate that `kibitz train` or `kibitz replay` made.")],
) -> None:
    """Take a candidate live: a running kibitz, or the next one that starts, proves it on its vLLM first."""
    database, store, registry = open_stores(config)
    candidate, live = registry.get(version), registry.get_live()
    is_waiting = candidate.state == PolicyState.WAITING
    if (is_waiting or candidate.state == PolicyState.CANDIDATE) and candidate.judged_against != live.name:
        raise VerdictOutdated(version, candidate.judged_against, live.name)
    registry.request_deployment(version)
    if is_waiting:
        told = f"{describe_wait(candidate, store)}; if it passes the gate then, it is proven and goes live"
    else:
        when = "is proven now" if is_locked(config.data, "serve") else "will be proven when kibitz starts"
        told = f"{version} {when}, and goes live if vLLM serves it as it was trained; `kibitz policies` tells"
    database.close()
    console.print(told)


@command("pause-learning")
def pause_learning(config: Config) -> None:
    """Train no new versions; used again, go on. A running kibitz follows."""
    _, _, registry = open_stores(config)
    console.print(describe_pause(registry.toggle_learning()))


@command()
def prune(config: Config) -> None:
    """Remove what is left of rejected versions: reports, samples, records. Their weights went when they were rejected."""
    database, _, registry = open_stores(config)
    rejected = [Path(version.path) for version in registry.all() if version.state == PolicyState.REJECTED]
    count, size = version_files.prune(rejected)
    database.close()
    console.print(f"removed the files of {count} rejected versions, {size / 1e6:.1f} MB")


@command()
def report(
    config: Config,
    run: Annotated[str, typer.Argument(help="The version that the run made; without one the newest that left files.")] = "",
    out: Annotated[Path | None, path_option("--out", help="Where the page goes; RUN.html if not given.")] = None,
    json_file: JsonFile = None,
) -> None:
    """What a training run read, learned and left out, and what the policy said before and after, as a page with plots."""
    from learning.judging import report as reports

    database, _, registry = open_stores(config)
    ran = {row["policy"]: row["outcome"] for row in registry.list_runs()}
    if not ran:
        raise ConfigError("kibitz report: there was no training run yet; `kibitz train` makes one")
    whole = [one for one in ran if (Path(registry.get(one).path) / "manifest.json").is_file()]
    name = run or (whole or list(ran))[-1]
    version = registry.get(name)
    page = out or Path(f"{name}.html")
    check_writable(page, json_file)
    collected = reports.collect(version, ran.get(name, "was not made by a run"))
    database.close()
    output_files.write_text(page, reports.render_html(collected))
    console.print(f"report: {page}")
    if json_file is not None:
        write_json(json_file, "report", asdict(collected), {"run": name})
