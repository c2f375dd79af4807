"""The report of a training run: its data, results, answers before and after, and the turns that were left out.

It only reads the files of the version that the run made.

Run: ``kibitz report RUN``, where RUN is the name of the version.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape

from bot.errors import DataError
from bot.store.forgetting import SAMPLES_FILE
from bot.types import PolicyVersion
from learning.data.features import NAMED_FEATURES
from learning.data.manifest import read_manifest
from learning.judging.evaluation import Sample
from learning.judging.metrics import Check, RunMetrics
from learning.judging.off_policy import Quality
from learning.judging.statistics import Interval, mean_interval

MAX_SAMPLES = 12  # prompts whose answers are shown side by side

STYLE: dict[str, Callable[[str], float]] = {"words": lambda text: len(text.split()), **NAMED_FEATURES}
del STYLE["length"]  # a logarithm; "words" shows the same to people


MaybeInterval = tuple[float | None, float | None, float | None]  # as Interval; all None if there was too little data


@dataclass(frozen=True)
class Answered:
    """The policy's answers to a question before and after a run."""

    question: str
    before: str
    after: str


@dataclass(frozen=True)
class Change:
    """A style feature: its mean before and after, the change with its 95% interval, its size in standard deviations."""

    name: str
    before: float
    after: float
    change: float
    low: float
    high: float
    size: float


@dataclass(frozen=True)
class Report:
    """The content of a report, with the fields of its JSON. `worth` is the worth of an answer before and after."""

    version: str
    parent: str | None
    made: str
    outcome: str
    objective: str
    trained_on: int
    liked: int
    disliked: int
    held_out: int
    left_out: dict[str, int]
    taken_back: list[str]
    kl: float | None
    well_formed: float | None
    margin_before: float | None
    margin_after: float | None
    gain: MaybeInterval
    margin_gain: MaybeInterval
    worth: tuple[float | None, float | None]
    worth_gain: Interval | None
    reward_model: Quality | None
    stopped: str | None
    loss: list[float]
    checks: list[Check]
    style: list[Change]
    samples: list[Answered]


def write_samples(directory: Path, questions: Sequence[str], before: Sequence[Sample], after: Sequence[Sample]) -> None:
    """Write the answers to the same prompts before and after a run into a version's directory."""
    rows = [Answered(question, old.text, new.text) for question, old, new in zip(questions, before, after, strict=True)]
    (directory / SAMPLES_FILE).write_text(json.dumps([asdict(row) for row in rows]))


def collect(version: PolicyVersion, outcome: str) -> Report:
    """Collect the content of a version's report. Raises DataError if the version has no files."""
    directory = Path(version.path)
    manifest = read_manifest(directory)
    if manifest is None:
        raise DataError(f"version '{version.name}' has no files ({outcome}); choose another version from `kibitz policies`")
    metrics = RunMetrics.from_json(json.loads((directory / "metrics.json").read_text()))
    kept = directory / SAMPLES_FILE
    samples = [Answered(**row) for row in json.loads(kept.read_text())] if kept.is_file() else []
    rewards = [row.reward for row in manifest.rows]
    return Report(
        version=version.name,
        parent=version.parent,
        made=f"{version.created_at:%Y-%m-%d %H:%M} UTC",
        outcome=outcome,
        objective=manifest.training["objective"],
        trained_on=len(rewards),
        liked=sum(reward > 0 for reward in rewards),
        disliked=sum(reward < 0 for reward in rewards),
        held_out=len(manifest.held_out),
        left_out=manifest.dropped,
        taken_back=metrics.taken_back,
        kl=metrics.kl,
        well_formed=metrics.well_formed,
        margin_before=metrics.margin_before,
        margin_after=metrics.margin_after,
        gain=(metrics.gain, metrics.gain_low, metrics.gain_high),
        margin_gain=(metrics.margin_gain, metrics.margin_gain_low, metrics.margin_gain_high),
        worth=(metrics.estimated_worth_before, metrics.estimated_worth_after),
        worth_gain=metrics.estimated_gain,
        reward_model=metrics.reward_model,
        stopped=metrics.stopped,
        loss=metrics.loss,
        checks=metrics.checks,
        style=compare_style(samples),
        samples=samples[:MAX_SAMPLES],
    )


def compare_style(samples: Sequence[Answered]) -> list[Change]:
    """Return the change of each style feature that occurs, the largest change first."""
    found = []
    texts = [row.before for row in samples], [row.after for row in samples]
    for name, count in STYLE.items():
        old, new = (np.array([count(text) for text in said]) for said in texts)
        if not len(old) or not (old.any() or new.any()):
            continue
        change, low, high = mean_interval((new - old).tolist(), seed=0)
        spread = float(np.concatenate([old, new]).std()) or 1.0
        found.append(Change(name, float(old.mean()), float(new.mean()), change, low, high, abs(change) / spread))
    return sorted(found, key=lambda row: -row.size)


def render_html(found: Report) -> str:
    """Return the report as one HTML page with embedded plots."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape())
    return environment.get_template("report.html").render(**vars(found), plots=_draw_plots(found))


def _draw_plots(found: Report) -> list[tuple[str, str]]:
    """Return the titles of the plots with their images as data URLs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    if found.loss:
        figure, panels = pyplot.subplots(1, 3, figsize=(11, 3), layout="constrained")
        panels[0].plot(range(1, len(found.loss) + 1), found.loss)
        panels[0].set(xlabel="step", title="loss")
        steps = [check.step for check in found.checks]
        panels[1].plot(steps, [check.kl for check in found.checks], marker="o", label="KL to the base")
        if all(check.liked is not None for check in found.checks):
            panels[1].plot(steps, [check.liked for check in found.checks], marker="o", label="held-out liked answers")
        panels[1].set(xlabel="step", title="nats per token")
        panels[1].legend(frameon=False, fontsize=8)
        if all(check.gained is not None for check in found.checks):
            gained = np.array([check.gained for check in found.checks]).T
            panels[2].plot(steps, gained[0], marker="o")
            panels[2].fill_between(steps, gained[1], gained[2], alpha=0.2, linewidth=0)
            panels[2].axhline(0, color="tab:gray", linestyle=":")
        panels[2].set(xlabel="step", title="margin gain on held-out answers (95%)")
        made.append(("The run", _encode_figure(figure)))
    if found.style:
        figure, axes = pyplot.subplots(figsize=(6, 0.5 + 0.4 * len(found.style)), layout="constrained")
        names = [row.name for row in found.style][::-1]
        for shift, when, colour in ((-0.18, "before", "tab:gray"), (0.18, "after", "tab:blue")):
            values = [getattr(row, when) / (max(row.before, row.after) or 1) for row in found.style][::-1]
            axes.barh(np.arange(len(names)) + shift, values, height=0.34, color=colour, label=when)
        axes.set_yticks(range(len(names)), names)
        axes.set(title="style of answers to held-out prompts (larger value = 1)")
        axes.legend(frameon=False, fontsize=8)
        made.append(("What changed", _encode_figure(figure)))
    if found.reward_model:
        figure, axes = pyplot.subplots(figsize=(3.6, 3.4), layout="constrained")
        said, true, counts = zip(*found.reward_model.calibration, strict=True)
        axes.plot([0, 1], [0, 1], color="tab:gray", linestyle=":")
        axes.scatter(said, true, s=[8 + 2 * count for count in counts])
        axes.set(xlabel="predicted chance of a like", ylabel="share of likes", title="on unseen questions")
        made.append(("Calibration of the reward model", _encode_figure(figure)))
    return made


def _encode_figure(figure: Any) -> str:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
