"""Profiler ranges, and the measured runs under `results/`."""

if __name__ != "flashtalk_rt.profiles":
    raise ImportError(
        f"this folder was imported as {__name__!r}; it is the package flashtalk_rt.profiles "
        "(pip install -e . maps it there), so import it under that name"
    )
