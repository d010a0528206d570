"""flashtalk_rt: a talking video from a portrait and speech, in real time.

    import flashtalk_rt as ft

    model = ft.load("embedded")
    session = ft.Engine(model).session(image="face.png", seed=0)
    session.push_audio(samples)
    for chunk in session:
        ...

Names are imported when first used, so that `flashtalk --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops
    from .errors import CheckpointError, FlashTalkError, InputError, OutputError
    from .modules.convert import convert
    from .modules.model import Model
    from .modules.weights import load
    from .runtime import Chunk, Engine, Session

__version__ = "0.1.0"

_HOMES = {
    "CheckpointError": "errors",
    "FlashTalkError": "errors",
    "InputError": "errors",
    "OutputError": "errors",
    "Model": "modules.model",
    "convert": "modules.convert",
    "load": "modules.weights",
    "Chunk": "runtime",
    "Engine": "runtime",
    "Session": "runtime",
}

__all__ = [
    "CheckpointError",
    "Chunk",
    "Engine",
    "FlashTalkError",
    "InputError",
    "Model",
    "OutputError",
    "Session",
    "convert",
    "load",
    "ops",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
