"""Pictures of a plan's memory and of the lengths of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import Problem, RequestError
from runner.plan.plan import Plan
from runner.report.plan_terms import PHASES, gib, heading, present, segments
from runner.report.text import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, GRID, RED = "#24292f", "#6b7280", "#e6e8eb", "#c0392b"
FORMATS = (".png", ".svg", ".pdf")


@contextmanager
def drawn(file: Path, width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure and its axes, written into `file` at the end of the block.

    RequestError where the folder is not there, the file's name ends in none of `FORMATS`, it cannot be written, or
    matplotlib is not installed.
    """
    check_picture(file)
    try:
        import matplotlib  # heavy (0.4 s), and not needed by anyone who only reads
    except ImportError:
        what = "a picture needs matplotlib, which is not installed"
        raise RequestError(Problem(what, "command line", "pip install matplotlib")) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(width, height), dpi=140)
    try:
        yield figure, axis
        figure.savefig(file, facecolor="white")
    except OSError as error:
        what = f"{file} cannot be written: {error.strerror or error}"
        raise RequestError(Problem(what, "command line", "name a file in a folder of yours")) from None
    finally:
        pyplot.close(figure)


def plot_plan(plan: Plan, file: Path) -> None:
    """Draw a plan into `file`: a stacked bar per phase in GiB against the capacity of one GPU.

    RequestError as `drawn`.
    """
    with drawn(file, 9.6, 5) as (figure, axis):
        _bars(axis, plan)
        _capacity(axis, plan)
        _range(axis, plan)
        _frame(figure, axis, plan)


def check_picture(file: Path) -> None:
    """RequestError for a name of no picture, or in no folder."""
    if file.suffix.lower() not in FORMATS:
        what = f"{file}: the picture's format is not known"
        raise RequestError(Problem(what, "command line", f"a name that ends in {', '.join(FORMATS)}"))
    if not file.parent.is_dir():
        what = f"{file}: there is no folder {file.parent}"
        raise RequestError(Problem(what, "command line", f"mkdir -p {file.parent}"))


def _bars(axis: Axes, plan: Plan) -> None:
    """One bar per phase, the first on top, and its number."""
    families = present(plan)
    capacity, high = plan.capacity_gib, plan.peak_gib["high"]
    gap = 0.011 * max(high, capacity or 0.0)
    starts = dict.fromkeys(PHASES, 0.0)
    for family in families:
        sizes = [segments(plan.phases[phase]).get(family, 0.0) for phase in PHASES]
        axis.barh(
            list(PHASES), sizes, left=list(starts.values()), height=0.62, color=family.colour, label=family.name,
            edgecolor="white", linewidth=0.6,
        )  # fmt: skip
        starts = {phase: start + size for (phase, start), size in zip(starts.items(), sizes, strict=True)}
    for row, (phase, total) in enumerate(starts.items()):
        peak, over = phase == plan.peak_phase, capacity is not None and total > capacity
        place = (high if peak else total) + gap
        if capacity is not None and place < capacity + gap and capacity < place + 4 * gap:
            place = capacity + gap  # else the line would go through the number
        axis.text(
            place, row, gib(total), va="center", fontsize=10, zorder=5, fontweight="bold" if peak else "normal",
            color=RED if over else INK,
        )  # fmt: skip


def _capacity(axis: Axes, plan: Plan) -> None:
    """The line that no bar may cross, and the room beyond it."""
    capacity, high = plan.capacity_gib, plan.peak_gib["high"]
    axis.set_xlim(0, 1.1 * max(high, capacity or 0.0))
    if capacity is None:
        return
    axis.axvspan(capacity, axis.get_xlim()[1], color=RED, alpha=0.06, linewidth=0, zorder=0)
    axis.axvline(capacity, color=RED, linewidth=1.6, zorder=4)
    whose = "per GPU" if plan.num_gpus > 1 else "of the GPU" if plan.num_gpus else "of the machine"
    right = capacity > axis.get_xlim()[1] / 2
    axis.annotate(
        f"{gib(capacity)} GiB {whose}", (capacity, 1), xytext=(-2 if right else 2, 5), textcoords="offset points",
        xycoords=("data", "axes fraction"), ha="right" if right else "left", color=RED, fontsize=9.5,
    )  # fmt: skip


