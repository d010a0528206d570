"""Every op against its explicit meaning, and every backend of an op against the others."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_tensors import normal
from skimage.color import lab2rgb, rgb2lab, xyz2rgb
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.errors import InputError
from flashtalk_rt.ops import reference
from flashtalk_rt.ops._dispatch import OpSpec, Situation

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def qkv(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (normal(2, length, 3, 16, seed=i, dtype=dtype) for i in range(3))
    return q, k, v


# --- chunk attention -------------------------------------------------------------------------------

LENGTHS_AND_CHUNKS = [(24, 8), (24, None), (20, 8), (7, 1), (8, 8), (8, 9), (8, 1000), (1, 1), (25, 24)]


@pytest.mark.parametrize(("length", "chunk"), LENGTHS_AND_CHUNKS)
def test_chunk_attention_in_float32(length: int, chunk: int | None) -> None:
    q, k, v = qkv(length)
    out = ops.chunk_attention(q, k, v, chunk)
    assert out.shape == q.shape
    torch.testing.assert_close(out, reference.chunk_attention(q, k, v, chunk), rtol=1e-5, atol=1e-6)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
    """The explicit form in the inputs' own precision throughout."""
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    if chunk is not None:
        scores = scores.masked_fill(~reference.chunk_mask(q.shape[1], chunk, q.device), float("-inf"))
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("length", "chunk"), LENGTHS_AND_CHUNKS)
def test_chunk_attention_in_bfloat16_errs_at_most_twice_as_much_as_eager(
    length: int, chunk: int | None, device: str
) -> None:
    q, k, v = (x.to(device) for x in qkv(length, torch.bfloat16))
    exact = reference.chunk_attention(q.float(), k.float(), v.float(), chunk)
    eager = (eager_attention(q, k, v, chunk).float() - exact).abs().max().item()
    out = ops.chunk_attention(q, k, v, chunk)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max().item() <= 2 * eager + 1e-5


@pytest.mark.parametrize(("length", "chunk"), LENGTHS_AND_CHUNKS)
def test_chunk_attention_gradients(length: int, chunk: int | None) -> None:
    weight = normal(2, length, 3, 16, seed=9)
    gradients = []
    for op in (ops.chunk_attention, reference.chunk_attention):
        inputs = [x.requires_grad_(True) for x in qkv(length)]
        (op(*inputs, chunk) * weight).sum().backward()
        gradients.append([x.grad for x in inputs])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_chunk_sees_itself_and_the_past_only() -> None:
    mask = reference.chunk_mask(5, 2, torch.device("cpu"))
    assert mask.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    q, k, v = qkv(10)
    later = [torch.cat((x[:, :8], x[:, 8:] + 1), 1) for x in (k, v)]
    changed = ops.chunk_attention(q, *later, 4) - ops.chunk_attention(q, k, v, 4)
    assert changed[:, :8].abs().max() == 0 and changed[:, 8:].abs().max() > 1e-3


