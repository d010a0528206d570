"""The VAE's ops beyond the registry's parity: the algebra, the caches, a whole VAE through the kernels."""

from __future__ import annotations

import importlib

import pytest
import torch
from random_tensors import normal
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.config import VAEConfig
from flashtalk_rt.errors import InputError
from flashtalk_rt.modules import vae_layers
from flashtalk_rt.modules.vae import VAE, CacheCursor, Encoder
from flashtalk_rt.ops import reference_vae as reference

pixel_attention = importlib.import_module("flashtalk_rt.ops.pixel_attention")  # not the function
SMALL = VAEConfig(dim=4, num_res_blocks=1)
NO_INTERPRETER = "Triton's kernels are interpreted only where there is no GPU"
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason=NO_INTERPRETER)
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
RULES = ("test_schema", "test_autograd_registration", "test_faketensor")  # of torch.library.opcheck
BACKENDS = [
    ("cpu", "torch"),
    pytest.param("cpu", "triton", marks=INTERPRETED),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu),
]
FUSED = (
    "add_residual",
    "double_frames",
    "norm_silu",
    "upsample_conv",
    "vae_head",
)  # the modules of ops with a Triton backend


def random_vae(config: VAEConfig = SMALL) -> VAE:
    torch.manual_seed(0)
    vae = VAE(config).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vae


