"""SimulationFigures: the figures, tables and picture of ``kibitz simulate``."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bot.wording import count_noun
from learning.bench.simulation import CurveRow, Simulation


def compute_figures(played: Simulation, model: str) -> dict[str, Any]:
    """Return the figures of a simulation, for its JSON file. `model` is the base model's name in the config.

    `utility_gain`, of single answers, and `served_gain` are paired by prompt against the frozen control. Probe distances
    (nats) are those of the last probe. `first_choice_reactions` is None if no answer was ever chosen from several.
    """
    rows = played.rows
    first, last = rows[0], rows[-1]
    probed = [*played.learner.deployment.probed.values()][-1:]
    found: dict[str, Any] = {}
    for name, (value, low, high) in {
        "first_utility": (first.utility, first.low, first.high),
        "last_utility": (last.utility, last.low, last.high),
        "frozen_utility": (last.frozen, last.frozen_low, last.frozen_high),
        "utility_gain": (last.gain, last.gain_low, last.gain_high),
        "last_served_utility": (last.served_utility, last.served_low, last.served_high),
        "served_gain": (last.served_gain, last.served_gain_low, last.served_gain_high),
    }.items():
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    versions = {row.version for row in rows}
    return {
        **found,
        "first_choice_reactions": played.first_choice_reactions,
        "well_formed": min(row.well_formed for row in rows),
        "ended": last.ended,
        "promoted": len(played.promoted),
        "refused_by_probe": len(played.refused),
        "probe_distance": probed[0].distance if probed else None,
        "probe_from_parent": probed[0].from_parent if probed else None,
        "model": model,
        "samples": played.samples,
        "versions": len(versions),
        "reactions": last.reactions,
        "kl": last.kl,
        "curve": [asdict(row) for row in rows],
    }


def describe_changes(played: Simulation) -> str:
    """Describe what people saw change, in the order in which it came: the choice of the head, then the weights."""
    last = played.rows[-1]
    first = played.first_choice_reactions
    if first is None:
        chosen = "the reward head never chose among several answers"
    else:
        chosen = f"first change after {count_noun(first, 'reaction')}: the reward head chooses among several answers"
        # it may lose its evidence again
        steady = [*takewhile(lambda row: row.candidates > 1, reversed(played.rows))]
        chosen += f" (in each row from {steady[-1].reactions} on)" if steady else " (not in the last row)"
    live = next((row for row in played.rows if row.version != played.rows[0].version), None)
    if live is None:
        trained = "no trained version went live"
    else:
        trained = f"{live.version} was live after {count_noun(live.reactions, 'reaction')}"
    return (
        f"{chosen}; then the weights: {trained}\n"
        f"true utility in the end: served {last.served_utility:+.2f}, weights alone {last.utility:+.2f}, "
        f"frozen {last.frozen:+.2f}"
    )


def make_table(rows: Sequence[CurveRow]) -> Table:
    """Make a table of the rows of a simulation. "from" has the number of candidates of served answers."""
    names = ("version", "reactions", "served (95%)", "from", "weights (95%)", "frozen", "approval", "KL")
    found = Table(*names, "well-\nformed", "ended", title="true utility on held-out prompts", padding=0)
    for row in rows:
        found.add_row(
            row.version,
            str(row.reactions),
            f"{row.served_utility:+.2f} ({row.served_low:+.2f} to {row.served_high:+.2f})",
            str(row.candidates),
            f"{row.utility:+.2f} ({row.low:+.2f} to {row.high:+.2f})",
            f"{row.frozen:+.2f}",
            "" if row.approval is None else f"{row.approval:.0%}",
            f"{row.kl:.3f}",
            f"{row.well_formed:.0%}",
            f"{row.ended:.0%}",
        )
    return found


def make_samples_table(samples: Sequence[dict[str, str]]) -> Table:
    """Make a table of some held-out prompts with the answers of version 0 and of the last version, single and served."""
    names = ("prompt", "before", "after", "served")
    found = Table(*names, title="the same prompts: before, after (weights alone), and served", show_lines=True)
    for row in samples:
        found.add_row(*(Text(row[name]) for name in names))
    return found


def plot(played: Simulation, path: Path, title: str) -> None:
    """Plot true utility on held-out prompts against reactions: served answers, weights alone, and the frozen control."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = played.rows
    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    reactions = [row.reactions for row in rows]
    for label, colour, names in (
        ("served: chosen by the reward head", "tab:green", ("served_utility", "served_low", "served_high")),
        ("weights alone: single answers", "tab:blue", ("utility", "low", "high")),
        ("frozen control", "tab:gray", ("frozen", "frozen_low", "frozen_high")),
    ):
        line, low, high = ([getattr(row, name) for row in rows] for name in names)
        axes.plot(reactions, line, marker="o", color=colour, label=label)
        axes.fill_between(reactions, low, high, color=colour, alpha=0.15, linewidth=0)
    if (first := played.first_choice_reactions) is not None:
        axes.axvline(first, color="tab:green", linestyle=":", linewidth=1)
        place = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8, "color": "tab:green"}
        axes.annotate(f"first choice: {count_noun(first, 'reaction')}", (first, -1.05), **place)
    seen: set[str] = set()
    for row in rows:
        if row.version not in seen:
            place = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 8, "color": "tab:blue"}
            axes.annotate(row.version, (row.reactions, row.high), **place)
            seen.add(row.version)
    axes.set(xlabel="reactions so far", ylabel="true utility on held-out prompts", ylim=(-1.05, 1.05), title=title)
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
