"""Tables of pods, GPUs and volumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from runner.report.invocation import as_invoked

_STYLE = {"RUNNING": "green", "STOPPED": "yellow", "CREATE_UNKNOWN": "red", "TERMINATING": "red", "ELSEWHERE": "cyan"}


def print_pods(console: Console, rows: Sequence[Any], now: float | None = None) -> None:
    """Every pod of this project: state, cost so far, age, when it ends itself."""
    now = time.time() if now is None else now
    if not rows:
        console.print("No pods: nothing is rented.", highlight=False)
        return
    wide = console.width >= 120
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("pod", no_wrap=True)  # to be copied
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("RunPod", "GPU") if wide else ():
        table.add_column(name)
    for name in ("$/h", "cost", "age", "ends in"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        style = _STYLE.get(row.state, "")
        state = f"[{style}]{row.state}[/{style}]" if style else row.state
        table.add_row(
            row.pod_id or "–", escape(row.run_id or row.name), state,
            *((row.status or "–", escape(row.gpu or "–")) if wide else ()),
            f"{row.usd_per_hour:.2f}", f"${row.usd:.2f}", _hours(row.age_hours),
            "–" if row.deadline is None else _hours((row.deadline - now) / 3600),
        )  # fmt: skip
    console.print(table)
    total = sum(row.usd_per_hour for row in rows if row.status is not None)
    end = as_invoked("python -m runner pods terminate RUN")
    console.print(f"\n[dim]${total:.2f} an hour in all. End one: {end}[/dim]", highlight=False)


def watch_gpus(console: Console, look: Callable[[], Sequence[object]], every: float | None) -> None:
    """A table of GPUs in use, once, or again `every` so many seconds until Ctrl-C."""
    table = _gpus_in_use(look())
    if every is None:
        console.print(table)
        return
    with Live(table, console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            time.sleep(every)
            live.update(_gpus_in_use(look()), refresh=True)


def _gpus_in_use(gpus: Sequence[Any]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("GPU")
    for name in ("use", "memory, GiB", "power, W", "°C"):
        table.add_column(name, justify="right", no_wrap=True)
    for gpu in gpus:
        used = "–" if gpu.memory_used_mib is None else f"{gpu.memory_used_mib / 1024:.1f}"
        whole = "–" if gpu.memory_total_mib is None else f"{gpu.memory_total_mib / 1024:.1f}"
        share = "–" if gpu.utilisation_percent is None else f"{gpu.utilisation_percent:.0f}%"
        power = f"{_whole(gpu.power_w)} of {_whole(gpu.power_limit_w)}"
        table.add_row(f"{gpu.index} {escape(gpu.name)}", share, f"{used} of {whole}", power, _whole(gpu.temperature_c))
    return table


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def print_gpus(console: Console, rows: Sequence[Mapping[str, Any]], cloud: str | None) -> None:
    """Print the GPUs for rent."""
    wide = console.width >= 140
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("GPU id", overflow="fold")
    for name in ("GB", "secure", "community"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("stock", "hw="):
        table.add_column(name, no_wrap=True)
    table.add_column("in")
    for name in ("RAM", "vCPUs") if wide else ():
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("most", "holds, at most") if wide else ():
        table.add_column(name)
    every = {center for row in rows for center in row["data_centers"]}
    for row in rows:
        centers = row["data_centers"]
        place = "all below" if len(every) > 1 and len(centers) == len(every) else ", ".join(centers) or "–"
        table.add_row(
            escape(row["id"]), str(row["memory_gb"]), _usd(row["secure_usd"]), _usd(row["community_usd"]),
            (row["stock"] or "–").lower(), row["hw"] or "–", place,
            *((f"{row['host_memory_gib'] or '–'}", f"{row['vcpus'] or '–'}") if wide else ()),
            *((str(row["max"] or "–"), row["holds"] or "–") if wide else ()),
        )  # fmt: skip
    console.print(table)
    where = f" in the {cloud} cloud" if cloud else ""
    beside = "; RAM (GiB) and vCPUs with each GPU, at least" if wide else ""
    if every:
        console.print(f"\n[dim]Data centres: {', '.join(sorted(every))}[/dim]", highlight=False)
    hint = f'stock{where}{beside}. Take one: hw=NAME, or where.gpu_types="[ID, …]"'
    console.print(f"\n[dim]US$ per GPU and hour, as RunPod says now; {hint}[/dim]", highlight=False)


def print_volumes(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Network volumes."""
    if not rows:
        console.print("No network volumes. Make one: python -m runner volumes create NAME --size 100 --data-center …")
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("id", "name", "data centre", "type"):
        table.add_column(name, no_wrap=True)
    for name in ("GB", "$/month"):
        table.add_column(name, justify="right")
    for row in rows:
        size = str(row["size_gb"]), f"{row['usd_per_month']:.2f}"
        table.add_row(row["id"], escape(row["name"]), row["data_center"], row["type"].lower(), *size)
    console.print(table)


def print_templates(console: Console, rows: Sequence[dict[str, Any]], text: str) -> None:
    """Templates that a pod can be made of."""
    if not rows:
        console.print(f"No template for pods has {escape(text)!r} in its name, image or id.", soft_wrap=True)
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("id", no_wrap=True)
    for name in ("name", "image"):
        table.add_column(name, overflow="fold")
    table.add_column("of", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(row[key]) for key in ("id", "name", "image", "source")))
    console.print(table)
    hint = "where.template=ID takes one. Of official, verified and community ones RunPod lists 100 each."
    console.print(f"\n[dim]{hint}[/dim]", highlight=False, soft_wrap=True)


def _usd(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _hours(hours: float) -> str:
    if hours < 0:
        return "over"
    minutes = round(hours * 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
