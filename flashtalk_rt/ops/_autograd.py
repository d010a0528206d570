"""Gradients of memory-bound ops: through their plain meaning, computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef  # exported from torch.library, but not for mypy


def differentiate_through(op: CustomOpDef, reference: Callable[..., tuple[Tensor, ...]]) -> None:
    """Register the gradient of `op` as that of `reference`, which takes the same arguments.

    The op's outputs are `reference`'s, possibly followed by others without a gradient.  Only the inputs
    are kept for the backward pass.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.others = tuple(None if isinstance(x, Tensor) else (x,) for x in inputs)

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        needed = ctx.needs_input_grad
        inputs = [
            next(saved).detach().requires_grad_(needed[i]) if other is None else other[0]
            for i, other in enumerate(ctx.others)
        ]
        with torch.enable_grad():
            outputs = reference(*inputs)
        pairs = [
            (out, gradient)
            for out, gradient in zip(outputs, gradients, strict=False)
            if gradient is not None and out.requires_grad
        ]
        wanted = [x for i, x in enumerate(inputs) if needed[i]]
        found = iter(
            torch.autograd.grad([out for out, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        )
        return tuple(next(found) if need else None for need in needed)

    op.register_autograd(backward, setup_context=setup_context)
