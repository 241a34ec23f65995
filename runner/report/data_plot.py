"""The lengths of a data set as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.errors import Problem, RequestError
from runner.report.plan_plot import GREY, GRID, INK, RED, check_picture, drawing


def plot_lengths(found: Mapping[str, Any], file: Path) -> None:
    """Draw the histogram of `stats` into `file`, with `train.max_length` and the suggested one as lines.

    RequestError where the file's name ends in no picture's, it cannot be written, or matplotlib is not installed.
    """
    check_picture(file)
    pyplot = drawing()
    figure, axis = pyplot.subplots(figsize=(9, 4.5), dpi=140)
    try:
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
        title = f"{found['num_rows']:,} rows, {found['num_tokens']:,} tokens"
        axis.set_title(title, loc="left", fontweight="bold", color=INK)
        axis.set_xlabel("tokens of a row", color=GREY)
        axis.set_ylabel("rows", color=GREY)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color=GRID)
        figure.tight_layout()
        figure.savefig(file, facecolor="white")
    except OSError as error:
        what = f"{file} cannot be written: {error.strerror or error}"
        raise RequestError(Problem(what, "command line", "name a file in a folder of yours")) from None
    finally:
        pyplot.close(figure)
