"""Query and key on their way to attention: normalised, split into heads, turned to their place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from . import reference
from ._autograd import differentiate_through
from ._dispatch import TORCH, TRITON, Case, OpSpec, backend_for


@torch.library.custom_op("flashtalk_rt::qk_norm_rope", mutates_args=())
def _kernel(x: Tensor, weight: Tensor, table: Tensor | None, num_heads: int, eps: float) -> Tensor:
    from ..triton_kernels import norms

    return norms.qk_norm_rope(x, weight, table, num_heads, eps)


@_kernel.register_fake
def _(x: Tensor, weight: Tensor, table: Tensor | None, num_heads: int, eps: float) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], num_heads, x.shape[2] // num_heads)


def _plain(x: Tensor, weight: Tensor, table: Tensor | None, num_heads: int, eps: float) -> tuple[Tensor, ...]:
    return (reference.qk_norm_rope(x, weight, table, num_heads, eps),)


differentiate_through(_kernel, _plain)


def qk_norm_rope(
    x: Tensor,
    weight: Tensor,
    table: Tensor | None,
    num_heads: int,
    eps: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """RMSNorm over the full width, head split and interleaved-pair rotation of a query or key.

    x [B, L, H*D], possibly a slice of a wider projection; weight [H*D]; table [L, D/2, 2] float32 from
    `rope_table`, or None for the norm and the split alone.  Returns [B, L, H, D], contiguous, in x's dtype.
    InputError: shapes that do not fit.
    """
    _, length, width = x.shape
    if width % num_heads or weight.shape != (width,):
        raise InputError(f"qk_norm_rope: {width} channels, {num_heads} heads, weight {tuple(weight.shape)}")
    if table is not None and table.shape != (length, width // num_heads // 2, 2):
        raise InputError(
            f"qk_norm_rope: x is {tuple(x.shape)} in {num_heads} heads, the table {tuple(table.shape)}"
        )
    if backend_for(SPEC, x.device, x.dtype, wanted=backend) == "triton":
        x = x if x.stride(-1) == 1 else x.contiguous()
        table = None if table is None else table.contiguous()
        out: Tensor = _kernel(x, weight.contiguous(), table, num_heads, eps)
        return out
    return reference.qk_norm_rope(x, weight, table, num_heads, eps)


def _case(
    batch: int, grid: tuple[int, int, int], heads: int, dim: int, *, rotate: bool = True, of: int = 1
) -> Case:
    """`of`: x is the middle of that many projections in one tensor."""
    length, width = grid[0] * grid[1] * grid[2], heads * dim

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        start = of // 2 * width
        return {
            "x": normal(batch, length, of * width).to(dtype)[..., start : start + width],
            "weight": (1 + 0.2 * normal(width)).to(dtype),
            "table": reference.rope_table(grid, dim, device) if rotate else None,
            "num_heads": heads,
            "eps": 1e-6,
        }

    parts = [f"{batch}x{length}x{heads}x{dim}", *["norm only"] * (not rotate), *["strided"] * (of > 1)]
    return Case(" ".join(parts), make)


SPEC = OpSpec(
    "qk_norm_rope",
    (TRITON, TORCH),
    function=qk_norm_rope,
    reference=reference.qk_norm_rope,
    cases=(
        _case(2, (2, 1, 3), 3, 16, of=3),
        _case(2, (1, 1, 1), 5, 20),
        _case(1, (3, 1, 1), 5, 128, of=2),
        _case(2, (1, 1, 3), 16, 16),  # two parts of a row
        _case(2, (1, 5, 1), 3, 24, rotate=False, of=3),
    ),
    workload=_case(1, (9, 48, 28), 40, 128, of=3),
    gradients=("x", "weight"),
)
