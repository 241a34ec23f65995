"""The loss curve as a picture one would show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runner.rundir.directory import RunDir
from runner.rundir.json_files import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURES = ("reward_margin", "reward")
"""Metrics drawn below the loss: the first that a run has."""
KEPT = 0.9
"""Share of the running mean that the next step leaves."""
BLUE, ORANGE, GREY = "#2f6fb0", "#d9822b", "#8a8f98"


def plot_loss(run: RunDir, summary: Summary) -> None:
    """Write `loss.png`: loss per step with its running mean, held-out loss, learning rate below."""
    import matplotlib  # heavy (0.4 s): only a run that trained draws

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines, held = list(run.metrics()), list(run.evals())
    losses = [line["loss"] for line in lines]
    measure = next((name for name in MEASURES if any(name in line for line in lines)), None)
    heights = [4, 2, 1] if measure else [4, 1]
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(9, 5.4 + 1.6 * (measure is not None)), dpi=140, sharex=True, height_ratios=heights,
        constrained_layout=True,
    )  # fmt: skip
    top, bottom = axes[0], axes[-1]
    _draw(top, "loss", lines, held)
    if measure:
        _draw(axes[1], measure, lines, held)
    if min(losses) > 0 and max(losses) / min(losses) > 20:
        top.set_yscale("log")
    top.legend(frameon=False)
    top.set_title(_title(summary), loc="left", fontsize=11)
    bottom.plot(
        *zip(*((line["step"], line["learning_rate"]) for line in lines), strict=True), color=GREY, linewidth=1.5
    )
    bottom.set_ylabel("learning rate")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_xlabel("step")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e8eb", linewidth=0.8)
    figure.savefig(run.path / "loss.png")
    pyplot.close(figure)


def _draw(axis: Axes, name: str, lines: Sequence[Mapping[str, Any]], held: Sequence[Mapping[str, Any]]) -> None:
    """Draw a metric: of each step with its running mean, and as it was measured on held-out rows."""
    steps, values = zip(*((line["step"], line[name]) for line in lines if name in line), strict=True)
    axis.plot(steps, values, color=BLUE, alpha=0.35, linewidth=1, label="each step")
    axis.plot(steps, running_mean(values), color=BLUE, linewidth=2, label="running mean")
    if points := [(line["step"], line[name]) for line in held if name in line]:
        width = 1.2 if len(points) > 2 else 0
        axis.plot(*zip(*points, strict=True), color=ORANGE, marker="o", linewidth=width, label="held out")
    axis.set_ylabel(name.replace("_", " "))


def _title(summary: Summary) -> str:
    text = f"{summary['model']} · {summary['method']} · {summary['data']}"
    after, before = summary["eval"]["after"], summary["eval"]["before"]
    if "num_exact" in after:
        count = after["num_prompts"]
        text += f"   —   {before['num_exact']}/{count} → {after['num_exact']}/{count} held-out prompts answered exactly"
    return text


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential running mean, corrected for its start."""
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = KEPT * total + (1 - KEPT) * value, KEPT * weight + (1 - KEPT)
        means.append(total / weight)
    return means
