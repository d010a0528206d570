"""Convolution of a slice of video in NDHWC, its past frames in front, with bias and residual."""

from __future__ import annotations

import functools
import importlib
import math
import shutil
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from . import _flop
from ._dispatch import TORCH, Backend, Case, OpSpec, Situation, backend_for
from .conv3d import conv3d

IN_MULTIPLE, OUT_MULTIPLE = 32, 96  # of channels: what the CUDA kernel takes

# Where the CUDA kernel was measured faster than cuDNN: (in channels, out channels, kernel frames, its side)
# -> fewest and most output pixels, frames x height x width.  On an H100 80GB, torch 2.11, cuDNN 9.19, at the
# levels of the published VAE's 768 x 448; ms of cuDNN (the faster of bfloat16 and float16, without the bias
# that ours adds) and of ours in bfloat16, whose float16 form differs in its conversions alone:
#    96 ->  96  3x3x3  768 x 448   1 frame   .670  .257     4 frames  2.640  .890
#    96 -> 192  3x3x3  384 x 224   1 frame   .175  .129     4 frames   .643  .452
#   192 -> 192  3x3x3  384 x 224   1 frame   .322  .240     4 frames  1.178  .866
#   192 -> 384  3x3x3  192 x 112   1 frame   .169  .126     2 frames   .327  .239
#   384 -> 384  3x3x3  192 x 112   1 frame   .324  .237     2 frames   .616  .457
#   384 -> 384  3x3x3   96 x 56    1 frame   .106  .080
#   384 -> 768  3x1x1   96 x 56    1 frame   .029  .026, but on 2 frames of 192 x 112  .115  .128
# The gain of 3x3x3 kernels does not shrink as the pixels grow, so no most bounds them.  With 1x1x1 kernels
# ours took 3 to 15 % longer.
MEASURED_FASTER: dict[tuple[int, int, int, int], tuple[int, float]] = {
    (96, 96, 3, 3): (768 * 448, math.inf),
    (96, 192, 3, 3): (384 * 224, math.inf),
    (192, 192, 3, 3): (384 * 224, math.inf),
    (192, 384, 3, 3): (192 * 112, math.inf),
    (384, 384, 3, 3): (96 * 56, math.inf),
    (384, 768, 3, 1): (96 * 56, 96 * 56),
}
# Of the fewest measured, a share that counts as measured: 720 x 416, the other published size, has .87 of the
# pixels of 768 x 448.  Below it cuDNN serves.
NEARLY = 3 / 4


@functools.cache
def extension() -> ModuleType | str:
    """flashtalk_rt._C, or one line that says why it is not there."""
    try:
        return importlib.import_module("flashtalk_rt._C")
    except ModuleNotFoundError:
        if shutil.which("nvcc") is None:
            return "flashtalk_rt._C is not built: nvcc is not on PATH"
        # With build isolation, pip hides the build's own statement of what it lacked.
        return "flashtalk_rt._C is not built (pip install --no-build-isolation -e . with the dev extra)"
    except ImportError as error:
        return f"flashtalk_rt._C does not load: {error}"


def loaded(op: str, found: ModuleType | str) -> ModuleType:
    """What `extension` found, for a call of `op`; InputError with the reason where it is not there."""
    if isinstance(found, str):
        raise InputError(f"{op}: {found}")
    return found


def _cuda(situation: Situation) -> str | None:
    if situation.device_type != "cuda":
        return f"needs a CUDA device, this is {situation.device_type}"
    if situation.capability != (9, 0):
        return f"needs sm_90, this is {situation.capability}"
    if situation.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, this is {situation.dtype}"
    if situation.grad:
        return "has no gradient"
    found = extension()
    return found if isinstance(found, str) else None


def slice_conv_wins(x: Tensor, weight: Tensor) -> bool:
    """Whether the CUDA kernel is the faster one for this call by `MEASURED_FASTER`, and can serve it.

    x [1, C, T, H, W] and weight [O, C, kt, k, k], as `conv3d` takes them.  Never inside `plain_backends`.
    """
    out_channels, in_channels, kernel_t, _, side = weight.shape
    batch, _, frames, height, width = x.shape
    fewest, most = MEASURED_FASTER.get((in_channels, out_channels, kernel_t, side), (math.inf, 0))
    pixels = (frames - kernel_t + 1) * height * width
    # Under autocast the weights are wider.
    if batch != 1 or x.dtype != weight.dtype or not NEARLY * fewest <= pixels <= most:
        return False
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return backend_for(SPEC, x.device, x.dtype, grad=grad) == "cuda"