@pytest.mark.parametrize("chunk", [0, -3])
def test_chunk_attention_names_a_bad_chunk(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk_tokens is {chunk}"):
        ops.chunk_attention(*qkv(4), chunk)


def test_dual_cross_attention_sums_two_softmaxes() -> None:
    q, tk, tv, ik, iv = (normal(2, n, 3, 8, seed=i) for i, n in enumerate((6, 5, 5, 9, 9)))
    expected = eager_attention(q, tk, tv, None) + eager_attention(q, ik, iv, None)
    torch.testing.assert_close(ops.dual_cross_attention(q, tk, tv, ik, iv), expected, rtol=1e-5, atol=1e-6)


# --- every backend of every op ---------------------------------------------------------------------


def run_conv3d(device: str, dtype: torch.dtype) -> list[Tensor]:
    outputs = []
    for kernel, stride, padding in (
        ((3, 3, 3), (1, 1, 1), (0, 1, 1)),
        ((3, 1, 1), (2, 1, 1), (0, 0, 0)),
        ((1, 1, 1), (1, 1, 1), (0, 0, 0)),
        ((1, 3, 3), (1, 2, 2), (0, 0, 0)),
        ((3, 3, 3), (2, 2, 1), (1, 0, 2)),
    ):
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            x = normal(2, 6, 5, 9, 7, seed=1, dtype=dtype).to(device).contiguous(memory_format=layout)
            weight = (normal(4, 6, *kernel, seed=2) / 10).to(device, dtype).contiguous(memory_format=layout)
            bias = normal(4, seed=3, dtype=dtype).to(device)
            out = ops.conv3d(x, weight, bias, stride, padding)
            outputs.append(out)
    return outputs


# An op of several backends without an entry here fails: they would go uncompared.
CASES: dict[str, Callable[[str, torch.dtype], list[Tensor]]] = {"conv3d": run_conv3d}
# The others list their cases, and test_op_parity.py compares them.
SEVERAL = [spec for spec in ops.REGISTRY if len(spec.backends) > 1 and not spec.cases]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def test_every_op_of_several_backends_is_compared() -> None:
    assert {spec.name for spec in SEVERAL} == set(CASES)
    assert all(callable(getattr(ops, spec.name)) for spec in ops.REGISTRY)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spec", SEVERAL, ids=lambda spec: spec.name)
@torch.no_grad()
def test_the_backends_agree(
    spec: OpSpec, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    case = CASES[spec.name]
    situation = Situation.of(torch.device(device), dtype)
    serving = [backend.name for backend in spec.backends if backend.supports(situation) is None]
    module = importlib.import_module(f"flashtalk_rt.ops.{spec.name}")
    results = {}
    for name in serving:
        monkeypatch.setattr(module, "backend_for", lambda *_, name=name, **__: name)
        results[name] = case(device, dtype)
    exact = case("cpu", torch.float32) if dtype == torch.float32 else None
    for name in serving:
        for i, (out, expected) in enumerate(zip(results[name], results[serving[-1]], strict=True)):
            assert out.dtype == dtype
            error = (out.float() - expected.float()).norm() / expected.float().norm()
            assert error < TOLERANCE[dtype], (name, i)
            if exact is not None:
                assert (out.cpu() - exact[i]).norm() / exact[i].norm() < TOLERANCE[dtype], (name, i)


def test_onednn_serves_float32_on_a_cpu() -> None:
    # Else the comparison above compares one backend with itself.
    spec = next(spec for spec in ops.REGISTRY if spec.name == "conv3d")
    situation = Situation.of(torch.device("cpu"), torch.float32)
    assert [b.name for b in spec.backends if b.supports(situation) is None] == ["onednn", "torch"]


@torch.no_grad()
def test_onednn_keeps_channels_last() -> None:
    # A copy between every two layers would cost more than the convolutions.
    layout = torch.channels_last_3d
    x, weight = (t.contiguous(memory_format=layout) for t in (normal(1, 6, 5, 9, 7), normal(4, 6, 3, 3, 3)))
    assert ops.conv3d(x, weight, normal(4)).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_conv3d_is_differentiable_in_each_of_its_inputs(wanted: str) -> None:
    tensors = {"x": normal(1, 3, 4, 5, 6), "weight": normal(2, 3, 3, 3, 3, seed=1), "bias": normal(2, seed=2)}
    gradients = []
    for op in (ops.conv3d, F.conv3d):
        given = {k: v.clone().requires_grad_(k == wanted) for k, v in tensors.items()}
        op(given["x"], given["weight"], given["bias"], (1, 1, 1), (0, 1, 1)).square().sum().backward()
        assert given[wanted].grad is not None
        gradients.append(given[wanted].grad)
    torch.testing.assert_close(*gradients)


def test_conv3d_takes_the_differentiable_backend_only_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("flashtalk_rt.ops.conv3d")
    real, chosen = module.backend_for, []

    def backend_for(*args: object, **kwargs: object) -> str:
        chosen.append(real(*args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(module, "backend_for", backend_for)
    x, weight, bias = normal(1, 3, 4, 5, 6), normal(2, 3, 1, 1, 1), normal(2)
    ops.conv3d(x, weight, bias)
    ops.conv3d(x, weight.requires_grad_(True), bias)
    with torch.no_grad():
        ops.conv3d(x, weight, bias)
    assert chosen == ["onednn", "torch", "onednn"]


# --- norms and rotation ----------------------------------------------------------------------------


def complex_rotation(grid: tuple[int, int, int], head_dim: int) -> np.ndarray:
    """e^{i angle} [T*H*W, head_dim/2] complex128, position by position."""
    pairs = head_dim // 2
    side = pairs // 3
    widths = (pairs - 2 * side, side, side)
    rows = []
    for position in np.ndindex(*grid):
        angles = [p * 10000.0 ** (-j / w) for p, w in zip(position, widths, strict=True) for j in range(w)]
        rows.append(np.exp(1j * np.array(angles)))
    return np.array(rows)


@pytest.mark.parametrize(
    ("grid", "head_dim"), [((3, 4, 5), 128), ((9, 3, 2), 64), ((2, 1, 7), 16), ((1, 1, 1), 20)]
)
def test_rope_table(grid: tuple[int, int, int], head_dim: int) -> None:
    table = ops.rope_table(grid, head_dim, torch.device("cpu"))
    expected = complex_rotation(grid, head_dim)
    assert table.dtype == torch.float32 and table.shape == (*expected.shape, 2)
    np.testing.assert_allclose(table[..., 0].numpy(), expected.real, atol=1e-7)
    np.testing.assert_allclose(table[..., 1].numpy(), expected.imag, atol=1e-7)


def test_rope_splits_128_as_22_21_21() -> None:
    turned = ops.rope_table((2, 2, 2), 128, torch.device("cpu"))[:, :, 1] != 0
    for axis, (stride, span) in enumerate([(4, range(22)), (2, range(22, 43)), (1, range(43, 64))]):
        assert turned[stride].nonzero().flatten().tolist() == list(span), axis


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_qk_norm_rope(dtype: torch.dtype) -> None:
    grid, heads, dim, eps = (2, 3, 2), 3, 16, 1e-6
    x, weight = normal(2, 12, heads * dim, seed=1, dtype=dtype), normal(heads * dim, seed=2, dtype=dtype)
    out = ops.qk_norm_rope(x, weight, ops.rope_table(grid, dim, torch.device("cpu")), heads, eps)
    wide = x.double().numpy()
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * weight.double().numpy()
    pairs = normed.reshape(2, 12, heads, dim // 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * complex_rotation(grid, dim)[:, None]
    expected = np.stack((turned.real, turned.imag), -1).reshape(2, 12, heads, dim)
    assert out.dtype == dtype and out.shape == expected.shape
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2**-8, 1e-5)
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=rtol, atol=atol)
    unturned = ops.qk_norm_rope(x, weight, None, heads, eps).double().numpy()
    np.testing.assert_allclose(unturned, normed.reshape(unturned.shape), rtol=rtol, atol=atol)


def test_qk_norm_rope_names_what_does_not_fit() -> None:
    x, weight = normal(2, 5, 24), normal(24)
    table = ops.rope_table((1, 1, 4), 8, torch.device("cpu"))
    for arguments, message in (
        ((weight, None, 5), "24 channels, 5 heads"),
        ((weight[:8], None, 3), r"weight \(8,\)"),
        ((weight, table, 3), r"the table \(4, 4, 2\)"),
    ):
        with pytest.raises(InputError, match=message):
            ops.qk_norm_rope(x, *arguments, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_and_modulation(dtype: torch.dtype) -> None:
    x, y = normal(2, 5, 8, seed=1, dtype=dtype), normal(2, 5, 8, seed=2, dtype=dtype)
    weight, bias = normal(8, seed=3, dtype=dtype), normal(8, seed=4, dtype=dtype)
    shift, scale = normal(2, 1, 8, seed=5), normal(2, 1, 8, seed=6)
    eps = 1e-6
    wide = x.double()
    rms = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    for out, expected in (
        (ops.rms_norm(x, weight, eps), rms * weight),
        (ops.layer_norm(x, weight, bias, eps), normed * weight + bias),
        (ops.layer_norm(x, None, None, eps), normed),
        (ops.adaln(x, shift, scale, eps), normed * (1 + scale) + shift),
        (ops.gate_residual(x, y, scale), wide + y * scale),
    ):
        assert out.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(out.double(), expected.double(), rtol=tolerance, atol=1e-5)


# --- colour ----------------------------------------------------------------------------------------


def picture(seed: int = 0, height: int = 12, width: int = 10) -> np.ndarray:
    """float32 RGB [H, W, 3] in [0, 1] that reaches both ends."""
    rgb = np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)
    rgb[0, 0], rgb[0, 1] = 0, 1
    rgb[1, :3] = np.eye(3)
    rgb[2] *= 0.05  # the straight part of the gamma curve
    return rgb


def to_tensor(rgb: np.ndarray) -> Tensor:
    """[H, W, 3] in [0, 1] -> [1, 3, 1, H, W] in [-1, 1]."""
    return (
        torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1), dtype=np.float32))[None, :, None] * 2
        - 1
    )