def relative(out: Tensor, expected: Tensor) -> float:
    assert out.shape == expected.shape
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op by its Triton kernel and biases deferred, as on a GPU."""
    if torch.cuda.is_available():
        pytest.skip(NO_INTERPRETER)
    for name in FUSED:
        module = importlib.import_module(f"flashtalk_rt.ops.{name}")
        monkeypatch.setattr(module, "backend_for", lambda *_, **__: "triton")

    def deferring_bias(conv: vae_layers.Conv3d, x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.conv3d(x, conv.weight, torch.zeros_like(conv.bias), conv.stride, conv.padding), conv.bias

    monkeypatch.setattr(vae_layers.Conv3d, "deferring_bias", deferring_bias)


# --- upsampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 1, 1), (2, 3, 5), (3, 4, 2)])
def test_the_phase_form_is_exact(frames: int, height: int, width: int) -> None:
    x = normal(2, 5, frames, height, width, dtype=torch.float64)
    weight, bias = normal(7, 5, 3, 3, seed=1, dtype=torch.float64), normal(7, seed=2, dtype=torch.float64)
    expected = reference.upsample_conv(x, weight, bias)
    assert relative(ops.upsample_conv(x, ops.fold_upsampled(weight), bias), expected) < 1e-12


def test_folded_weights_keep_their_dtype_and_are_summed_in_float32() -> None:
    weight = normal(6, 4, 3, 3, dtype=torch.bfloat16)
    folded = ops.fold_upsampled(weight)
    assert folded.shape == (4, 6, 4, 2, 2) and folded.dtype == torch.bfloat16
    assert folded.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(folded, ops.fold_upsampled(weight.float()).bfloat16())
    # Every phase holds every weight once.
    wide = ops.fold_upsampled(weight.double())
    for phase in wide:
        torch.testing.assert_close(phase.sum((-2, -1)), weight.double().sum((-2, -1)))


@torch.no_grad()
def test_preparing_changes_no_result_and_no_parameter() -> None:
    vae, z = random_vae().double(), normal(1, 16, 3, 2, 3)
    expected, names = vae.decode(z), list(vae.state_dict())
    assert vae.prepare() is vae
    assert relative(vae.decode(z), expected) < 1e-12
    assert list(vae.state_dict()) == names
    prepared = [layer for layer in vae.decoder.upsamples if isinstance(layer, vae_layers.Upsample)]
    assert len(prepared) == 3 and all(layer.folded is not None for layer in prepared)


# --- attention -------------------------------------------------------------------------------------


def pixel_rows(scale: float, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v of two frames of 70 pixels, 384 wide, as views of one tensor."""
    rows = normal(1, 2, 70, 3 * 384, device=device)
    rows[..., : 2 * 384] *= scale
    return rows.to(dtype).chunk(3, dim=-1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("scores", [2**25, 1000, 1])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_attention_in_explicit_float16(
    scale: float, scores: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and in pieces; at 40 the products are past float16's range, the scaled ones are not."""
    monkeypatch.setattr(pixel_attention, "SCORES", scores)
    q, k, v = pixel_rows(scale, device, torch.float16)
    assert ((q.float() @ k.float().mT).abs().max() > 65504) == (scale > 1)
    exact = reference.pixel_attention(q.double(), k.double(), v.double())
    assert relative(pixel_attention.explicit(q, k, v), exact) < (2e-3 if scale == 1 else 5e-2)


@pytest.mark.gpu
def test_wide_heads_are_served_by_the_explicit_form_in_inference() -> None:
    q, k, v = pixel_rows(1, "cuda", torch.float16)
    assert torch.equal(ops.pixel_attention(q, k, v), pixel_attention.explicit(q, k, v))
    plain = ops.pixel_attention(q, k, v, backend="torch")
    assert relative(ops.pixel_attention(q, k, v), plain) < 2e-3
    assert ops.pixel_attention(q.requires_grad_(True), k, v).requires_grad


# --- norms and caches ------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_the_last_two_frames_are_the_next_calls_past(device: str, backend: str) -> None:
    x, gamma = normal(2, 12, 5, 3, 4, device=device), 1 + 0.1 * normal(12, seed=1, device=device)
    whole = ops.norm_silu(x, gamma, None, backend=backend)
    past, parts = None, []
    for frames in x.split([1, 1, 3], dim=2):
        out = ops.norm_silu(frames, gamma, past, backend=backend)
        past = out[:, :, -2:]
        parts.append(out[:, :, 2:])
    assert whole.shape == (2, 12, 7, 3, 4) and whole.is_contiguous(memory_format=torch.channels_last_3d)
    assert (whole[:, :, :2] == 0).all()
    torch.testing.assert_close(torch.cat(parts, dim=2), whole[:, :, 2:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(past, whole[:, :, -2:], rtol=1e-6, atol=1e-6)


def ndhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("shortcut", [False, True])
def test_in_place_of_the_input_before(shortcut: bool, frames: int, device: str, backend: str) -> None:
    """One buffer through several calls, the first without a past and shorter: bit for bit new tensors."""
    room = ndhwc(torch.full((2, 12, 2 + frames, 9, 11), float("nan"), device=device))
    gamma, bias = (normal(12, seed=n, device=device) for n in (5, 6))
    past, lying = None, None
    for call, count in enumerate((1, frames, frames)):
        x = ndhwc(normal(2, 12, count, 9, 11, seed=call, device=device))
        out = room[:, :, -(2 + count) :]
        if shortcut:
            total, expected = ops.add_norm_silu(x, bias, 2 * x, gamma, past, backend=backend)
            found = ops.add_norm_silu(x, bias, 2 * x, gamma, lying, out=out, backend=backend)
            assert torch.equal(found[0], total) and found[1] is out
        else:
            expected = ops.norm_silu(x, gamma, past, bias, backend=backend)
            assert ops.norm_silu(x, gamma, lying, bias, out=out, backend=backend) is out
        assert torch.equal(out, expected)
        past, lying = expected[:, :, -2:], room[:, :, -2:]


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_the_heads_future_in_place_of_its_past(frames: int, device: str, backend: str) -> None:
    future = ndhwc(torch.full((2, 12, 2, 9, 11), float("nan"), device=device))
    gamma, bias = (normal(12, seed=n, device=device) for n in (5, 6))
    weight, out_bias = (normal(3, 12, 3, 3, 3, device=device) / 18, normal(3, seed=1, device=device))
    past, lying = None, None
    for call, count in enumerate((1, frames, frames)):
        x = ndhwc(normal(2, 12, count, 9, 11, seed=call, device=device))
        given = (weight, out_bias, True)
        expected, past = ops.vae_head(x, bias, 2 * x, gamma, past, *given, backend=backend)
        found = ops.vae_head(x, bias, 2 * x, gamma, lying, *given, future=future, backend=backend)
        assert torch.equal(found[0], expected) and found[1] is future and torch.equal(future, past)
        lying = future


@pytest.mark.parametrize("device", DEVICES)
def test_ops_that_write_in_place_keep_torchs_rules(device: str) -> None:
    x, shortcut = (ndhwc(normal(1, 12, 2, 3, 5, seed=n, device=device)) for n in range(2))
    gamma, bias = (normal(12, seed=n, device=device) for n in (5, 6))
    past = ndhwc(normal(1, 12, 2, 3, 5, seed=2, device=device))
    weight = normal(3, 12, 3, 3, 3, device=device)
    for name, args in {
        "norm_silu_into": (x, bias, shortcut, gamma, past, ndhwc(torch.cat((x, x), dim=2))),
        "vae_head_into": (x, bias, shortcut, gamma, past, weight, bias[:3].clone(), True, past.clone()),
    }.items():
        op = getattr(torch.ops.flashtalk_rt, name).default
        torch.library.opcheck(op, args, test_utils=(*RULES, "test_aot_dispatch_dynamic"))
        # They have no gradient, and say so where one is asked for.
        for arg in args[:5]:
            arg.requires_grad_(True)
        torch.library.opcheck(op, args, test_utils=RULES)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            op(*args).sum().backward()
        for arg in args[:5]:
            arg.requires_grad_(False)


def test_a_room_that_does_not_fit_is_refused() -> None:
    x, gamma = normal(1, 12, 2, 3, 5), torch.ones(12)
    with pytest.raises(InputError, match=r"norm_silu: out .*\[1, 12, 4, 3, 5\]"):
        ops.norm_silu(x, gamma, None, out=ndhwc(x), backend="triton")
    with pytest.raises(InputError, match="NDHWC"):
        ops.norm_silu(x, gamma, None, out=torch.cat((x, x), dim=2), backend="triton")


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_black_pixels_stay_black(device: str, backend: str) -> None:
    x, gamma = torch.zeros(1, 12, 2, 2, 2, device=device), torch.ones(12, device=device)
    out = ops.norm_silu(x, gamma, None, backend=backend)
    assert (out == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_any_layout_is_read(layout: torch.memory_format, device: str) -> None:
    x, shortcut, past = (
        normal(2, 12, n, 3, 5, seed=n, device=device).contiguous(memory_format=layout) for n in (4, 4, 2)
    )
    gamma, bias = (normal(12, seed=n, device=device) for n in (5, 6))
    found = ops.add_norm_silu(x, bias, shortcut, gamma, past, backend="triton")
    for ours, expected in zip(found, reference.add_norm_silu(x, bias, shortcut, gamma, past), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.add_residual(x, bias, shortcut, backend="triton"), found[0])


@INTERPRETED
def test_the_head_takes_wider_parameters_as_under_autocast() -> None:
    x, shortcut = (normal(1, 6, 2, 3, 4, seed=i, dtype=torch.float16) for i in range(2))
    gamma = torch.ones(6, dtype=torch.float16)
    weight, bias = (normal(3, 6, 3, 3, 3, seed=2) / 10).requires_grad_(True), normal(3, seed=3)
    frames, future = ops.vae_head(x, None, shortcut, gamma, None, weight, bias, False, backend="triton")
    assert frames.dtype == future.dtype == torch.float16
    frames.float().square().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    expected, _ = reference.vae_head(
        x.float(), None, shortcut.float(), gamma.float(), None, weight.detach(), bias, False
    )
    assert relative(frames, expected) < 2e-3


# --- the whole VAE ---------------------------------------------------------------------------------


def through(vae: VAE, z: Tensor, video: Tensor) -> list[Tensor]:
    """Decoding step by step, with the caches, and encoding."""
    cache, found = None, []
    for frame in z.split([1, 1, 2], dim=2):
        frames, cache = vae.decode_step(frame, cache)
        found += [frames, *cache]
    return [*found, vae.encode(video)]


@torch.no_grad()
def test_the_kernels_make_the_same_vae(request: pytest.FixtureRequest) -> None:
    vae = random_vae().prepare()
    z, video = normal(1, 16, 4, 2, 3), normal(1, 3, 5, 16, 24, seed=1).tanh()
    expected = through(vae, z, video)
    request.getfixturevalue("fused")
    for out, exact in zip(through(vae, z, video), expected, strict=True):
        assert relative(out, exact) < 1e-5 if exact.abs().max() > 0 else not out.any()


@torch.no_grad()
def test_sliced_convolutions_add_what_they_can(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `ops.slice_conv` serves, no sum is left to a norm, to the head or to a pass of its own."""
    vae = random_vae().prepare()
    z, video = normal(1, 16, 4, 2, 3), normal(1, 3, 5, 16, 24, seed=1).tanh()
    expected = through(vae, z, video)
    request.getfixturevalue("fused")
    monkeypatch.setattr(ops, "slice_conv_wins", lambda x, weight: weight.shape[2] == 3)
    sums: list[Tensor] = []
    for name in ("add_residual", "add_norm_silu"):
        monkeypatch.setattr(ops, name, lambda *args, **_: sums.append(args[0]))
    for out, exact in zip(through(vae, z, video), expected, strict=True):
        assert relative(out, exact) < 1e-5 if exact.abs().max() > 0 else not out.any()
    assert not sums


@pytest.mark.parametrize("kernels", [False, True])
@torch.no_grad()
def test_decoding_in_rooms_is_decoding(kernels: bool, request: pytest.FixtureRequest) -> None:
    """Bit for bit, also of what is remembered; nothing that the rooms held before is read."""
    if kernels:
        request.getfixturevalue("fused")
    vae, z = random_vae().prepare(), normal(1, 16, 4, 2, 3)
    layout = vae.decoding_rooms(z[:, :, :1])
    assert {room.shape[2] for room in layout} == {2, 3, 4, 6} and all(room.is_meta for room in layout)
    rooms = [torch.full_like(room, float("nan"), device="cpu") for room in layout]
    lying, cache = vae.remembered(rooms), None
    for i in range(4):
        latent = z[:, :, i : i + 1]
        frames, cache = vae.decode_step(latent, cache)
        found, future = vae.decode_step(latent, lying if i else None, rooms=rooms)
        assert torch.equal(found, frames)
        for mine, there, expected in zip(future, lying, cache, strict=True):
            assert mine.data_ptr() == there.data_ptr() and torch.equal(mine, expected)


def test_encoding_holds_what_is_remembered_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless gradients need it all; and the last frames are followed by none."""
    futures: list[list[Tensor | None]] = []
    encoder = Encoder.forward

    def noting(self: Encoder, x: Tensor, cursor: CacheCursor) -> Tensor:
        out = encoder(self, x, cursor)
        futures.append(cursor.future)
        return out

    monkeypatch.setattr(Encoder, "forward", noting)
    vae, video = random_vae(), normal(1, 3, 13, 16, 24).tanh()
    with torch.no_grad():
        alone = vae.encode(video)
    torch.testing.assert_close(vae.encode(video), alone, rtol=0, atol=0)
    for pass_, future in enumerate(futures):
        for tensor in future:
            if pass_ in (2, 5):
                assert tensor is None
            else:
                assert tensor is not None
                assert (tensor.untyped_storage().nbytes() == tensor.nbytes) == (pass_ < 2), pass_


@pytest.mark.gpu
@torch.no_grad()
def test_the_vae_on_a_gpu_is_the_vae_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = random_vae(VAEConfig(dim=12, num_res_blocks=1)).prepare()
    z, video = normal(1, 16, 4, 2, 3), normal(1, 3, 5, 16, 24, seed=1).tanh()
    expected = through(vae, z, video)
    for out, exact in zip(through(vae.cuda(), z.cuda(), video.cuda()), expected, strict=True):
        assert relative(out.cpu(), exact) < 1e-4 if exact.abs().max() > 0 else not out.any()


@pytest.mark.usefixtures("fused")
def test_the_kernels_compile_whole_and_train() -> None:
    decoder = random_vae().decoder.requires_grad_(True)
    z = normal(1, 16, 1, 2, 2).requires_grad_(True)
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    eager = decoder(z, CacheCursor(None))
    torch.testing.assert_close(compiled(z, CacheCursor(None)), eager)
    eager.square().sum().backward()
    # Of one frame alone, a temporal doubling sees nothing.
    unused = [name for name, p in decoder.named_parameters() if p.grad is None]
    assert all("time_conv" in name for name in unused)
    assert z.grad is not None and z.grad.abs().max() > 0


@torch.no_grad()
def test_decoding_clamps_when_asked() -> None:
    vae, z = random_vae(), normal(1, 16, 1, 2, 3)
    vae.decoder.head[2].weight.mul_(20)
    free, clamped = vae.decode_step(z, None)[0], vae.decode_step(z, None, clamp=True)[0]
    assert free.abs().max() > 1
    assert torch.equal(clamped, free.clamp(-1, 1))
