"""The commands that list, deploy, roll back and prune versions of the policy."""

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
from bot.errors import ConfigError, DataError, VerdictOutdated
from bot.output import check_writable, console, write_json
from bot.store.stores import open_stores
from bot.supervision import describe_failures, read_failures
from bot.types import PolicyState
from bot.wording import count_noun
from learning.models import version_files
from learning.rollout.heads import list_heads, locate_heads


@command()
def status(config: Config) -> None:
    """Show the live version, and counts of messages, feedback and runs."""
    is_running = is_locked(config.data, "serve")
    # Printed before the database is opened, because that may be what fails.
    lines = describe_failures(read_failures(config.data / HEALTH_FILE)) if is_running else []
    console.print("\n".join([f"running: {'yes' if is_running else 'no'}", *lines]), markup=False)
    _, store, registry = open_stores(config)
    console.print(describe_status(store, registry, config.data))


@command()
def policies(config: Config) -> None:
    """List every policy version, and the newest reward heads."""
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
    if found := list(list_heads(locate_heads(config.data))):
        heads = Table("reward head", "e-value", "taught by", "made")
        for head in found:
            if isinstance(head, DataError):
                heads.add_row(str(head), "", "", "")
            else:
                made = f"{head.written_at:%Y-%m-%d %H:%M}"
                heads.add_row(head.name, f"{head.e_value:.3g}", count_noun(head.teachers, "person", "people"), made)
        console.print(heads)


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


@command()
def rollback(config: Config) -> None:
    """Retire the live version and return to the one that it replaced."""
    _, _, registry = open_stores(config)
    taken_back, live = registry.roll_back()
    running = "; the running kibitz switches at once" if is_locked(config.data, "serve") else ""
    console.print(f"{taken_back.name} was rolled back, {live.name} is live{running}")


@command()
def deploy(
    config: Config,
    version: Annotated[str, typer.Argument(help="A candidate that `kibitz train` or `kibitz replay` made.")],
) -> None:
    """Make a candidate live. The running kibitz, or the next one that starts, probes it on its vLLM first."""
    database, store, registry = open_stores(config)
    candidate = registry.get(version)
    is_waiting = candidate.state == PolicyState.WAITING
    if is_waiting or candidate.state == PolicyState.CANDIDATE:
        live = registry.get_live()
        if candidate.judged_against != live.name:
            raise VerdictOutdated(version, candidate.judged_against, live.name)
    registry.request_deployment(version)
    if is_waiting:
        told = f"{describe_wait(candidate, store)}; if it passes the gate then, it is probed and goes live"
    else:
        when = "is probed now" if is_locked(config.data, "serve") else "will be probed when kibitz starts"
        told = f"{version} {when}, and goes live if vLLM serves it as it was trained; `kibitz policies` shows the result"
    database.close()
    console.print(told)


@command("pause-learning")
def pause_learning(config: Config) -> None:
    """Pause learning, or resume it if it is paused. A running kibitz applies this at once."""
    _, _, registry = open_stores(config)
    console.print(describe_pause(registry.toggle_learning()))


@command()
def prune(config: Config) -> None:
    """Remove the remaining files of rejected versions: reports, samples, records. Their weights are gone already."""
    database, _, registry = open_stores(config)
    rejected = [Path(version.path) for version in registry.all() if version.state == PolicyState.REJECTED]
    count, size = version_files.prune(rejected)
    database.close()
    console.print(f"removed the files of {count_noun(count, 'rejected version')}, {size / 1e6:.1f} MB")


@command()
def report(
    config: Config,
    run: Annotated[str, typer.Argument(help="The version that the run made. Default: the newest with files.")] = "",
    out: Annotated[Path | None, path_option("--out", help="The HTML file. Default: RUN.html.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Write a page with plots about a training run: its data, its verdict, and answers before and after."""
    from learning.judging import report as reports

    database, _, registry = open_stores(config)
    ran = {row["policy"]: row["outcome"] for row in registry.list_runs()}
    if not ran:
        raise ConfigError("there is no training run yet; `kibitz train` makes one")
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
