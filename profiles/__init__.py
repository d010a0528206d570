"""Profiler ranges, timing, floors, budgets and result files; the measured runs are under `results/`."""

if __name__ != "flashtalk_rt.profiles":
    raise ImportError(
        f"this folder was imported as {__name__!r}; it is the package flashtalk_rt.profiles "
        "(pip install -e . maps it there), so import it under that name"
    )