@torch.library.custom_op("flashtalk_rt::slice_conv", mutates_args=(), device_types="cuda")
def _kernel(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    module = loaded("slice_conv", extension())
    frames, height, width, in_channels = x.shape
    out_channels, kernel_t, spatial = weight.shape[:3]
    out = x.new_empty(frames - kernel_t + 1, height, width, out_channels)
    with torch.cuda.device(x.device):
        module.slice_conv(
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            bias=bias.data_ptr(),
            residual=0 if residual is None else residual.data_ptr(),
            out=out.data_ptr(),
            frames=frames,
            height=height,
            width=width,
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_t=kernel_t,
            spatial=spatial,
            dtype=str(x.dtype).removeprefix("torch."),
            device=x.device.index,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return out


@_kernel.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    frames, height, width, _ = x.shape
    return x.new_empty(frames - weight.shape[1] + 1, height, width, weight.shape[0])


def slice_conv(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Convolve frames, zeros around each picture, then add bias and residual.

    x [T, H, W, C], whose first kt - 1 frames are the past: no padding in time.  weight [O, kt, k, k, C]
    with k 1 or 3: `conv.weight.permute(0, 2, 3, 4, 1)`, which copies nothing of a channels-last weight.
    bias [O]; residual [T - kt + 1, H, W, O] or None.  One dtype.  Returns [T - kt + 1, H, W, O].

    The normalisation and activation before a convolution belong to the kernel that writes x: the CUDA
    kernel's operands go from memory to the tensor cores without passing through a thread.  Within it, where
    each element comes by 9 times, they made it take 1.7 to 3.6 times as long, far more than a pass of their
    own; behind the products of the convolution before, they saved 0.13 ms of 1.33 at best, and nothing of
    some (profiles/results/h200-2026-11-29.json).

    `backend` None: "cuda" where `slice_conv_wins`, else "torch".

    InputError: shapes or dtypes that do not fit, or, with `backend="cuda"`, C no multiple of 32, O no
    multiple of 96, or a machine that cannot (the reason is in the text).
    """
    _check(x, weight, bias, residual)
    out_channels, in_channels = weight.shape[0], weight.shape[4]
    tensors = [t for t in (x, weight, bias, residual) if t is not None]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if backend is None and not slice_conv_wins(x.permute(3, 0, 1, 2)[None], weight.permute(0, 4, 1, 2, 3)):
        backend = "torch"
    if backend_for(SPEC, x.device, x.dtype, grad=grad, wanted=backend) == "cuda":
        if in_channels % IN_MULTIPLE or out_channels % OUT_MULTIPLE:
            raise InputError(
                f"slice_conv: backend cuda cannot serve {in_channels} -> {out_channels} channels: it needs "
                f"multiples of {IN_MULTIPLE} and {OUT_MULTIPLE}"
            )
        residual = None if residual is None else residual.contiguous()
        out: Tensor = _kernel(x.contiguous(), weight.contiguous(), bias.contiguous(), residual)
        return out
    return _through_torch(x, weight, bias, residual)


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    if x.dim() != 4 or weight.dim() != 5 or weight.shape[4] != x.shape[3]:
        raise InputError(
            f"slice_conv: x {list(x.shape)} and weight {list(weight.shape)} are not "
            "[T, H, W, C] and [O, kt, k, k, C]"
        )
    out_channels, kernel_t, rows, columns, _ = weight.shape
    if rows != columns or rows not in (1, 3) or not 1 <= kernel_t <= x.shape[0]:
        raise InputError(
            f"slice_conv: the kernel is {kernel_t} x {rows} x {columns}; it must be 1 x 1 or 3 x 3 and no "
            f"longer than the {x.shape[0]} frames"
        )
    expected = {"bias": (bias, [out_channels])}
    if residual is not None:
        expected["residual"] = (residual, [x.shape[0] - kernel_t + 1, *x.shape[1:3], out_channels])
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise InputError(f"slice_conv: {name} is {list(tensor.shape)}, not {shape}")
    for name, tensor in {"weight": weight, **{k: v[0] for k, v in expected.items()}}.items():
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise InputError(
                f"slice_conv: {name} is {tensor.dtype} on {tensor.device}, x {x.dtype} on {x.device}"
            )


def _through_torch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """The library's convolution, on views that are channels-last where the tensors are contiguous."""
    video, side = x.permute(3, 0, 1, 2)[None], weight.shape[2] // 2
    out = conv3d(video, weight.permute(0, 4, 1, 2, 3), bias, padding=(0, side, side))
    out = out[0].permute(1, 2, 3, 0).contiguous()
    return out if residual is None else out + residual


def _explicit(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """What the op means: a sum over the kernel's taps in float32, rounded once."""
    _, kernel_t, spatial, _, _ = weight.shape
    frames, (height, width) = x.shape[0] - kernel_t + 1, x.shape[1:3]
    side = spatial // 2
    padded = F.pad(x.float(), (0, 0, side, side, side, side))
    out = bias.float().expand(frames, height, width, -1)
    for t in range(kernel_t):
        for h in range(spatial):
            for w in range(spatial):
                shifted = padded[t : t + frames, h : h + height, w : w + width]
                out = out + shifted @ weight[:, t, h, w].float().t()
    return (out if residual is None else out + residual.float()).to(x.dtype)


def _case(
    size: tuple[int, int, int], channels: tuple[int, int], kernel: tuple[int, int], *, residual: bool
) -> Case:
    """`size`: frames out, height, width; `channels`: in, out; `kernel`: frames, side."""

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        (frames, height, width), (c, o), (kt, k) = size, channels, kernel
        return {
            "x": normal(frames + kt - 1, height, width, c).to(dtype),
            "weight": (normal(o, kt, k, k, c) * (kt * k * k * c) ** -0.5).to(dtype),
            "bias": normal(o).to(dtype),
            "residual": normal(frames, height, width, o).to(dtype) if residual else None,
        }

    name = "{}x{}x{} {}-{} {}x{}".format(*size, *channels, *kernel)
    return Case(name + " residual" * residual, make)


SPEC = OpSpec(
    "slice_conv",
    (Backend("cuda", _cuda), TORCH),  # in this order for the sizes of `MEASURED_FASTER`
    function=slice_conv,
    reference=_explicit,
    eager=_through_torch,
    cases=(
        _case((2, 5, 9), (32, 96), (3, 3), residual=True),
        _case((1, 17, 7), (96, 96), (1, 3), residual=False),
        _case((1, 3, 11), (64, 192), (3, 1), residual=False),
        _case((2, 1, 1), (32, 192), (1, 1), residual=True),
    ),
    workload=_case((4, 768, 448), (96, 96), (3, 3), residual=True),
    flop=_flop.slice_conv,
)
