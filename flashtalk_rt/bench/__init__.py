"""The latency suite.

`measure` takes any model; `published_model` makes the 14B one with random weights, on the device.
"""

from .baselines import Baselines, Plan
from .models import published_model
from .quality import fp8_quality
from .report import plot, table
from .suite import measure

__all__ = ["Baselines", "Plan", "fp8_quality", "measure", "plot", "published_model", "table"]
