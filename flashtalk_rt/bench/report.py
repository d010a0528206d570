"""A latency result as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from ..errors import InputError, OutputError
from ..profiles.budgets import Budgets, budget_file
from ..profiles.record import FIGURES

STAGES = ("dit_step_ms", "vae_decode_ms", "vae_encode_ms", "color_ms")
UNITS = {"ms": "ms", "gb": "GB"}
FIRST_FRAME = "first frame: its pixels on the host; Session hands out whole chunks; audio features made ahead"
P95 = "p95: of fewer than 20 chunks, the largest"
OP_FLOOR = (
    "floor: the bytes at a copy's rate, or the operations at the faster of a bare product's and attention's, "
    "whichever takes longer"
)


def number(value: float | None) -> str:
    """Four significant digits; "-" for what was not measured or does not exist."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def ratio(value: float, of: float | None) -> str:
    return "-" if not of else f"{value / of:.2f}"


def table(record: Mapping[str, Any], budgets: Budgets | None) -> RenderableType:
    """Median, p95, budget, floor, their ratio and plain path of every figure of a latency result, and of the
    ops that it has; says so where the device has no budgets, or none for what was measured."""
    held = budgets.of(record) if budgets is not None else {}
    shape = f"{record['height']} x {record['width']}, {record['steps']} steps, {record['precision']}"
    columns = (
        "",
        "unit",
        "median",
        "p95",
        "budget",
        "stretch",
        "floor",
        "x floor",
        "plain path",
        "published",
    )
    stages = Table(
        *columns,
        title=f"{record['device']}: {shape}",
        caption=f"{_about_budgets(record, budgets)}\n{FIRST_FRAME}\n{P95}",
    )
    for figure in (*FIGURES, *sorted(set(record["figures"]) - set(FIGURES))):
        value, budget = record["figures"][figure], held.get(figure)
        name, _, unit = figure.rpartition("_")
        floor = record["floors"].get(figure)
        stages.add_row(
            name.replace("_", " "),
            UNITS[unit],
            number(value),
            number(record["p95"].get(figure)),
            number(None if budget is None else budget.target),
            number(None if budget is None else budget.stretch),
            number(floor),
            ratio(value, floor),
            number(record["reference"].get(figure)),
            number(None if budget is None else budget.published),
            style="red" if budget is not None and budget.breaches(value, floor) else None,
        )
    return Group(stages, _ops_table(record, budgets)) if "ops" in record else stages


def _ops_table(record: Mapping[str, Any], budgets: Budgets | None) -> Table:
    held = budgets.of_ops(record) if budgets is not None else {}
    columns = ("op", "median ms", "p95", "budget", "floor", "x floor", "plain, compiled")
    rows = Table(*columns, title="Operators", caption=OP_FLOOR)
    for name, row in record["ops"].items():
        budget = held.get(name)
        rows.add_row(
            name,
            number(row["ms"]),
            number(row["p95_ms"]),
            number(None if budget is None else budget.target),
            number(row["floor_ms"]),
            ratio(row["ms"], row["floor_ms"]),
            number(row.get("reference_ms")),
            style="red" if budget is not None and budget.breaches(row["ms"], None) else None,
        )
    return rows


def _about_budgets(record: Mapping[str, Any], budgets: Budgets | None) -> str:
    if budgets is None:
        return f"no budgets for this device: there is no {budget_file(record['device']).name}"
    if not budgets.of(record):
        return f"no budgets for this size: {budgets.device}'s are for {budgets.height} x {budgets.width}"
    return f"budgets: {budget_file(record['device']).name}"


def check_plot(path: Path) -> None:
    """InputError without matplotlib, and for a file whose ending it does not know."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib; pip install matplotlib") from None
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise InputError(f"--plot {path} must end in .{', .'.join(sorted(known))}")


def plot(record: Mapping[str, Any], path: Path) -> None:
    """A PNG (or what `path` ends with) of the stages beside their floors and the plain path.  Raises as
    `check_plot`, and OutputError where it cannot write."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(STAGES)), STAGES, strict=True):
        bars = {
            "floor": record["floors"][name],
            "measured": record["figures"][name],
            "plain": record["reference"][name],
        }
        bars = {of: value for of, value in bars.items() if value is not None}
        drawn = axes.bar(list(bars), list(bars.values()), color=["#9a9a9a", "#2a6f97", "#d5a021"])
        axes.bar_label(drawn, labels=[number(value) for value in bars.values()])
        axes.set_title(name.removesuffix("_ms").replace("_", " "))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("ms, median")
    shape = f"{record['height']} x {record['width']}, {record['steps']} steps, {record['precision']}"
    figure.suptitle(f"{record['device']}, {shape}, commit {record['commit']}")
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"--plot {path} cannot be written: {error.strerror or error}") from error
