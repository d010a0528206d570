"""`flashtalk bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..cli import say, show
from ..files import check_output
from ..options import PRECISION_HELP, check_settings
from ..profiles.budgets import load_budgets
from ..profiles.record import write_result
from .baselines import Baselines, Plan
from .models import published_model
from .report import check_plot, table
from .report import plot as draw
from .suite import measure

app = typer.Typer(add_completion=False)


@app.command()
def bench(
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH: 768x448 or 720x416, say.")] = "768x448",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 4,
    precision: Annotated[str, typer.Option(help=PRECISION_HELP)] = "bf16",
    chunks: Annotated[int, typer.Option(min=1, help="Chunks to time, after three to warm up.")] = 10,
    out: Annotated[Path, typer.Option(help="The result, a JSON file; overwritten.")] = Path("bench.json"),
    plot: Annotated[Path | None, typer.Option(help="A picture of it too (needs matplotlib).")] = None,
) -> None:
    """Time the 14B model, random weights, beside its budgets, its floors and plain torch.compile.

    Needs a CUDA device of 80 GB. Exits with 2 when a figure is over its budget.
    """
    height, width, chosen = check_settings(size, steps, precision)
    check_output(out, "--out")
    if plot is not None:
        check_output(plot, "--plot")
        check_plot(plot)
    assert height and width and chosen  # all three have a default
    model = published_model(None, height, width)
    record = measure(model, steps, chosen, height, width, Baselines(Plan(chunks=chunks)), log=say)
    budgets = load_budgets(record["device"])
    write_result(out, record)
    show(table(record, budgets))
    if plot is not None:
        draw(record, plot)
    if budgets is not None:
        budgets.check(record)
