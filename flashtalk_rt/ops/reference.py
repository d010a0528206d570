"""The plain PyTorch meaning of every op: what a kernel must reproduce, and what a CPU runs.

Statistics (norms, rotations, softmax of the explicit forms) are computed in float32 whatever the
input's dtype; results return in the input's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> x / rms(x) * weight, in x's dtype; float64 is computed in float64.

    Not F.rms_norm, whose bits these are on a CPU: where D is symbolic, as torch.compile may have it, the one
    of torch 2.11 takes a pointer for it on a CUDA device.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x [..., D], affine weight and bias [D] or None, in x's dtype."""
    weight = None if weight is None else weight.float()
    bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine, then modulation: norm(x) * (1 + scale) + shift.

    x [B, L, D]; shift and scale [B, 1, D] float32.  Returns x's dtype.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], None, None, eps)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate: x, y [B, L, D]; gate [B, 1, D] float32.  Returns x's dtype."""
    return torch.addcmul(x.float(), y.float(), gate).to(x.dtype)


def residual_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """r = x + y * gate and LayerNorm(r) * weight + bias; shapes as in `ops.residual_norm`."""
    if y is not None:
        x = x + y if gate is None else gate_residual(x, y, gate)
    normed = F.layer_norm(x.float(), x.shape[-1:], None, None, eps)
    return x, torch.addcmul(bias.float(), normed, weight.float()).to(x.dtype)


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Rotation angles of 3D RoPE (theta 10000) for a token grid (T, H, W), as [T*H*W, head_dim/2, 2].

    The head_dim/2 pairs split over time, height and width as WAN2.1 does: height and width take
    a third each, rounded down, time the rest (22 / 21 / 21 for 128).  The last axis is (cos, sin),
    float32, computed in float64.
    """
    pairs = head_dim // 2
    side = pairs // 3
    tables = []
    for axis, (size, width) in enumerate(zip(grid, (pairs - 2 * side, side, side), strict=True)):
        exponent = torch.arange(width, dtype=torch.float64, device=device) / width
        position = torch.arange(size, dtype=torch.float64, device=device)
        angle = torch.outer(position, 10000.0**-exponent)
        shape = [1, 1, 1, width]
        shape[axis] = size
        tables.append(angle.view(shape).expand(*grid, width))
    angles = torch.cat(tables, dim=-1).reshape(-1, pairs)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def qk_norm_rope(x: Tensor, weight: Tensor, table: Tensor | None, num_heads: int, eps: float) -> Tensor:
    """RMSNorm over the full width, head split and interleaved-pair rotation of a query or key.

    x [B, L, H*D], weight [H*D], table [L, D/2, 2] float32 from `rope_table` or None for no rotation
    -> [B, L, H, D].
    """
    batch, length, _ = x.shape
    normed = rms_norm(x.float(), weight, eps)
    if table is None:
        return normed.view(batch, length, num_heads, -1).to(x.dtype)
    pairs = normed.view(batch, length, num_heads, -1, 2)
    real, imag = pairs.unbind(-1)
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    rotated = torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def chunk_mask(length: int, chunk_tokens: int, device: torch.device) -> Tensor:
    """[L, L] bool, True where a query (row) may see a key: its own chunk and every earlier one."""
    chunk = torch.arange(length, device=device) // chunk_tokens
    return chunk[:, None] >= chunk[None, :]


def key_mask(
    k: Tensor, key_length: int | Tensor | None = None, key_bias: Tensor | None = None
) -> Tensor | None:
    """What a length and a bias add to the scores of keys k [B, M, H, D]: float32 [1 or B, M] or None.

    Arguments as in `ops.chunk_attention`; -inf hides the keys past the length.
    """
    if key_length is None:
        return None if key_bias is None else key_bias.view(-1, k.shape[1])
    mask = k.new_zeros(k.shape[1], dtype=torch.float32) if key_bias is None else key_bias
    ends = torch.as_tensor(key_length, device=k.device).view(-1, 1)
    return mask.masked_fill(torch.arange(k.shape[1], device=k.device) >= ends, float("-inf"))


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_tokens: int | None = None,
    *,
    key_length: int | Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """The explicit form of `ops.chunk_attention`, with its arguments, in float32."""
    scores = torch.einsum("blhd,bmhd->bhlm", q.float(), k.float()) * q.shape[-1] ** -0.5
    mask = key_mask(k, key_length, key_bias)
    if mask is not None:
        scores = scores + mask[:, None, None]
    if chunk_tokens is not None:
        scores = scores.masked_fill(~chunk_mask(q.shape[1], chunk_tokens, q.device), float("-inf"))
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v.float()).to(q.dtype)


