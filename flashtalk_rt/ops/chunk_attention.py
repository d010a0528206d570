"""3D attention over chunks: bidirectional inside a chunk, causal between chunks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _flop, reference
from . import chunk_attention_cuda as cuda
from ._dispatch import TRITON, Backend, Case, OpSpec, Situation, backend_for

MAX_HEAD_DIM = 128  # of every backend but sdpa

# TFLOP/s of the unmasked bfloat16 forward pass by number of heads, at 12,096 tokens and head dimension 128,
# in shuffled turns on one H200: torch 2.11, cuDNN 9.19, flash-attn-4 4.0.0b36.  Triton's are of another run
# there, where cuDNN reached 548, 522 and 522 (both in profiles/results/h200-2026-11-28.json);
# FlashAttention-2's of an H100, where it reached 610 (2026-11-24).  FlashAttention-3 was not measured.
MEASURED_TFLOPS = {
    40: {"fa4": 660, "cuda": 631, "cudnn": 559, "triton": 479, "fa2": 366},
    10: {"fa4": 632, "cuda": 607, "cudnn": 533, "triton": 452},
    5: {"fa4": 628, "cuda": 603, "cudnn": 532, "triton": 449, "fa2": 312},
}


class Flash(NamedTuple):
    """A FlashAttention package: the module that shows it is installed, and the GPUs it is compiled for."""

    module: str
    oldest: tuple[int, int]
    newest: tuple[int, int]
    package: str


FLASH = {
    "fa4": Flash("flash_attn.cute", (9, 0), (10, 9), "flash-attn-4 (extra: fa4)"),
    "fa3": Flash("flash_attn_interface", (9, 0), (9, 0), "flash-attn-3 (hopper/ of flash-attention)"),
    # flash-attn-4 also makes a `flash_attn`, without the compiled part.
    "fa2": Flash("flash_attn_2_cuda", (8, 0), (12, 9), "flash-attn (extra: fa2)"),
}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def importable(module: str) -> bool:
    """Whether Python finds `module`, which torch.compile cannot trace; `backend_for` keeps the answer."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # its parent is absent or broken
        return False


def _half_precision(situation: Situation) -> str | None:
    """What cuDNN and every FlashAttention need."""
    if situation.device_type != "cuda":
        return f"needs a CUDA device, this is {situation.device_type}"
    if situation.capability is None or situation.capability < (8, 0):
        return f"needs sm_80 or newer, this is {situation.capability}"
    if situation.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, this is {situation.dtype}"
    if situation.head_dim is None or situation.head_dim > MAX_HEAD_DIM or situation.head_dim % 8:
        return f"needs a head dimension of 128 or less divisible by 8, this is {situation.head_dim}"
    return None


def _flash(name: str) -> Callable[[Situation], str | None]:
    flash = FLASH[name]

    def supports(situation: Situation) -> str | None:
        reason = _half_precision(situation)
        if reason is not None:
            return reason
        assert situation.capability is not None
        if not flash.oldest <= situation.capability <= flash.newest:
            return "is compiled for sm_{}{} to sm_{}{}, this is sm_{}{}".format(
                *flash.oldest, *flash.newest, *situation.capability
            )
        if situation.key_mask:
            return "takes no bias and no length of the keys"
        if situation.grad:
            return "its gradient was not measured here"
        return None if importable(flash.module) else f"{flash.package} is not installed"

    return supports


def _cudnn(situation: Situation) -> str | None:
    reason = _half_precision(situation)
    if reason is not None:
        return reason
    if situation.key_mask:
        # torch hands it a float32 mask as if it were half precision (pytorch/pytorch#191612), and the bias
        # rounded to half precision is off by 1% of a key's weight.
        return "takes a bias or length of the keys only as a half-precision mask"
    return "this torch was built without cuDNN" if situation.cudnn_version is None else None


def _triton(situation: Situation) -> str | None:
    reason = TRITON.supports(situation)
    if reason is None and situation.head_dim is not None and situation.head_dim > MAX_HEAD_DIM:
        return f"needs a head dimension of {MAX_HEAD_DIM} or less, this is {situation.head_dim}"
    return reason


def _backends() -> tuple[Backend, ...]:
    """What is measured, the fastest first; then what is not; sdpa, which torch decides on, last."""
    supports = {
        **{name: _flash(name) for name in FLASH},
        "cudnn": _cudnn,
        "triton": _triton,
        "cuda": cuda.supports,
        "sdpa": lambda situation: None,
    }
    speed = MEASURED_TFLOPS[40]
    return tuple(Backend(name, supports[name]) for name in sorted(supports, key=lambda n: -speed.get(n, 0)))


