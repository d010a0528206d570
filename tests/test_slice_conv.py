"""The slice convolution's op: which backend serves it, when it is taken, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_inputs import DTYPES, KERNELS, conv_inputs, op
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.errors import InputError
from flashtalk_rt.modules.vae_layers import CausalConv3d
from flashtalk_rt.ops import _dispatch
from flashtalk_rt.ops._dispatch import Situation


def test_the_absence_of_the_extension_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError(name)

    def broken(name: str) -> ModuleType:
        raise ImportError("undefined symbol: x")

    hopper = Situation("cuda", torch.bfloat16, capability=(9, 0))
    for load_module, nvcc, message in (
        (absent, None, "not built: nvcc is not on PATH"),
        (absent, "/bin/nvcc", "not built (pip install --no-build-isolation"),
        (broken, None, "does not load: undefined symbol: x"),
    ):
        op.extension.cache_clear()
        monkeypatch.setattr(op.importlib, "import_module", load_module)
        monkeypatch.setattr(op.shutil, "which", lambda tool, nvcc=nvcc: nvcc)
        assert message in op.extension()
        assert message in str(op._cuda(hopper))
    op.extension.cache_clear()


def test_the_cuda_backend_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "extension", lambda: ModuleType("flashtalk_rt._C"))
    bf16 = torch.bfloat16
    for dtype in DTYPES:
        assert op._cuda(Situation("cuda", dtype, capability=(9, 0))) is None
    assert op._cuda(Situation("cpu", bf16)) == "needs a CUDA device, this is cpu"
    assert op._cuda(Situation("cuda", bf16, capability=(10, 0))) == "needs sm_90, this is (10, 0)"
    assert "needs bfloat16 or float16" in str(op._cuda(Situation("cuda", torch.float32, capability=(9, 0))))
    assert op._cuda(Situation("cuda", bf16, grad=True, capability=(9, 0))) == "has no gradient"


@pytest.mark.parametrize("kernel", KERNELS)
def test_torch_and_the_explicit_form_agree_with_conv3d(kernel: tuple[int, int]) -> None:
    inputs = conv_inputs((2, 5, 7), (6, 4), kernel)
    x, weight = inputs["x"].permute(3, 0, 1, 2)[None], inputs["weight"].permute(0, 4, 1, 2, 3)
    side = kernel[1] // 2
    plain = F.conv3d(x.double(), weight.double(), inputs["bias"].double(), padding=(0, side, side))
    expected = plain[0].permute(1, 2, 3, 0).float() + inputs["residual"]
    for form in (op.slice_conv, op._explicit):
        torch.testing.assert_close(form(**inputs), expected, rtol=1e-4, atol=1e-5)
    without = op.slice_conv(inputs["x"], inputs["weight"], inputs["bias"])
    torch.testing.assert_close(without + inputs["residual"], expected, rtol=1e-4, atol=1e-5)
    assert without.is_contiguous()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every device is an H100 with the extension, to whoever chooses a backend."""

    def of(
        cls: type, device: torch.device, dtype: torch.dtype, head_dim: object, grad: bool, mask: bool
    ) -> Situation:
        return Situation("cuda", dtype, grad=grad, capability=(9, 0))

    monkeypatch.setattr(Situation, "of", classmethod(of))
    monkeypatch.setattr(op, "extension", lambda: ModuleType("flashtalk_rt._C"))
    _dispatch._backend_for.cache_clear()
    yield
    _dispatch._backend_for.cache_clear()


def wins(
    channels: tuple[int, int], kernel: tuple[int, int], size: tuple[int, int, int], **changes: Any
) -> bool:
    """`slice_conv_wins` of tensors without data."""
    (c, o), (kt, k), (frames, height, width) = channels, kernel, size
    options = {"device": "meta", "dtype": torch.float16}
    x = torch.empty(changes.pop("batch", 1), c, frames + kt - 1, height, width, **options)
    answer: bool = op.slice_conv_wins(x, torch.empty(o, c, kt, k, k, **{**options, **changes}))
    return answer


