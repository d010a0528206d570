"""Audio files in, video files out, both a block at a time: memory does not grow with length."""

from .audio import AudioReader
from .video import VideoWriter, check_output, playable_s

__all__ = ["AudioReader", "VideoWriter", "check_output", "playable_s"]
