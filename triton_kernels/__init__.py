"""Triton kernels and their launchers, a file an op family.  Imported only where one is launched.

A launcher takes and returns tensors, allocates its outputs and checks nothing that `ops` checked before.
Each file lists in `KERNELS` how its kernels are specialised, so that they can be compiled without a GPU.
"""

if __name__ != "flashtalk_rt.triton_kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; it is the package flashtalk_rt.triton_kernels "
        "(pip install -e . maps it there), so import it under that name"
    )
