"""The latency suite.

`measure` takes any model; `published_model` makes the 14B one with random weights, on the device.
"""

from .models import published_model
from .report import plot, table
from .suite import Plan, measure

__all__ = ["Plan", "measure", "plot", "published_model", "table"]
