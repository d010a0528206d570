"""Every op of the registry that lists its cases: every backend, forward and gradients, against float32.

On a machine without a GPU, Triton's kernels run in its interpreter (bfloat16 products are wrong there, so
half precision stands in for it).  Uninitialised memory is NaN, so an element nobody wrote shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conv_inputs import SIZES_OF_MANY_TILES, conv_inputs
from random_tensors import empty_is_nan, normal
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.errors import InputError
from flashtalk_rt.ops import Quantized
from flashtalk_rt.ops._dispatch import Case, OpSpec, Situation, interpreted

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
SPECS = [spec for spec in ops.REGISTRY if spec.cases]
# On a GPU the VAE, whose frames the colours' ops read, runs in float16 where the rest is bfloat16.
FLOAT16_OPS = {
    *("add_norm_silu", "add_residual", "double_frames", "norm_silu", "pixel_attention", "slice_conv"),
    *("upsample_conv", "vae_head", "lab_statistics", "color_match", "color_match_pixels"),
}
assert not FLOAT16_OPS - {spec.name for spec in SPECS}


def low_dtypes(spec: OpSpec, device: str) -> tuple[torch.dtype, ...]:
    """Half precisions that `spec` is run in, and so tested in."""
    if device == "cpu":
        return (torch.float16,)
    return (torch.bfloat16, torch.float16) if spec.name in FLOAT16_OPS else (torch.bfloat16,)


def parameters(device: str, dtypes: Callable[[OpSpec], tuple[torch.dtype, ...]]) -> list[Any]:
    """(spec, case, backend, device, dtype) of every op."""
    return [
        pytest.param(
            *(spec, case, backend.name, device, dtype),
            id="-".join((spec.name, backend.name, case.name, str(dtype).removeprefix("torch."), device)),
            marks=[pytest.mark.gpu] if device == "cuda" else [],
        )
        for spec in SPECS
        for backend in spec.backends
        for case in spec.cases
        for dtype in dtypes(spec)
    ]


PARAMETERS = [
    parameter
    for device in ("cpu", "cuda")
    for parameter in parameters(
        device, lambda spec, device=device: (torch.float32, *low_dtypes(spec, device))
    )
]
KERNELS = [
    parameter
    for parameter in parameters("cuda", lambda spec: low_dtypes(spec, "cuda"))
    if parameter.values[2] in ("triton", "cuda")
]
# Gradients that kernels compute, as they are asked for together: the bias's changes what is launched.
# Every other op's are torch's.
BACKWARD_KERNELS = {("chunk_attention", "triton"): (("q", "k", "v"), ("q", "k", "v", "key_bias"))}
# Ops that the engine has write over their past, and the argument that says where.
ROOMS = {"norm_silu": "out", "add_norm_silu": "out", "vae_head": "future"}
OVER_THEIR_PAST = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in SPECS
    if spec.name in ROOMS
    for case in spec.cases
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN."""
    with empty_is_nan():
        yield


def serves(
    spec: OpSpec, backend: str, device: str, dtype: torch.dtype, inputs: dict[str, Any], grad: bool = False
) -> str | None:
    """None if it does; else the reason why not.  Triton does on a CPU, where it is interpreted."""
    head_dim = inputs["q"].shape[-1] if isinstance(inputs.get("q"), Tensor) else None
    masked = inputs.get("key_bias") is not None or isinstance(inputs.get("key_length"), Tensor)
    situation = Situation.of(torch.device(device), dtype, head_dim, grad, masked)
    if backend == "triton" and interpreted(situation):
        return None
    chosen = next(b for b in spec.backends if b.name == backend)
    return chosen.supports(situation) or chosen.misfit(**inputs)