def to_rgb(frames: Tensor, frame: int = 0) -> np.ndarray:
    return ((frames[0, :, frame].permute(1, 2, 0) + 1) / 2).numpy()


def reinhard(rgb: np.ndarray, target: np.ndarray, strength: float) -> np.ndarray:
    own, wanted = rgb2lab(rgb.astype(np.float64)), rgb2lab(target.astype(np.float64))
    mean, std = own.mean((0, 1)), own.std((0, 1))
    matched = (own - mean) / std * wanted.std((0, 1)) + wanted.mean((0, 1))
    return (1 - strength) * rgb + strength * np.clip(lab2rgb(matched), 0, 1)


def test_lab_matches_scikit_image() -> None:
    """Whose six digits of sRGB's primaries put a and b off by up to 5e-3."""
    rgb = picture()
    lab = reference.rgb_to_lab(torch.from_numpy(rgb.transpose(2, 0, 1).copy()))
    np.testing.assert_allclose(lab.permute(1, 2, 0).numpy(), rgb2lab(rgb.astype(np.float64)), atol=6e-3)
    np.testing.assert_allclose(reference.lab_to_rgb(lab).permute(1, 2, 0).numpy(), rgb, atol=1e-5)


def test_lab_outside_the_gamut_is_clipped_in_rgb_alone() -> None:
    """As published: scikit-image's lab2rgb makes a z under zero zero first, which is up to 0.08 of red."""
    draw = np.random.default_rng(1)
    lab = draw.uniform((0, -120, -120), (100, 120, 120), (20, 20, 3))
    ours = reference.lab_to_rgb(torch.from_numpy(lab.transpose(2, 0, 1).copy()).float())
    y = (lab[..., 0] + 16) / 116
    f = np.stack((y + lab[..., 1] / 500, y, y - lab[..., 2] / 200), axis=-1)
    assert (f[..., 2] < 0).mean() > 0.02
    xyz = np.where(f**3 > 0.008856, f**3, (116 * f - 16) / 903.3) * (0.95047, 1, 1.08883)
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), xyz2rgb(xyz), atol=2e-4)