@pytest.mark.usefixtures("hopper")
def test_the_kernel_is_taken_where_it_was_measured_faster() -> None:
    for height, width in ((768, 448), (720, 416)):  # the second is a little smaller than what was measured
        for channels, scale, frames in (
            ((96, 96), 1, 4), ((96, 192), 2, 4), ((192, 192), 2, 4), ((192, 384), 4, 2), ((384, 384), 4, 2),
            ((384, 384), 8, 1),
        ):  # fmt: skip
            for count in (1, frames):
                assert wins(channels, (3, 3), (count, height // scale, width // scale))
        assert wins((384, 768), (3, 1), (1, height // 8, width // 8))
        assert not wins((384, 768), (3, 1), (2, height // 4, width // 4)), "measured slower"
    large, known = (4, 768, 448), ((96, 96), (3, 3))
    assert wins(*known, (1, 1920, 1080))
    assert not wins(*known, (1, 512, 448)), "too few pixels to say"
    assert not wins((96, 96), (1, 1), large) and not wins((32, 96), (3, 3), large), "never measured"
    assert not wins(*known, large, batch=2)
    assert not wins(*known, large, dtype=torch.float32), "as under autocast"
    assert not wins(*known, large, requires_grad=True)
    with torch.no_grad():
        assert wins(*known, large, requires_grad=True)
    with ops.plain_backends():
        assert not wins(*known, large)
    assert wins(*known, large)


@pytest.mark.usefixtures("hopper")
@torch.no_grad()
def test_torch_compile_sees_through_the_choice() -> None:
    found = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        found.append(any("slice_conv" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    conv = CausalConv3d(96, 96, 3).to("meta", torch.float16)
    x = torch.empty(1, 96, 3, 768, 448, device="meta", dtype=torch.float16)
    shape = torch.compile(conv, backend=backend, fullgraph=True)(x).shape
    assert shape == (1, 96, 1, 768, 448)
    torch.compiler.reset()
    with ops.plain_backends():
        assert torch.compile(conv, backend=backend, fullgraph=True)(x).shape == shape
    torch.compiler.reset()
    assert found == [True, False]


def test_the_op_is_served_as_it_is_asked_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = conv_inputs((1, 4, 5), (32, 96), (1, 1))
    served = []

    def kernel(x: Tensor, *others: Tensor) -> Tensor:
        served.append(x.shape)
        return x

    monkeypatch.setattr(op, "_kernel", kernel)
    monkeypatch.setattr(op, "backend_for", lambda *_, wanted=None, **__: wanted or "cuda")
    op.slice_conv(**inputs)
    assert served == []
    monkeypatch.setattr(op, "MEASURED_FASTER", {(32, 96, 1, 1): (20, 20)})
    op.slice_conv(**inputs)
    assert len(served) == 1
    op.slice_conv(**conv_inputs((2, 4, 5), (32, 96), (1, 1)))  # another size
    op.slice_conv(**inputs, backend="torch")
    assert len(served) == 1
    for channels in ((33, 96), (32, 95)):
        with pytest.raises(InputError, match="it needs multiples of 32 and 96"):
            op.slice_conv(**conv_inputs((1, 4, 5), channels, (1, 1)), backend="cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 5, 7)}, "are not"),
        ({"x": torch.zeros(2, 4, 5, 6)}, "no longer than the 2 frames"),
        ({"weight": torch.zeros(4, 3, 2, 2, 6)}, "the kernel is 3 x 2 x 2"),
        ({"bias": torch.zeros(5)}, r"bias is \[5\], not \[4\]"),
        ({"residual": torch.zeros(3, 4, 5, 4)}, r"residual is \[3, 4, 5, 4\], not \[1, 4, 5, 4\]"),
        ({"bias": torch.zeros(4, dtype=torch.bfloat16)}, "bias is torch.bfloat16"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, Tensor], message: str) -> None:
    inputs = conv_inputs((1, 4, 5), (6, 4), (3, 3))
    with pytest.raises(InputError, match=message):
        op.slice_conv(**{**inputs, **change})
