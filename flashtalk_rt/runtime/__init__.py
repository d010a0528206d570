"""One stream from audio to frames: the engine runs chunks, a session holds a stream's state."""

from .engine import Engine
from .session import Chunk, Session

__all__ = ["Chunk", "Engine", "Session"]