def test_lab_statistics_are_of_the_population() -> None:
    rgb = picture(3)
    mean, std = ops.lab_statistics(to_tensor(rgb))
    lab = rgb2lab(rgb.astype(np.float64))
    assert mean.shape == std.shape == (1, 1, 3, 1, 1)
    np.testing.assert_allclose(mean.flatten().numpy(), lab.mean((0, 1)), rtol=1e-4, atol=6e-3)
    np.testing.assert_allclose(std.flatten().numpy(), lab.std((0, 1)), rtol=1e-4, atol=6e-3)


@pytest.mark.filterwarnings("ignore:.*negative Z values")
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_color_match_is_reinhard_in_lab_frame_by_frame(strength: float) -> None:
    target = picture(7) * 0.5 + 0.3
    frames = [picture(seed) for seed in (8, 9, 10)]
    video = torch.cat([to_tensor(f) for f in frames], dim=2)
    out = ops.color_match(video, *ops.lab_statistics(to_tensor(target)), strength)
    assert out.dtype == video.dtype and out.shape == video.shape
    for i, rgb in enumerate(frames):
        np.testing.assert_allclose(to_rgb(out, i), reinhard(rgb, target, strength), atol=1e-4)


def test_strength_zero_returns_the_frames_and_half_lies_between() -> None:
    video = to_tensor(picture(8))
    statistics = ops.lab_statistics(to_tensor(picture(7) * 0.5))
    none, half, full = (ops.color_match(video, *statistics, s) for s in (0, 0.5, 1))
    assert torch.equal(none, video)
    torch.testing.assert_close(half, (video + full) / 2, rtol=0, atol=1e-6)
    assert (full - video).abs().max() > 0.1


@pytest.mark.parametrize("level", [-1.0, -0.3, 0.0, 1.0])
def test_a_flat_frame_moves_to_the_references_mean(level: float) -> None:
    video = torch.full((1, 3, 2, 8, 8), level)
    out = ops.color_match(video, *ops.lab_statistics(to_tensor(picture(7) * 0.2 + 0.4)), 1.0)
    assert bool(out.isfinite().all())
    assert (out - out[..., :1, :1]).abs().max() < 1e-4, "a flat frame stays flat"
    mean, _ = ops.lab_statistics(out)
    torch.testing.assert_close(
        mean[:, :1], ops.lab_statistics(to_tensor(picture(7) * 0.2 + 0.4))[0], rtol=0, atol=0.1
    )


def test_a_flat_reference_flattens() -> None:
    out = ops.color_match(to_tensor(picture(8)), *ops.lab_statistics(torch.full((1, 3, 1, 8, 8), 0.2)), 1.0)
    torch.testing.assert_close(out, torch.full_like(out, 0.2), rtol=0, atol=1e-3)


def test_bfloat16_frames_stay_bfloat16() -> None:
    video = to_tensor(picture(8)).bfloat16()
    statistics = ops.lab_statistics(to_tensor(picture(7)))
    out = ops.color_match(video, *statistics, 1.0)
    assert out.dtype == torch.bfloat16
    expected = ops.color_match(video.float(), *statistics, 1.0)
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=2**-8)