def _range(axis: Axes, plan: Plan) -> None:
    """From the low to the high estimate, on the phase that is the peak; nothing where its ends would touch."""
    peak = plan.peak_gib
    if peak["high"] - peak["low"] < 0.012 * axis.get_xlim()[1]:
        return
    middle = peak["expected"]
    spread = [[max(0.0, middle - peak["low"])], [max(0.0, peak["high"] - middle)]]
    axis.errorbar(
        [middle], [list(PHASES).index(plan.peak_phase)], xerr=spread, fmt="none", ecolor=INK, elinewidth=1.6,
        capsize=5, capthick=1.6, zorder=6,
    )  # fmt: skip


def _frame(figure: Figure, axis: Axes, plan: Plan) -> None:
    """Title, legend and axes."""
    peak, title = plan.peak_gib, _title(plan)
    figure.subplots_adjust(left=0.1, right=0.97, top=0.8, bottom=0.2)
    size = min(13.0, 13.0 * 80 / len(title))  # 80 characters are as wide as the picture
    figure.text(0.03, 0.935, title, fontsize=size, fontweight="bold", color=INK if plan.fits else RED)
    each = " on each GPU" if plan.num_gpus > 1 else ""
    when = f"expected peak{each} {PHASES[plan.peak_phase]}, between {gib(peak['low'])} and {gib(peak['high'])} GiB"
    figure.text(0.03, 0.885, when[0].upper() + when[1:], fontsize=10, color=GREY)
    axis.invert_yaxis()
    axis.set_xlabel("GiB", color=GREY)
    axis.tick_params(length=0, labelsize=10.5, colors=INK)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.spines["left"].set_color(GREY)
    axis.set_axisbelow(True)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    handles, names = axis.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="lower center", ncols=len(names), frameon=False, fontsize=9.5, handlelength=1.1,
        handleheight=1.1, columnspacing=1.4, handletextpad=0.5,
    )  # fmt: skip


def _title(plan: Plan) -> str:
    """`Mistral 7B, full, 3 × H100, ZeRO-3: fits, 43.0 of 79.7 GiB`."""
    expected, capacity = plan.peak_gib["expected"], plan.capacity_gib
    if capacity is None:
        return f"{heading(plan)}: {gib(expected)} GiB"
    if expected > capacity:
        return f"{heading(plan)}: does not fit, {gib(expected)} GiB where there are {gib(capacity)}"
    answer = "fits" if plan.fits else "does not fit in main memory"
    return f"{heading(plan)}: {answer}, {gib(expected)} of {gib(capacity)} GiB"


def plot_lengths(found: Mapping[str, Any], file: Path) -> None:
    """Draw the histogram of `stats` into `file`, with `train.max_length` and the suggested one as lines.

    RequestError as `drawn`.
    """
    with drawn(file, 9, 4.5) as (figure, axis):
        classes = found["histogram"]
        widths = [one["to"] - one["from"] for one in classes]
        axis.bar(
            [one["from"] for one in classes], [one["rows"] for one in classes], widths, align="edge", color="#2f6f9f",
            edgecolor="white", linewidth=0.6,
        )  # fmt: skip
        for value, name, colour in (
            (found["max_length"], "train.max_length", RED),
            (found["suggested_max_length"], "suggested", GREY),
        ):
            if value <= classes[-1]["to"]:
                axis.axvline(value, color=colour, linewidth=1.4, label=f"{name} {value:,}")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
        title = f"{counted(found['num_rows'], 'row')}, {counted(found['num_tokens'], 'token')}"
        axis.set_title(title, loc="left", fontweight="bold", color=INK)
        axis.set_xlabel("tokens of a row", color=GREY)
        axis.set_ylabel("rows", color=GREY)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color=GRID)
        figure.tight_layout()
