"""Every Triton kernel compiles for sm_90 on a machine without a GPU, in every listed specialization."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path.stem
    for path in (ROOT / "triton_kernels").glob("*.py")
    if path.stem not in ("__init__", "specialization")
)

# In a process of its own: this one defined the kernels for the interpreter.
COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
module = importlib.import_module(f"flashtalk_rt.triton_kernels.{sys.argv[1]}")
defined = {v.fn.__name__ for v in vars(module).values()
           if isinstance(v, triton.JITFunction) and v.fn.__module__ == module.__name__}
shared = {}
for s in getattr(module, "KERNELS", ()):  # activation has only helpers
    signature = {name: s.signature.get(name, "constexpr") for name in s.kernel.arg_names}
    options = {"num_warps": s.num_warps, "num_stages": s.num_stages}
    # As torch's tensors are: aligned, and so are the strides of wide rows.
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
               if kind != "constexpr" and (kind.startswith("*") or "stride" in name
                                           or name.endswith(("_batch", "_row", "_head")))}
    source = ASTSource(s.kernel, signature=signature, constexprs=dict(s.constants), attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    shared.setdefault(s.kernel.fn.__name__, []).append([compiled.metadata.shared, len(compiled.asm["cubin"])])
json.dump({"defined": sorted(defined), "compiled": shared, "helpers": sorted(getattr(module, "HELPERS", ()))},
          sys.stdout)
"""
SHARED_LIMIT_BYTES = 227 * 1024  # of an sm_90 block


@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_for_sm_90(module: str) -> None:
    import json

    done = subprocess.run(
        [sys.executable, "-c", COMPILE, module],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    # A @triton.jit function is a kernel of its own, listed in KERNELS, or a device function in HELPERS.
    assert set(found["defined"]) == {*found["compiled"], *found["helpers"]}
    for name, forms in found["compiled"].items():
        for shared_bytes, size_bytes in forms:
            assert shared_bytes <= SHARED_LIMIT_BYTES, name
            assert size_bytes > 0
