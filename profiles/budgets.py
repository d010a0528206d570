"""Latency budgets as data: one TOML file a device, chosen by the device's name."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FlashTalkError, InputError
from .record import slug

FOLDER = Path(__file__).parent / "budgets"


class BudgetError(FlashTalkError):
    """A measured figure is over its budget."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one figure may come to, in the unit that its name ends with."""

    figure: str
    target: float
    precision: str | None = None  # None: any
    steps: int | None = None
    stretch: float | None = None
    floor_ratio: float | None = None  # of the figure to the floor measured in the same run
    published: float | None = None  # the published code on the same device

    def breaches(self, measured: float, floor: float | None) -> list[str]:
        """One line each way in which `measured` exceeds the budget."""
        found = []
        if not measured <= self.target:  # so that NaN is a breach
            found.append(f"{self.figure} is {measured:.6g}, its budget {self.target:.6g}")
        if self.floor_ratio is not None and floor is not None and not measured <= self.floor_ratio * floor:
            found.append(
                f"{self.figure} is {measured:.6g}, {measured / floor:.3g} times its floor {floor:.6g}; "
                f"its budget is {self.floor_ratio:.3g} times"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Budgets:
    """One device's file."""

    device: str
    gpus: int
    height: int  # pixels
    width: int
    budgets: tuple[Budget, ...]
    ops: Mapping[str, float] = dataclasses.field(default_factory=dict)  # op -> ms of the call that is timed

    def _hold(self, record: Mapping[str, Any]) -> bool:
        return all(record[name] == getattr(self, name) for name in ("gpus", "height", "width"))

    def of(self, record: Mapping[str, Any]) -> dict[str, Budget]:
        """Figure -> the budget that holds for a result's size, GPUs, precision and steps; without the
        figures that have none."""
        if not self._hold(record):
            return {}
        return {
            budget.figure: budget
            for budget in self.budgets
            if budget.precision in (None, record["precision"]) and budget.steps in (None, record["steps"])
        }

    def of_ops(self, record: Mapping[str, Any]) -> dict[str, Budget]:
        """Op -> the budget of its milliseconds, under the name that they have in the result; as `of`."""
        if not self._hold(record):
            return {}
        return {op: Budget(f"ops.{op}.ms", target_ms) for op, target_ms in self.ops.items()}

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise BudgetError, naming every figure and op of a latency result over its budget, and every figure
        that has one and was not measured."""
        found = []
        for figure, budget in self.of(record).items():
            if figure in record["figures"]:
                found += budget.breaches(record["figures"][figure], record["floors"].get(figure))
            else:
                found.append(f"{figure} has a budget and was not measured")
        rows = record.get("ops", {})  # a result may do without
        for op, budget in self.of_ops(record).items():
            if op in rows:
                found += budget.breaches(rows[op]["ms"], None)
        if found:
            raise BudgetError(f"over budget on {self.device}: {'; '.join(found)}")


def budget_file(device: str) -> Path:
    """Where the budgets of a device of that name are, or would be."""
    return FOLDER / f"{slug(device)}.toml"


def load_budgets(device: str) -> Budgets | None:
    """The budgets of the device of that name (as torch gives it); None where there is no file for it.

    Raises InputError naming the file and what is wrong in it."""
    path = budget_file(device)
    if not path.is_file():
        return None
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        budgets = tuple(Budget(**entry) for entry in data.pop("budget"))
        ops = {op: float(target_ms) for op, target_ms in data.pop("ops", {}).items()}
        return Budgets(**data, budgets=budgets, ops=ops)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"budgets {path}: {error}") from error
