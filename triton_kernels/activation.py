"""SiLU and the tanh form of GELU, both as x / (1 + e): pointwise parts of other kernels."""

from __future__ import annotations

import triton
import triton.language as tl

NEGATIVE_LOG2_E = tl.constexpr(-1.4426950408889634)  # exp(-x) = exp2(x * NEGATIVE_LOG2_E)
# GELU's are -2 sqrt(2 / pi) log2(e), and 0.044715 times that.
LINEAR = tl.constexpr(-2.302208198)
CUBIC = tl.constexpr(-0.1029432397)


@triton.jit
def over_one_plus_exp2(x, exponent, FAST: tl.constexpr):
    """x / (1 + 2^exponent).  x 0 where the power is infinite; a NaN stays one.

    FAST, on a GPU: the reciprocal is one instruction, off by an ulp, where a division takes several.
    Triton's interpreter has no inline assembly.
    """
    below = 1.0 + tl.exp2(exponent)
    if FAST:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [below], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / below
    return x * inverse


@triton.jit
def silu(x, FAST: tl.constexpr):
    """x sigmoid(x) of float32."""
    return over_one_plus_exp2(x, x * NEGATIVE_LOG2_E, FAST)


@triton.jit
def gelu_tanh(x, FAST: tl.constexpr):
    """0.5 x (1 + tanh u) = x sigmoid(2 u) of float32, with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return over_one_plus_exp2(x, x * (LINEAR + CUBIC * x * x), FAST)


HELPERS = ("gelu_tanh", "over_one_plus_exp2", "silu")