def check_operands(q: Tensor, k: Tensor, v: Tensor, of: str = "") -> None:
    """ValueError unless q [B, L, H, D] may attend to k and v [B, M, H, D], M not 0, all of one dtype and on
    one device.  of: whose keys and values they are, for the message."""
    batch, _, heads, dim = q.shape
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (batch, heads, dim) or k.shape[1] == 0:
        raise ValueError(f"{of}keys {[*k.shape]} and values {[*v.shape]} do not fit q {[*q.shape]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, {of}k and v are {q.dtype}, {k.dtype} and {v.dtype}; they must be of one dtype")
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, {of}k and v are on {q.device}, {k.device} and {v.device}; they must be on one device"
        )


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Unmasked attention through torch: q [B, L, H, D], k and v [B, M, H, D] -> [B, L, H, D].

    bias [M] or [B, M] float32 is added to the scaled scores of every query and head.
    """
    dtype = q.dtype
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    # log(512 - n) in bfloat16 is off by up to 0.016, which would be 1.6% of that key's weight.
    wide = torch.promote_types(dtype, torch.float32)
    mask = bias.reshape(-1, 1, 1, bias.shape[-1]).to(wide)
    out = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), attn_mask=mask)
    return out.transpose(1, 2).to(dtype)


def dual_cross_attention(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    text_bias: Tensor | None = None,
) -> Tensor:
    """One query against two separate softmaxes, summed; shapes as in `ops.dual_cross_attention`."""
    return attend(q, text_k, text_v, text_bias) + attend(q, image_k, image_v)


def audio_cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each latent frame's tokens see that frame's audio tokens alone.

    q [B, T*S, H, D] with S tokens a latent frame; k and v [B, T, N, H, D] -> [B, T*S, H, D].
    """
    batch, frames = k.shape[:2]
    folded = q.reshape(batch * frames, -1, *q.shape[2:])
    return attend(folded, k.flatten(0, 1), v.flatten(0, 1)).reshape(q.shape)


# sRGB's primaries and white point (D65), and the way back, in the published code's digits: the stream feeds
# its colours back, which multiplies what scikit-image's six digits are off by.
_RGB_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_XYZ_TO_RGB = (
    (3.2404542, -1.5371385, -0.4985314),
    (-0.9692660, 1.8760108, 0.0415560),
    (0.0556434, -0.2040259, 1.0572252),
)
_WHITE = (0.95047, 1.0, 1.08883)
_EPSILON, _KAPPA = 0.008856, 903.3  # where Lab's curve turns straight, and how steep it is there


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] -> CIE L*a*b* (D65); [..., 3, H, W] float32."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp(min=0) ** 2.4, rgb / 12.92)
    matrix = rgb.new_tensor(_RGB_TO_XYZ) / rgb.new_tensor(_WHITE)[:, None]
    xyz = torch.einsum("ij,...jhw->...ihw", matrix, linear)
    f = torch.where(xyz > _EPSILON, xyz.clamp(min=1e-12) ** (1 / 3), (_KAPPA * xyz + 16) / 116)
    x, y, z = f.unbind(-3)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=-3)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """The inverse of `rgb_to_lab`, clipped to [0, 1].

    Out of sRGB's gamut x, y and z may be negative, as published; scikit-image makes z zero there.
    """
    lightness, a, b = lab.unbind(-3)
    y = (lightness + 16) / 116
    f = torch.stack((y + a / 500, y, y - b / 200), dim=-3)
    xyz = torch.where(f**3 > _EPSILON, f**3, (116 * f - 16) / _KAPPA)
    matrix = lab.new_tensor(_XYZ_TO_RGB) * lab.new_tensor(_WHITE)
    linear = torch.einsum("ij,...jhw->...ihw", matrix, xyz)
    gamma = 1.055 * linear.clamp(min=1e-12) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, gamma, 12.92 * linear).clamp(0, 1)


def lab_statistics(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Per-frame mean and population deviation of L, a and b: frames [B, 3, T, H, W] in [-1, 1] ->
    two [B, T, 3, 1, 1] float32."""
    lab = rgb_to_lab((frames.float().transpose(1, 2) + 1) / 2)
    return lab.mean((-2, -1), keepdim=True), lab.std((-2, -1), correction=0, keepdim=True)


def color_match(frames: Tensor, mean: Tensor, std: Tensor, strength: float) -> Tensor:
    """Shift and scale each frame's Lab channels to a reference's `lab_statistics`.

    frames [B, 3, T, H, W] in [-1, 1]; mean and std [B, 1, 3, 1, 1]; `strength` in [0, 1] blends
    between the frames (0) and the matched ones (1).  Returns frames' dtype.
    """
    if strength == 0:
        return frames
    rgb = (frames.float().transpose(1, 2) + 1) / 2
    lab = rgb_to_lab(rgb)
    own_mean = lab.mean((-2, -1), keepdim=True)
    own_std = lab.std((-2, -1), correction=0, keepdim=True)
    # A flat channel has nothing to scale; it only moves.
    gain = torch.where(own_std > 1e-8, std / own_std.clamp(min=1e-8), torch.ones_like(own_std))
    matched = lab_to_rgb((lab - own_mean) * gain + mean)
    blended = rgb + strength * (matched - rgb)
    return (blended * 2 - 1).transpose(1, 2).to(frames.dtype)


def to_pixels(frames: Tensor) -> Tensor:
    """frames [B, 3, T, H, W] in [-1, 1] -> uint8 [B, T, H, W, 3]."""
    scaled = ((frames + 1) * 127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 4, 1).to(torch.uint8)


def color_match_pixels(frames: Tensor, mean: Tensor, std: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """`color_match` as float32, and its pixels."""
    matched = color_match(frames.float(), mean, std, strength)
    return matched, to_pixels(matched)
