"""The loss curve as a picture one would show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from runner.rundir.directory import RunDir
from runner.rundir.json_files import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURES = ("reward_margin", "reward")
"""Metrics drawn below the loss: the first that a run has."""
BLUE, ORANGE, GREY = "#2f6fb0", "#d9822b", "#8a8f98"


def plot_loss(run: RunDir, summary: Summary) -> None:
    """Write `loss.png`: loss per step with its running mean, held-out loss, learning rate below."""
    import matplotlib  # heavy (0.4 s): only a run that trained draws

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = list(run.metrics())
    steps = [line["step"] for line in lines]
    losses = [line["loss"] for line in lines]
    measure = next((name for name in MEASURES if any(name in line for line in lines)), None)
    heights = [4, 2, 1] if measure else [4, 1]
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(9, 5.4 + 1.6 * (measure is not None)), dpi=140, sharex=True, height_ratios=heights,
        constrained_layout=True,
    )  # fmt: skip
    top, bottom = axes[0], axes[-1]
    if measure:
        _draw_measure(axes[1], measure, lines, list(run.evals()))
    top.plot(steps, losses, color=BLUE, alpha=0.35, linewidth=1, label="each step")
    top.plot(steps, running_mean(losses), color=BLUE, linewidth=2, label="running mean")
    held = [(line["step"], line["loss"]) for line in run.evals()]
    if held:
        top.plot(
            *zip(*held, strict=True), color=ORANGE, marker="o", linewidth=1.2 if len(held) > 2 else 0, label="held out"
        )
    if min(losses) > 0 and max(losses) / min(losses) > 20:
        top.set_yscale("log")
    top.set_ylabel("loss")
    top.legend(frameon=False)
    top.set_title(_title(summary), loc="left", fontsize=11)
    bottom.plot(steps, [line["learning_rate"] for line in lines], color=GREY, linewidth=1.5)
    bottom.set_ylabel("learning rate")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_xlabel("step")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e8eb", linewidth=0.8)
    figure.savefig(run.path / "loss.png")
    pyplot.close(figure)


def _draw_measure(
    axis: Axes, name: str, lines: Sequence[Mapping[str, object]], held: Sequence[Mapping[str, object]]
) -> None:
    """Draw the objective's metric."""
    steps, values = zip(*((line["step"], line[name]) for line in lines if name in line), strict=True)
    axis.plot(steps, values, color=BLUE, alpha=0.35, linewidth=1)
    axis.plot(steps, running_mean(list(values)), color=BLUE, linewidth=2)
    points = [(line["step"], line[name]) for line in held if name in line]
    if points:
        axis.plot(*zip(*points, strict=True), color=ORANGE, marker="o", linewidth=1.2 if len(points) > 2 else 0)
    axis.set_ylabel(name.replace("_", " "))


def _title(summary: Summary) -> str:
    text = f"{summary['model']} · {summary['method']} · {summary['data']}"
    after, before = summary["eval"]["after"], summary["eval"]["before"]
    if "num_exact" in after:
        count = after["num_prompts"]
        text += f"   —   {before['num_exact']}/{count} → {after['num_exact']}/{count} held-out prompts answered exactly"
    return text


def running_mean(values: list[float], share: float = 0.9) -> list[float]:
    """Exponential running mean, corrected for its start."""
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = share * total + (1 - share) * value, share * weight + (1 - share)
        means.append(total / weight)
    return means
