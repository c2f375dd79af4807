"""The report of a training run: what it read, what it learned, what the policy said before and after, and why the rest was
left out. It reads the files of the version that the run made; it trains and judges nothing.

Run: ``kibitz report RUN``, where a run has the name of the version that it made.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape

from bot.errors import DataError
from bot.store.forgetting import SAMPLES
from bot.types import PolicyVersion
from learning.data.features import NAMED
from learning.judging.evaluation import Sample
from learning.judging.statistics import mean_interval

SHOWN = 12  # answers side by side

STYLE: dict[str, Callable[[str], float]] = {"words": lambda text: len(text.split()), **NAMED}
del STYLE["length"]  # people count words


def write_samples(directory: Path, questions: Sequence[str], before: Sequence[Sample], after: Sequence[Sample]) -> None:
    """Keep what was answered to the same prompts before and after a run."""
    rows = [
        {"question": question, "before": old.text, "after": new.text}
        for question, old, new in zip(questions, before, after, strict=True)
    ]
    (directory / SAMPLES).write_text(json.dumps(rows))


def collected(version: PolicyVersion, outcome: str) -> dict[str, Any]:
    """All that a report says, as JSON. Raises DataError where the files of the version are gone."""
    directory = Path(version.path)
    if not (directory / "manifest.json").is_file():
        raise DataError(f"version '{version.name}' left no files ({outcome}); `kibitz policies` lists those that did")
    manifest = json.loads((directory / "manifest.json").read_text())
    metrics = json.loads((directory / "metrics.json").read_text())
    kept = directory / SAMPLES
    samples = json.loads(kept.read_text()) if kept.is_file() else []
    rewards = [row[2] for row in manifest["rows"]]
    return {
        "version": version.name,
        "parent": version.parent,
        "made": f"{version.created_at:%Y-%m-%d %H:%M} UTC",
        "outcome": outcome,
        "objective": manifest["training"]["objective"],
        "trained_on": len(rewards),
        "liked": sum(reward > 0 for reward in rewards),
        "disliked": sum(reward < 0 for reward in rewards),
        "held_out": len(manifest["held_out"]),
        "left_out": manifest["dropped"],
        "taken_back": metrics["taken_back"],
        "kl": metrics["kl"],
        "well_formed": metrics["well_formed"],
        "margin_before": metrics.get("margin_before"),
        "margin_after": metrics.get("margin_after"),
        "gain": [metrics.get(f"gain{part}") for part in ("", "_low", "_high")],
        "margin_gain": [metrics.get(f"margin_gain{part}") for part in ("", "_low", "_high")],
        "worth": [metrics.get(f"estimated_worth_{when}") for when in ("before", "after")],
        "worth_gain": metrics.get("estimated_gain"),
        "reward_model": metrics.get("reward_model"),
        "stopped": metrics.get("stopped"),
        "loss": metrics.get("loss", []),
        "checks": metrics.get("checks", []),
        "style": style(samples),
        "samples": samples[:SHOWN],
    }


def style(samples: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """For each counter its mean before and after, and the change with its 95% interval; what changed most comes first."""
    found = []
    for name, count in STYLE.items():
        old, new = (np.array([count(row[when]) for row in samples]) for when in ("before", "after"))
        if not len(old) or not (old.any() or new.any()):
            continue
        change, low, high = mean_interval((new - old).tolist(), seed=0)
        spread = float(np.concatenate([old, new]).std()) or 1.0
        row = {"name": name, "before": float(old.mean()), "after": float(new.mean())}
        found.append(row | {"change": change, "low": low, "high": high, "size": abs(change) / spread})
    return sorted(found, key=lambda row: -row["size"])


def html(found: dict[str, Any]) -> str:
    """The report as one HTML page with its plots in it."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape())
    return environment.get_template("report.html").render(**found, plots=_plots(found))


def _plots(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Titles, and pictures as data URLs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    if found["loss"]:
        figure, panels = pyplot.subplots(1, 3, figsize=(11, 3), layout="constrained")
        panels[0].plot(range(1, len(found["loss"]) + 1), found["loss"])
        panels[0].set(xlabel="step", title="loss")
        steps = [check["step"] for check in found["checks"]]
        panels[1].plot(steps, [check["kl"] for check in found["checks"]], marker="o", label="KL to the base")
        if all(check["liked"] is not None for check in found["checks"]):
            panels[1].plot(steps, [check["liked"] for check in found["checks"]], marker="o", label="held-out liked answers")
        panels[1].set(xlabel="step", title="nats a token")
        panels[1].legend(frameon=False, fontsize=8)
        if all(check["gained"] is not None for check in found["checks"]):
            gained = np.array([check["gained"] for check in found["checks"]]).T
            panels[2].plot(steps, gained[0], marker="o")
            panels[2].fill_between(steps, gained[1], gained[2], alpha=0.2, linewidth=0)
            panels[2].axhline(0, color="tab:gray", linestyle=":")
        panels[2].set(xlabel="step", title="held-out liked over disliked, gained (95%)")
        made.append(("The run", _picture(figure)))
    if found["style"]:
        figure, axes = pyplot.subplots(figsize=(6, 0.5 + 0.4 * len(found["style"])), layout="constrained")
        names = [row["name"] for row in found["style"]][::-1]
        for shift, when, colour in ((-0.18, "before", "tab:gray"), (0.18, "after", "tab:blue")):
            values = [row[when] / (max(row["before"], row["after"]) or 1) for row in found["style"]][::-1]
            axes.barh(np.arange(len(names)) + shift, values, height=0.34, color=colour, label=when)
        axes.set_yticks(range(len(names)), names)
        axes.set(title="style of answers to held-out prompts, the larger of the two as 1")
        axes.legend(frameon=False, fontsize=8)
        made.append(("What changed", _picture(figure)))
    if found["reward_model"]:
        figure, axes = pyplot.subplots(figsize=(3.6, 3.4), layout="constrained")
        said, true, counts = zip(*found["reward_model"]["calibration"], strict=True)
        axes.plot([0, 1], [0, 1], color="tab:gray", linestyle=":")
        axes.scatter(said, true, s=[8 + 2 * count for count in counts])
        axes.set(xlabel="chance that it is liked", ylabel="share that was", title="on questions it did not see")
        made.append(("How far the reward model can be believed", _picture(figure)))
    return made


def _picture(figure: Any) -> str:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
