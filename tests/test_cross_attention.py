"""The exact algebra of the cross-attentions: collapsed padding, absorbed projections, and what each costs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_op_parity import check, poisoned_memory, results, upcast  # noqa: F401 (a fixture: NaN where unwritten)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flashtalk_rt import ops
from flashtalk_rt.ops import AudioWork
from flashtalk_rt.ops._dispatch import OpSpec, Situation

SPECS = {spec.name: spec for spec in ops.REGISTRY if "audio" in spec.name or "cross" in spec.name}
audio = importlib.import_module("flashtalk_rt.ops.audio_cross_attention")  # the op has the module's name
INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's kernels are interpreted only where there is no GPU"
)
BACKENDS = [
    ("cpu", "torch"),
    pytest.param("cpu", "triton", marks=INTERPRETED),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu),
]
BOUNDS = {"cpu": 1e-5, "cuda": 1e-4}  # of float32: a GPU's products are three of tf32
PUBLISHED = AudioWork(tokens=12096, frames=9, keys=32, heads=40, width=5120)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(device)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return ((found - expected).abs().max() / expected.abs().max()).item()


# --- text and image ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("padded", "real"), [(512, 20), (512, 0), (512, 511), (512, 512), (4, 1), (1, 0), (1, 1)]
)
def test_collapsed_padding_is_the_padded_softmax(padded: int, real: int) -> None:
    q, image_k, image_v = (normal(2, n, 3, 16, seed=i) for i, n in enumerate((5, 7, 7)))
    k, v = (3 * normal(2, padded, 3, 16, seed=i) for i in (4, 5))
    for x in (k, v):
        x[:, real:] = x[:, -1:].clone()
    whole = k, v
    hidden = torch.arange(padded) > real
    k, v = (torch.where(hidden[:, None, None], 7.0, x) for x in (k, v))  # nobody reads them
    bias = ops.padding_bias(real, padded, q.device)
    found = ops.dual_cross_attention(q, k, v, image_k, image_v, text_bias=bias)
    expected = softmax_attention(q, *whole) + softmax_attention(q, image_k, image_v)
    assert relative(found, expected) < 1e-7  # the bias is float32, all else float64


@pytest.mark.parametrize("real", [-1, 9])
def test_padding_bias_names_a_bad_count(real: int) -> None:
    with pytest.raises(ValueError, match=f"{real} real tokens of 8"):
        ops.padding_bias(real, 8, torch.device("cpu"))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize(
    "hidden", [slice(0, 40), slice(32, 70), slice(1, None), slice(None, None, 2)], ids=str
)
def test_a_bias_of_minus_infinity_hides_a_key(hidden: slice, device: str, backend: str) -> None:
    """Also where it hides a whole tile of keys, the first one too."""
    q, k, v, image_k, image_v = (
        normal(1, n, 2, 16, seed=i, dtype=torch.float32, device=device)
        for i, n in enumerate((3, 71, 71, 4, 4))
    )
    bias = torch.zeros(71, device=device)
    bias[hidden] = float("-inf")
    seen = bias == 0
    found = ops.dual_cross_attention(q, k, v, image_k, image_v, text_bias=bias, backend=backend)
    expected = ops.dual_cross_attention(q, k[:, seen], v[:, seen], image_k, image_v, backend="torch")
    assert relative(found, expected) < BOUNDS[device]


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_the_hidden_end_is_never_read(device: str) -> None:
    """So that the unused end of a buffer of fixed length costs nothing."""
    q, k, image_k = (
        normal(1, n, 2, 16, seed=i, dtype=torch.float32, device=device) for i, n in enumerate((3, 512, 4))
    )
    bias = torch.zeros(512, device=device)
    bias[20:] = float("-inf")
    k[:, 20:] = float("nan")
    found = ops.dual_cross_attention(q, k, k, image_k, image_k, text_bias=bias, backend="triton")
    short = k[:, :20]
    expected = ops.dual_cross_attention(q, short, short, image_k, image_k, backend="torch")
    assert relative(found, expected) < BOUNDS[device]


def test_dual_cross_attention_names_what_does_not_fit() -> None:
    q, k = torch.zeros(2, 3, 2, 16), torch.zeros(2, 5, 2, 16)
    for text_k, text_v in ((k[:1], k[:1]), (k, k[:, :4]), (k[..., :8], k[..., :8]), (k[:, :0], k[:, :0])):
        with pytest.raises(ValueError, match="text keys"):
            ops.dual_cross_attention(q, text_k, text_v, k, k)
    with pytest.raises(ValueError, match="image keys"):
        ops.dual_cross_attention(q, k, k, k[:, :, :1], k[:, :, :1])
    with pytest.raises(ValueError, match=r"text_bias \[4\]"):
        ops.dual_cross_attention(q, k, k, k, k, text_bias=torch.zeros(4))
    with pytest.raises(ValueError, match=r"q, image k and v are .*; they must be of one dtype"):
        ops.dual_cross_attention(q, k, k, k.double(), k.double())
    with pytest.raises(
        ValueError, match="q, text k and v are on cpu, meta and meta; they must be on one device"
    ):
        ops.dual_cross_attention(q, k.to("meta"), k.to("meta"), k, k)
    with pytest.raises(ValueError, match="text_bias is on meta and q on cpu; they must be on one device"):
        ops.dual_cross_attention(q, k, k, k, k, text_bias=torch.zeros(5, device="meta"))


# --- audio -------------------------------------------------------------------------------------------


def audio_layer(
    batch: int, frames: int, tokens: int, keys: int, heads: int, dim: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """x and the parameters of both projections; k and v as views of one product, as the DiT makes them."""
    width = heads * dim
    k, v = normal(batch, frames, keys, 2, heads, dim, seed=0, dtype=dtype).unbind(3)
    return {
        "x": normal(batch, frames * tokens, width, seed=1, dtype=dtype),
        "q_weight": 2 * normal(width, width, seed=2, dtype=dtype) / width**0.5,
        "q_bias": normal(width, seed=3, dtype=dtype),
        "k": k,
        "v": v,
        "o_weight": normal(width, width, seed=4, dtype=dtype) / width**0.5,
        "o_bias": normal(width, seed=5, dtype=dtype),
    }


def plain_form(
    x: Tensor, q_weight: Tensor, q_bias: Tensor, k: Tensor, v: Tensor, o_weight: Tensor, o_bias: Tensor
) -> Tensor:
    q = F.linear(x, q_weight, q_bias).unflatten(-1, k.shape[-2:])
    return F.linear(ops.audio_cross_attention(q, k, v).flatten(2), o_weight, o_bias)


def absorbed_form(
    x: Tensor, q_weight: Tensor, q_bias: Tensor, k: Tensor, v: Tensor, o_weight: Tensor, o_bias: Tensor
) -> Tensor:
    matrices = ops.absorb_audio(q_weight, q_bias, k, v, o_weight, o_bias)
    return ops.absorbed_audio_attention(x, *matrices, k.shape[3], k.shape[2])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4, 3, 16), (1, 2, 1, 32, 5, 8), (1, 1, 7, 1, 1, 64)], ids=str)
def test_the_absorbed_form_is_the_plain_form_with_its_projections(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, bound: float
) -> None:
    layer = audio_layer(*shape, dtype)
    assert relative(absorbed_form(**layer), plain_form(**layer)) < bound


@pytest.mark.parametrize("gain", [1, 3])  # the scores' deviation is twice that
def test_the_absorbed_form_in_bfloat16_errs_at_most_twice_as_much_as_the_plain_form(gain: float) -> None:
    layer = {k: v.bfloat16() for k, v in audio_layer(1, 2, 48, 32, 3, 64, torch.float64).items()}
    layer["q_weight"] *= gain
    exact = plain_form(**{k: v.double() for k, v in layer.items()})
    absorbed, plain = (
        (form(**layer).double() - exact).norm() / exact.norm() for form in (absorbed_form, plain_form)
    )
    assert absorbed <= 2 * plain


def test_absorbing_writes_both_matrices_where_they_are_read() -> None:
    layer = audio_layer(2, 3, 5, 4, 3, 16, torch.float32)
    a, a_bias, b = ops.absorb_audio(**{name: x for name, x in layer.items() if name != "x"})
    assert (a.shape, a_bias.shape, b.shape) == ((2, 3, 48, 12), (2, 3, 12), (2, 3, 12, 48))
    assert a.mT.is_contiguous() and b.is_contiguous()


def test_both_forms_have_the_same_gradients() -> None:
    gradients = []
    for form in (absorbed_form, plain_form):
        layer = {k: v.requires_grad_(True) for k, v in audio_layer(2, 3, 5, 4, 3, 16, torch.float64).items()}
        out = form(**layer)
        gradients.append(torch.autograd.grad(out, list(layer.values()), normal(*out.shape, seed=9)))
    for name, found, expected in zip(layer, *gradients, strict=True):
        assert relative(found, expected) < 1e-10, name


def test_absorbing_keeps_torchs_rules() -> None:
    x = normal(2, 3, 4, 2, 3, 8, seed=0, dtype=torch.float32).unbind(3)[0].requires_grad_(True)
    weight = normal(5, 3, 8, seed=1, dtype=torch.float32).permute(1, 2, 0).requires_grad_(True)
    torch.library.opcheck(torch.ops.flashtalk_rt.head_products.default, (x, weight, 0.5))


def test_audio_ops_name_what_does_not_fit() -> None:
    q, k = torch.zeros(2, 6, 2, 16), torch.zeros(2, 3, 4, 2, 16)
    for bad in (k[:1], k[:, :, :, :1], k[..., :8], torch.zeros(2, 4, 4, 2, 16)):
        with pytest.raises(ValueError, match="keys"):
            ops.audio_cross_attention(q, bad, bad)
    layer = audio_layer(1, 3, 2, 4, 2, 16, torch.float32)
    a, a_bias, b = ops.absorb_audio(**{name: x for name, x in layer.items() if name != "x"})
    with pytest.raises(ValueError, match="do not fit the weights"):
        ops.absorb_audio(**{n: x[:16] if n == "q_weight" else x for n, x in layer.items() if n != "x"})
    for x, heads in ((layer["x"][:, :5], 2), (layer["x"][..., :8], 2), (layer["x"], 3)):
        with pytest.raises(ValueError, match="do not fit"):
            ops.absorbed_audio_attention(x, a, a_bias, b, heads, 4)


# --- which form --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "name"), [(plain_form, "plain_flops"), (absorbed_form, "absorbed_flops")])
def test_the_flops_are_torchs_own_count(form: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, frames, tokens, keys, heads, dim = 2, 3, 5, 4, 3, 16
    layer = audio_layer(batch, frames, tokens, keys, heads, dim, torch.float32)
    work = AudioWork(batch * frames * tokens, batch * frames, keys, heads, heads * dim)
    # The counter knows neither our op nor a CPU's fused attention.
    monkeypatch.setattr(audio, "_head_products", lambda *arguments: audio._plain_products(*arguments)[0])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        form(**layer)
    bias = 2 * batch * frames * keys * heads * dim  # of a_bias, the one product that the cost leaves out
    assert counter.get_total_flops() - (bias if form is absorbed_form else 0) == getattr(work, name)


def test_the_absorbed_form_is_cheaper_at_the_published_shape_only_by_its_few_keys() -> None:
    assert ops.audio_form(PUBLISHED) == "absorbed"
    assert PUBLISHED.plain_flops == pytest.approx(1.276e12, rel=1e-3)
    assert PUBLISHED.absorbed_flops == pytest.approx(0.347e12, rel=1e-3)
    # As many columns as channels: nothing is saved, and the construction comes on top.
    assert ops.audio_form(AudioWork(12096, 9, keys=160, heads=40, width=5120)) == "plain"
    # Few tokens a frame: the construction costs more than the projections.
    assert ops.audio_form(AudioWork(90, 9, keys=32, heads=40, width=5120)) == "plain"


def test_a_measurement_outvotes_the_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "MEASURED_MS", {PUBLISHED: (1.0, 2.0)})
    assert ops.audio_form(PUBLISHED) == "plain"


# --- the kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dual_cross_attention", "audio_cross_attention"])
def test_triton_serves_the_head_dimensions_it_has_tiles_for(name: str) -> None:
    from flashtalk_rt.triton_kernels import audio_attention, cross_attention

    tiles = {dim for dim, _ in cross_attention.TILES} if "dual" in name else set(audio_attention.TILES)
    supports = next(b for b in SPECS[name].backends if b.name == "triton").supports
    served = [
        dim
        for dim in range(257)
        if supports(Situation("cuda", torch.bfloat16, dim, capability=(9, 0))) is None
    ]
    assert served == sorted(tiles)
    assert "head dimension" in str(supports(Situation("cuda", torch.bfloat16, 24, capability=(9, 0))))


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_batches_of_little_text_are_left_to_the_cuda_kernel(device: str) -> None:
    """By Triton's behind it, which no op launches so where there is no CUDA kernel."""
    from flashtalk_rt.triton_kernels.resident_attention import RESIDENT, launch_resident

    inputs = [
        normal(4, tokens, 2, 128, seed=i, dtype=torch.float16, device=device)
        for i, tokens in enumerate((133, 70, 70, 257, 257))
    ]
    bias = normal(4, 70, seed=5, dtype=torch.float32, device=device)
    for row, visible in zip(bias, (48, 49, 1, 70), strict=True):
        row[visible:] = float("-inf")
    out = torch.full_like(inputs[0], 7)
    launch_resident((*inputs, bias, out), RESIDENT, but_text=48)
    assert (out[::2] == 7).all()
    served = [x[1::2] for x in (*inputs, bias)]
    eager = ops.dual_cross_attention(*served[:5], text_bias=served[5], backend="torch")
    exact = ops.dual_cross_attention(*(x.float() for x in served[:5]), text_bias=served[5], backend="torch")
    check("output", results(out[1::2]), results(eager), [exact], 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
@torch.no_grad()
def test_the_14b_models_call(spec: OpSpec) -> None:
    assert spec.workload is not None and spec.function is not None and spec.reference is not None
    inputs = spec.workload.make(torch.device("cuda"), torch.bfloat16, torch.Generator("cuda").manual_seed(0))
    exact = results(spec.reference(**upcast(inputs)))
    eager = results(spec.reference(**inputs))
    for backend in {"triton", "cuda"} & {backend.name for backend in spec.backends}:
        if backend == "triton" or torch.cuda.get_device_capability() == (9, 0):
            check("output", results(spec.function(**inputs, backend=backend)), eager, exact, 2e-5)