def upcast(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def results(out: Any) -> list[Tensor]:
    """Every tensor of a result, as float32; integers as they are."""
    if isinstance(out, Quantized):
        return [out.dequantize()]
    if isinstance(out, Tensor):
        return [out.float() if out.is_floating_point() else out]
    return [tensor for part in out for tensor in results(part)]


def holds_quantized(out: Any) -> bool:
    if isinstance(out, Quantized):
        return True
    return isinstance(out, tuple) and any(holds_quantized(part) for part in out)


def error(found: Tensor, exact: Tensor) -> float:
    """Largest deviation, in units of the exact result's root mean square; of integers all but 1, as either
    may be what a value next to a half was rounded to."""
    assert found.shape == exact.shape
    if not found.is_floating_point():
        found, exact = found.float(), exact.float()
        exact = exact + (found - exact).clamp(-1, 1)
    size = exact.square().mean().sqrt().clamp(min=1e-6)
    return ((found - exact).abs().max() / size).item() if exact.numel() else 0.0


def gradients(
    function: Callable[..., Any], inputs: dict[str, Any], wanted: tuple[str, ...], home: str
) -> list[Tensor]:
    """Of a random sum of the outputs, drawn on the device `home`."""
    given = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    leaves = [given[name].requires_grad_(True) for name in wanted if given[name] is not None]
    generator = torch.Generator(home).manual_seed(1)
    total = leaves[0].new_zeros((), dtype=torch.float32)
    for out in results(function(**given)):
        cotangent = torch.randn(out.shape, generator=generator, device=home).to(out.device)
        total = total + (out * cotangent).sum() if out.requires_grad else total
    return [g.float() for g in torch.autograd.grad(total, leaves)]


def check(kind: str, ours: list[Tensor], eager: list[Tensor], exact: list[Tensor], floor: float) -> None:
    assert len(ours) == len(exact)
    for i, (a, e, x) in enumerate(zip(ours, eager, exact, strict=True)):
        assert torch.isfinite(a).all(), f"{kind} {i}: not every element was written"
        # Where eager computes as the exact form does (lab_statistics, float32 whatever the frames are), its
        # error is no measure of ours: the GPU's own exp2, log2 and order of sums are what differs.
        allowed = max(floor, 2e-4) if a.is_cuda and error(e, x) < 1e-6 else floor
        assert error(a, x) <= 2 * error(e, x) + allowed, f"{kind} {i}"


def check_quantized(ours: list[Tensor], eager: list[Tensor], exact: list[Tensor], step: float) -> None:
    """e4m3 keeps 3 bits of mantissa: rounding errs by 1/16 of a value.

    Triton's interpreter loses the carry where rounding reaches the next power of two (31.99 gives 16).
    """
    for a, e, x in zip(ours, eager, exact, strict=True):
        allowed = 1.05 * step * x.abs() + x.abs().amax() / 448 / 64 + 2 * (e - x).abs().amax()
        assert ((a - x).abs() <= allowed).all()


def home_of(device: str, dtype: torch.dtype) -> str:
    """Where numbers are drawn.  float16 the CPU tests too: what meets a bound there then does so here."""
    return "cpu" if dtype == torch.float16 else device


def draw(case: Case, device: str, dtype: torch.dtype) -> dict[str, Any]:
    home = home_of(device, dtype)
    made = case.make(torch.device(home), dtype, torch.Generator(home).manual_seed(0))
    return {k: moved(v, device) if isinstance(v, Tensor) else v for k, v in made.items()}


def moved(x: Tensor, device: str) -> Tensor:
    """With its strides: a slice's whole storage is moved."""
    whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize(("spec", "case", "backend", "device", "dtype"), PARAMETERS)
def test_a_backend_errs_at_most_twice_as_much_as_eager(
    spec: OpSpec,
    case: Case,
    backend: str,
    device: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert spec.function is not None and spec.reference is not None
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    inputs = draw(case, device, dtype)
    reason = serves(spec, backend, device, dtype, inputs)
    if reason is not None:
        with pytest.raises(InputError, match=backend):
            spec.function(**inputs, backend=backend)
        return
    exact_inputs = upcast(inputs)
    eager = spec.eager or spec.reference
    # Triton's float32 products are tf32 on a GPU.
    floor = 2e-3 if device == "cuda" and dtype == torch.float32 else 2e-5
    with torch.no_grad():
        exact = results(spec.reference(**exact_inputs))
        out = spec.function(**inputs, backend=backend)
        found = results(out)
        low_exact = results(eager(**inputs))
        quantized = holds_quantized(out)
        if quantized:
            check_quantized(
                found, low_exact, exact, step=1 / 2 if (device, backend) == ("cpu", "triton") else 1 / 16
            )
        else:
            check("output", found, low_exact, exact, floor)
    if spec.gradients and not quantized:
        wanted = tuple(n for n in spec.gradients if inputs[n] is not None)
        home = home_of(device, dtype)
        refusal = serves(spec, backend, device, dtype, inputs, grad=True)
        if refusal is not None:
            assert "gradient" in refusal
            with pytest.raises(InputError, match=re.escape(refusal)):
                gradients(lambda **k: spec.function(**k, backend=backend), inputs, wanted, home)
            return
        check(
            "gradient",
            gradients(lambda **k: spec.function(**k, backend=backend), inputs, wanted, home),
            gradients(eager, inputs, wanted, home),
            gradients(spec.reference, exact_inputs, wanted, home),
            floor,
        )


@pytest.mark.parametrize(("spec", "case", "backend", "device", "dtype"), KERNELS)
def test_a_kernel_alone(
    spec: OpSpec,
    case: Case,
    backend: str,
    device: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel, and the backward kernels where there are some, beside as little of torch as can be: what
    `.ci/gpu memcheck` and `racecheck` run, which do not survive all of torch's libraries."""
    assert spec.function is not None
    # cuBLAS's makes an illegal access under racecheck.
    monkeypatch.setattr(torch, "bmm", lambda a, b: (a[..., None] * b[:, None]).sum(2))
    made = case.make(torch.device("cpu"), dtype, torch.Generator().manual_seed(0))
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()}
    if serves(spec, backend, device, dtype, inputs) is not None:
        with pytest.raises(InputError, match=backend):
            spec.function(**inputs, backend=backend)
        return
    out = spec.function(**inputs, backend=backend)
    assert all(part.isfinite().all() for part in results(out))
    for wanted in BACKWARD_KERNELS.get((spec.name, backend), ()):
        if all(inputs[name] is not None for name in wanted):
            leaves = [inputs[name].requires_grad_() for name in wanted]
            out = spec.function(**inputs, backend=backend)
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(("spec", "case"), OVER_THEIR_PAST)
def test_a_kernel_alone_over_its_past(spec: OpSpec, case: Case, device: str) -> None:
    """As the engine calls it: bit for bit what a new tensor would hold."""
    assert spec.function is not None
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels were compiled for the GPU, where this test runs too")
    inputs = draw(case, device, torch.float16)
    expected = spec.function(**inputs, backend="triton")
    room = torch.empty_like(expected[-1] if isinstance(expected, tuple) else expected)
    if inputs["past"] is not None:
        inputs["past"] = room[:, :, -2:].copy_(inputs["past"])
    found = spec.function(**inputs, **{ROOMS[spec.name]: room}, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(results(found), results(expected), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("attend", [ops.chunk_attention, ops.quantized_attention])
def test_a_kernel_alone_of_many_tiles(attend: Callable[..., Tensor]) -> None:
    """CUDA's attentions: several tiles of keys, and more of queries than a GPU has multiprocessors."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is sm_90's")
    q, k, v = (
        normal(2, n, 24, 128, seed=i, dtype=torch.bfloat16, device="cuda")
        for i, n in enumerate((600, 385, 385))
    )
    assert attend(q, k, v, backend="cuda").isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kernel", [(3, 3), (3, 1)], ids=["3x3x3", "3x1x1"])
@pytest.mark.parametrize(("size", "channels"), SIZES_OF_MANY_TILES)
def test_a_kernel_alone_by_tiles_of_slices(
    size: tuple[int, int, int], channels: tuple[int, int], kernel: tuple[int, int], dtype: torch.dtype
) -> None:
    """Every tile of CUDA's slice convolution, of which the op's cases choose two, and blocks that go on from
    one tile to the next."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is sm_90's")
    inputs = {name: x.to("cuda", dtype) for name, x in conv_inputs(size, channels, kernel, "cpu").items()}
    assert ops.slice_conv(**inputs, backend="cuda").isfinite().all()


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_how_many_programs_share_the_rows_of_a_norm_changes_nothing(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A multiprocessor's 64 warps are more than these rows need on a large GPU; with 8, programs go on."""
    from flashtalk_rt.triton_kernels import norms

    spec = next(spec for spec in SPECS if spec.name == "residual_norm")
    case = next(case for case in spec.cases if case.name.startswith("1x160"))
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    inputs = case.make(torch.device(device), dtype, torch.Generator(device).manual_seed(0))
    spread = results(ops.residual_norm(**inputs, backend="triton"))
    monkeypatch.setattr(norms, "RESIDENT_WARPS", norms.WARPS)
    shared = results(ops.residual_norm(**inputs, backend="triton"))
    assert all(torch.equal(a, b) for a, b in zip(spread, shared, strict=True))


def test_an_unknown_backend_is_named() -> None:
    spec = next(spec for spec in SPECS if spec.name == "residual_norm")
    inputs = spec.cases[0].make(torch.device("cpu"), torch.float32, torch.Generator())
    with pytest.raises(InputError, match="no backend 'cutlass'"):
        ops.residual_norm(**{k: v for k, v in inputs.items() if k != "fp8"}, backend="cutlass")


def with_gradients(func: Any, args: tuple[Any, ...], spec: OpSpec, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """`args` of the registered op, of which those that `spec` is differentiable in, and what was made of them
    on the way (no name of an input), require gradients: without, torch's checks of autograd do nothing."""
    given = []
    for argument, value in zip(func._schema.arguments, args, strict=True):
        wanted = argument.name not in inputs or argument.name in spec.gradients
        floating = isinstance(value, Tensor) and value.is_floating_point()
        given.append(value.detach().requires_grad_() if wanted and floating else value)
    return tuple(given)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("spec", [s for s in SPECS if s.gradients], ids=lambda s: s.name)
def test_the_registered_op_keeps_torchs_rules(
    spec: OpSpec, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schema, fake tensors and autograd registration, on every call that the public op makes of it; and what
    torch.compile makes of it and of its backward is what eager gives.  That takes seconds in the interpreter,
    so there it is the first case's alone, and nowhere float8's, which torch's check cannot sum up."""
    assert spec.function is not None
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels were compiled for the GPU, where this test runs too")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "flashtalk_rt":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    for case in spec.cases:
        calls.clear()
        inputs = case.make(torch.device(device), torch.float32, torch.Generator(device).manual_seed(0))
        with Recorder(), torch.no_grad():
            spec.function(**inputs, backend="triton")
        assert calls, "the Triton backend is a registered op"
        compiled = not inputs.get("fp8") and (device != "cpu" or case is spec.cases[0])
        for func, args in calls:
            given = with_gradients(func, args, spec, inputs)
            assert any(isinstance(x, Tensor) and x.requires_grad for x in given)
            torch.library.opcheck(func, given, test_utils=rules)
            if compiled:
                # Traced, sums may be in another order.
                torch.library.opcheck(
                    func, given, test_utils="test_aot_dispatch_dynamic", rtol=1e-4, atol=1e-5
                )
