"""CUDA graphs over callables and their static buffers, and Triton compilation ahead of both; knows nothing of
models."""

if __name__ != "flashtalk_rt.graphs":
    raise ImportError(
        f"this folder was imported as {__name__!r}; it is the package flashtalk_rt.graphs "
        "(pip install -e . maps it there), so import it under that name"
    )