# --- the registered op -----------------------------------------------------------------------------


@torch.library.custom_op("flashtalk_rt::chunk_attention", mutates_args=())
def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_length: Tensor | None,
    key_bias: Tensor | None,
    chunk_tokens: int | None,
) -> tuple[Tensor, Tensor]:
    from ..triton_kernels import chunk_attention as kernels

    return kernels.forward(q, k, v, key_length, key_bias, chunk_tokens)


@_kernel.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_length: Tensor | None,
    key_bias: Tensor | None,
    chunk_tokens: int | None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("flashtalk_rt::chunk_attention_backward", mutates_args=())
def _kernel_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_length: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    chunk_tokens: int | None,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..triton_kernels import chunk_attention_backward as kernels

    return kernels.backward(grad, q, k, v, key_length, key_bias, out, lse, chunk_tokens, bias_gradient)


@_kernel_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_length: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    chunk_tokens: int | None,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = lse.new_empty(key_bias.shape if key_bias is not None and bias_gradient else 0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.chunk_tokens = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[4]
    dq, dk, dv, dbias = _kernel_backward(grad, *ctx.saved_tensors, ctx.chunk_tokens, wanted)
    return dq, dk, dv, None, dbias if wanted else None, None


_kernel.register_autograd(_backward, setup_context=_setup_context)


# --- the public op ---------------------------------------------------------------------------------


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_tokens: int | None = None,
    *,
    key_length: int | Tensor | None = None,
    key_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention in which a token sees its own chunk and every earlier one.

    q [B, L, H, D]; k, v [B, M, H, D]; one dtype.  Slices of one projection [B, L, 3 H D] are taken as they
    are: only D need be contiguous.
    chunk_tokens: tokens a chunk, None for one single chunk (full attention).  L need not be a multiple of
    it, the last chunk may be short; M must be L.
    key_length: keys from there on are not seen: 1 to M, or int32 [B], a length for each of the batch, which
    stays on the device and is not checked.
    key_bias: float32 [M] or [B, M], added to the scaled scores q . k * D^-0.5 of every query and head:
    log(n) makes a key count n times, -inf hides it; each query must see some key.
    Returns [B, L, H, D] in q's dtype.  Keys outside the mask of chunks are never visited.
    ValueError names what does not fit; InputError says why `backend` cannot serve.
    """
    _check(q, k, v, chunk_tokens, key_length, key_bias)
    if isinstance(key_length, int):
        # To leave them out is a view, which every backend takes.
        k, v = k[:, :key_length], v[:, :key_length]
        key_bias = None if key_bias is None else key_bias[..., :key_length]
        key_length = None
    if chunk_tokens is not None and chunk_tokens >= q.shape[1]:
        chunk_tokens = None
    masked = key_length is not None or key_bias is not None
    tensors = (q, k, v) if key_bias is None else (q, k, v, key_bias)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    chosen = backend_for(SPEC, q.device, q.dtype, q.shape[-1], grad, backend, masked)
    if chosen == "triton":
        bias = None if key_bias is None else key_bias.expand(k.shape[0], -1)
        out: Tensor = _kernel(q, k, v, key_length, bias, chunk_tokens)[0]
        return out
    mask = reference.key_mask(k, key_length, key_bias)
    if chunk_tokens is None:
        return _attend(q, k, v, mask, chosen)
    # Each chunk is one attention over the keys up to its end.
    parts = []
    for start in range(0, q.shape[1], chunk_tokens):
        end = start + chunk_tokens
        seen = None if mask is None else mask[:, :end]
        parts.append(_attend(q[:, start:end], k[:, :end], v[:, :end], seen, chosen))
    return torch.cat(parts, dim=1)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_tokens: int | None,
    key_length: int | Tensor | None,
    key_bias: Tensor | None,
) -> None:
    reference.check_operands(q, k, v)
    batch, length = q.shape[:2]
    keys = k.shape[1]
    if chunk_tokens is not None:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be 1 or more, or None for one chunk")
        if keys != length:
            raise ValueError(f"{length} queries and {keys} keys; with chunk_tokens they must be as many")
    if isinstance(key_length, Tensor):
        if key_length.shape != (batch,) or key_length.dtype != torch.int32:
            raise ValueError(f"key_length is {key_length.dtype} {[*key_length.shape]}, not int32 [{batch}]")
    elif key_length is not None and not 1 <= key_length <= keys:
        raise ValueError(f"key_length is {key_length}; there are {keys} keys, so it must be 1 to {keys}")
    if key_bias is not None and (
        key_bias.shape not in ((keys,), (batch, keys)) or key_bias.dtype != torch.float32
    ):
        raise ValueError(
            f"key_bias is {key_bias.dtype} {[*key_bias.shape]}, not float32 [{keys}] or [{batch}, {keys}]"
        )


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    """Every query sees every key; mask [1 or B, M] float32 is added to the scaled scores (sdpa only)."""
    if backend in FLASH:
        out = _flash_function(backend)(q, k, v)
        return out[0] if isinstance(out, tuple) else out  # some releases add the log-sum-exp
    if backend == "cuda":
        ours: Tensor = cuda.kernel(q, k, v)
        return ours
    if backend == "cudnn" and k.shape[1] > 1:  # torch refuses cuDNN a single key
        # `sdpa_kernel` would forbid the whole process every other backend: another thread's attention fails.
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        found: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, grad)[0]
        return found.transpose(1, 2)
    return reference.attend(q, k, v, mask)


def _flash_function(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]]:
    """(q, k, v) -> out, each [B, L, H, D]; without further arguments unmasked and scaled by D^-0.5."""
    # None of them is required, so mypy finds them on some machines only.
    if backend == "fa4":
        from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found, unused-ignore]
    elif backend == "fa3":
        from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found, unused-ignore]
    else:
        from flash_attn import flash_attn_func  # type: ignore[import-not-found, unused-ignore]
    return flash_attn_func  # type: ignore[no-any-return, unused-ignore]


# --- for the parity tests and the benchmark --------------------------------------------------------


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_tokens: int | None = None,
    *,
    key_length: int | Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """`reference.chunk_attention` in the inputs' own precision throughout."""
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    mask = reference.key_mask(k, key_length, key_bias)
    if mask is not None:
        scores = scores + mask[:, None, None].to(q.dtype)
    if chunk_tokens is not None:
        scores = scores.masked_fill(~reference.chunk_mask(q.shape[1], chunk_tokens, q.device), float("-inf"))
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)


def _case(
    batch: int,
    length: int,
    heads: int,
    dim: int,
    *,
    keys: int | None = None,
    chunk: int | None = None,
    key_length: int | tuple[int, ...] | None = None,
    bias: tuple[int, ...] | None = None,
) -> Case:
    """bias: the shape of the key bias.  With as many keys as queries all three are slices of one tensor."""

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        if keys is None:
            q, k, v = normal(batch, length, 3, heads, dim).to(dtype).unbind(2)
        else:
            q, k, v = (normal(batch, n, heads, dim).to(dtype) for n in (length, keys, keys))
        ends: int | Tensor | None = (
            torch.tensor(key_length, dtype=torch.int32, device=device)
            if isinstance(key_length, tuple)
            else key_length
        )
        return {
            "q": q,
            "k": k,
            "v": v,
            "chunk_tokens": chunk,
            "key_length": ends,
            "key_bias": None if bias is None else normal(*bias),
        }

    shape = f"{batch}x{length}x{heads}x{dim}"
    given = {"keys": keys, "chunk": chunk, "length": key_length, "bias": bias}
    name = " ".join([shape, *(f"{key}={value}" for key, value in given.items() if value is not None)])
    return Case(name.replace(", ", "/"), make)


SPEC = OpSpec(
    "chunk_attention",
    _backends(),
    function=chunk_attention,
    reference=reference.chunk_attention,
    eager=_eager,
    cases=(
        _case(2, 20, 3, 16, chunk=8),
        _case(1, 7, 2, 64, chunk=1),
        _case(1, 9, 1, 128, chunk=4),
        _case(1, 1, 1, 16, keys=3),
        _case(1, 37, 2, 16, keys=150),  # several tiles of keys
        _case(1, 300, 1, 128),
        _case(1, 129, 2, 128, keys=200),
        _case(1, 70, 1, 128, keys=192),
        _case(2, 5, 2, 24, keys=19, key_length=(3, 19), bias=(19,)),
        _case(2, 21, 1, 16, chunk=5, key_length=13, bias=(2, 21)),
        _case(2, 150, 1, 32, chunk=70, key_length=(33, 140), bias=(2, 150)),  # several tiles a chunk
    ),
    workload=_case(1, 12096, 40, 128),
    flop=_flop.chunk_attention,
    gradients=("q", "k", "v", "key_bias"),
)
