"""The CUDA extension: built by setup.py for sm_90a, its machine code, its index arithmetic, its op.

Without a GPU the kernel cannot run.  What can be shown is shown: it compiles without a warning, its machine
code multiplies on the tensor cores and keeps nothing in local memory, and a model of the hardware on the
CPU, driven by the kernel's own index arithmetic, gives the plain sum.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.config import VAEConfig
from flashtalk_rt.errors import InputError
from flashtalk_rt.modules.vae import VAE
from flashtalk_rt.modules.vae_layers import CausalConv3d
from flashtalk_rt.ops import _dispatch
from flashtalk_rt.ops._dispatch import Situation

ROOT = Path(__file__).parents[1]
TILES = {(n, m64, spatial) for n, m64 in ((96, 2), (96, 4), (192, 1), (192, 2)) for spatial in (1, 3)}
ELEMENTS = {"13__nv_bfloat16": ".F32.BF16", "6__half": ".F32"}  # mangled name -> its wgmma in machine code
DTYPES = [torch.bfloat16, torch.float16]
KERNELS = [(3, 3), (1, 3), (3, 1), (1, 1)]  # frames, side
op = importlib.import_module("flashtalk_rt.ops.slice_conv")  # `ops` may hold the function under this name

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH: csrc is not compiled here")
CXX = shutil.which("c++")
# nvcc's, ptxas's and the C++ compiler's own; not Python's deprecations around them.
COMPILER_WARNING = re.compile(
    r"^.*(?:\b(?:nvcc|ptxas|nvlink|cc1plus)\b|\.(?:cu|cuh|cpp|h)\b).*\bwarning\s*[:#].*$", re.MULTILINE
)


def load(path: Path) -> ModuleType:
    # Not the installed one's name: to an equal name pybind11 gives the module that was loaded first.
    spec = importlib.util.spec_from_file_location("built._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension as setup.py builds it; any warning of nvcc or ptxas, a spill too, is an error there."""
    folder = tmp_path_factory.mktemp("csrc")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib")]
    done = subprocess.run(
        [*command, "--build-temp", str(folder / "temp")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = list((folder / "lib" / "flashtalk_rt").glob("_C.*"))
    assert done.returncode == 0 and len(found) == 1, done.stdout[-4000:] + done.stderr[-4000:]
    assert COMPILER_WARNING.findall(done.stdout + done.stderr) == []
    return found[0]


def machine_code(library: Path) -> dict[tuple[tuple[int, ...], str], list[str]]:
    """The instructions of every slice convolution, by its tile (n, m64, spatial) and element."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("triton, whose wheel holds cuobjdump, is not installed")
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "-sass", library], capture_output=True, text=True, check=True)
    kernels: dict[tuple[tuple[int, ...], str], list[str]] = {}
    instructions: list[str] = []
    named = re.compile(rf"SliceConvTileILi(\d+)ELi(\d+)ELi(\d+)E+({'|'.join(ELEMENTS)})")
    for line in done.stdout.splitlines():
        if "Function : " in line:
            instructions = []
            if name := named.search(line):
                kernels[tuple(map(int, name.groups()[:3])), name[4]] = instructions
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(code[1].strip())
    return kernels


@needs_nvcc
@pytest.mark.timeout(600)
def test_the_machine_code_is_hoppers(built: Path) -> None:
    kernels = machine_code(built)
    assert set(kernels) == {(tile, element) for tile in TILES for element in ELEMENTS}
    for ((n, m64, spatial), element), code in kernels.items():

        def count(pattern: str, code: list[str] = code) -> int:
            return sum(re.search(pattern, line) is not None for line in code)

        # Two wgmma a tap and slab for each 64-row product: nothing was unrolled twice or left out.
        product = re.escape(f"HGMMA.64x{n}x16{ELEMENTS[element]} ")
        assert count(rf"^{product}") == count("HGMMA") == spatial * 2 * m64
        assert count(r"UTMALDG\.4D") >= 1 and count(r"UTMALDG\.5D") >= spatial
        assert count(r"USETMAXREG") == 2, "registers move from the loading warp to the multiplying ones"
        assert count(r"\b(LDL|STL)\b") == 0, "local memory"
        # What follows the release of registers belongs to the loading warp, which kept 24.
        start = next(i for i, line in enumerate(code) if "USETMAXREG.DEALLOC" in line)
        assert "0x18" in code[start]
        assert max(int(r) for line in code[start:] for r in re.findall(r"\bR(\d+)\b", line)) < 24


@needs_nvcc
@pytest.mark.timeout(600)
def test_the_extension_names_what_it_does_not_take(built: Path) -> None:
    module = load(built)
    call = {
        **dict.fromkeys(("x", "weight", "bias", "out"), 1024), "residual": 0, "device": 0, "stream": 0,
        "dtype": "bfloat16",
        **dict.fromkeys(("in_channels", "out_channels"), 96),
        **dict.fromkeys(("frames", "height", "width", "kernel_t", "spatial"), 3),
    }  # fmt: skip
    for change, message in (
        ({"in_channels": 100}, "100 input channels are no multiple of 32"),
        ({"out_channels": 100}, "100 output channels are no multiple of 96"),
        ({"frames": 2}, "2 frames are fewer than the kernel's 3"),
        ({"spatial": 2}, "the kernel is 2 pixels wide"),
        ({"dtype": "float32"}, "dtype is float32; it must be bfloat16 or float16"),
        ({"width": 0}, "width is 0"),
        ({"width": 1 << 20}, "a row of the output is too long"),
        ({"out": 0}, "out is null"),
        ({"residual": 8}, "residual is not aligned to 16 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            module.slice_conv(**{**call, **change})
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"cudaSetDevice\(call.device\) returned \d+ \(cudaError"):
            module.slice_conv(**call)


@needs_nvcc
@pytest.mark.timeout(600)
def test_attention_names_what_it_does_not_take(built: Path) -> None:
    module = load(built)
    call = {
        **dict.fromkeys(("q", "k", "v", "out"), 1024), "device": 0, "stream": 0,
        **dict.fromkeys(("q_strides", "k_strides", "v_strides"), (3 * 256, 256, 128)),
        "batch": 2, "length": 3, "keys": 3, "heads": 2,
    }  # fmt: skip
    for change, message in (
        ({"keys": 0}, "keys is 0; it must be 1 or more"),
        ({"v": 8}, "v is not aligned to 16 bytes"),
        ({"out": 0}, "out is null"),
        ({"k_strides": (3 * 256, 0, 128)}, "stride 0 of k is no positive multiple of 8"),
        ({"q_strides": (3 * 260, 260, 130)}, "stride 780 of q is no positive multiple of 8"),
        ({"length": (1 << 31) - 1}, "too many rows"),
        ({"length": 1 << 29, "heads": 1 << 16}, "too many queries"),
        ({"tile_keys": 64}, "there is no tile of 64 keys"),
    ):
        if torch.cuda.is_available() or message != "too many queries":  # that depends on the device
            with pytest.raises(ValueError, match=message):
                module.chunk_attention(**{**call, **change})
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"cudaSetDevice\(call.device\) returned \d+ \(cudaError"):
            module.chunk_attention(**{**call, "batch": 1, "q_strides": (1, 256, 128)})


@pytest.mark.skipif(CXX is None, reason="no C++ compiler: the model of the kernel is not run")
def test_the_model_of_the_hardware_gives_the_plain_sum(tmp_path: Path) -> None:
    """TMA boxes with zero fill, swizzle, descriptors, fragments, the epilogue's exchange, the pipeline."""
    source, program = ROOT / "csrc" / "tests" / "slice_conv_model.cpp", tmp_path / "model"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([str(CXX), *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("stages of") == len(TILES)


def test_device_code_knows_nothing_of_torch_and_one_file_of_python() -> None:
    sources = {p.relative_to(ROOT / "csrc").as_posix(): p.read_text() for p in (ROOT / "csrc").rglob("*.*")}
    assert len(sources) >= 7
    for name, text in sources.items():
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text), name
        assert name == "bindings.cpp" or "pybind11" not in text, name
        assert text.count("\n") < 400, name


# --- the op ----------------------------------------------------------------------------------------


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


def tensors(
    size: tuple[int, int, int], channels: tuple[int, int], kernel: tuple[int, int], device: str = "cpu"
) -> dict[str, Tensor]:
    make = op._case(size, channels, kernel, residual=True).make
    inputs: dict[str, Tensor] = make(
        torch.device(device), torch.float32, torch.Generator(device).manual_seed(0)
    )
    return inputs


@pytest.mark.parametrize("kernel", KERNELS)
def test_torch_and_the_explicit_form_agree_with_conv3d(kernel: tuple[int, int]) -> None:
    inputs = tensors((2, 5, 7), (6, 4), kernel)
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
    inputs = tensors((1, 4, 5), (32, 96), (1, 1))
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
    op.slice_conv(**tensors((2, 4, 5), (32, 96), (1, 1)))  # another size
    op.slice_conv(**inputs, backend="torch")
    assert len(served) == 1
    for channels in ((33, 96), (32, 95)):
        with pytest.raises(InputError, match="it needs multiples of 32 and 96"):
            op.slice_conv(**tensors((1, 4, 5), channels, (1, 1)), backend="cuda")


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
    inputs = tensors((1, 4, 5), (6, 4), (3, 3))
    with pytest.raises(InputError, match=message):
        op.slice_conv(**{**inputs, **change})


# --- on a GPU --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(request: pytest.FixtureRequest) -> ModuleType:
    """The installed extension, or one built here if that is absent or older than the sources."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are sm_90's")
    module = op.extension()
    sources = [path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*")]
    if NVCC and (isinstance(module, str) or Path(str(module.__file__)).stat().st_mtime < max(sources)):
        module = load(request.getfixturevalue("built"))
    if isinstance(module, str):
        pytest.skip(module)
    return module


@pytest.fixture
def extension(loaded: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The extension that the op calls; empty memory is NaN."""
    monkeypatch.setattr(op, "extension", lambda: loaded)
    _dispatch._backend_for.cache_clear()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield loaded
    torch.use_deterministic_algorithms(False)
    _dispatch._backend_for.cache_clear()


# Those that csrc/tests/slice_conv_model.cpp finds to run every tile, and odd ones.
SIZES = [
    ((1, 250, 250), (96, 96)),
    ((1, 125, 250), (96, 192)),
    ((1, 65, 17), (96, 96)),
    ((1, 65, 17), (96, 192)),
    ((2, 5, 9), (384, 192)),
    ((3, 33, 8), (192, 384)),
    ((1, 1, 1), (32, 288)),
    ((2, 40, 56), (192, 768)),
    ((1, 96, 56), (384, 384)),
]
with_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])


def on_gpu(
    size: tuple[int, int, int], channels: tuple[int, int], kernel: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors(size, channels, kernel, "cuda").items()}


@pytest.mark.gpu
@pytest.mark.timeout(600)
@with_dtypes
@pytest.mark.parametrize("with_residual", [False, True], ids=["bias", "residual"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("size", "channels"), SIZES)
def test_the_kernel_errs_at_most_twice_as_much_as_eager(
    extension: ModuleType,
    size: tuple[int, int, int],
    channels: tuple[int, int],
    kernel: tuple[int, int],
    with_residual: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    inputs: dict[str, Any] = on_gpu(size, channels, kernel, dtype)
    if not with_residual:
        inputs["residual"] = None
    exact = op._explicit(**{k: None if v is None else v.float() for k, v in inputs.items()})
    eager = (op._through_torch(**inputs).float() - exact).abs().max().item()
    out = op.slice_conv(**inputs, backend="cuda")
    assert out.dtype == dtype and out.is_contiguous() and bool(out.isfinite().all())
    assert (out.float() - exact).abs().max().item() <= 2 * eager + 1e-5
    assert torch.equal(out, op.slice_conv(**inputs, backend="cuda")), "the same call gives the same bits"


@pytest.mark.gpu
@pytest.mark.timeout(600)
@with_dtypes
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_writes_its_output_and_nothing_else(
    extension: ModuleType, kernel: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs = on_gpu((2, 37, 21), (64, 96), kernel, dtype)
    expected = op.slice_conv(**inputs, backend="cuda")
    around = torch.full((3, *expected.shape), 7.0, dtype=dtype, device="cuda")
    frames, height, width, in_channels = inputs["x"].shape
    extension.slice_conv(
        **{name: tensor.data_ptr() for name, tensor in inputs.items()}, out=around[1].data_ptr(),
        frames=frames, height=height, width=width, in_channels=in_channels, out_channels=96,
        kernel_t=kernel[0], spatial=kernel[1], dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.current_device(), stream=torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    assert torch.equal(around[1], expected)
    assert bool((around[::2] == 7).all())


@pytest.mark.gpu
@pytest.mark.timeout(600)
@with_dtypes
def test_the_kernel_is_a_torch_op_and_replays_in_a_graph(extension: ModuleType, dtype: torch.dtype) -> None:
    inputs = on_gpu((2, 9, 10), (32, 96), (3, 3), dtype)
    torch.library.opcheck(
        op._kernel._opoverload, tuple(inputs.values()), test_utils=("test_schema", "test_faketensor")
    )
    expected = op.slice_conv(**inputs, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op.slice_conv(**inputs, backend="cuda")
    for _ in range(2):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
    with pytest.raises(InputError, match="has no gradient"):
        op.slice_conv(**{**inputs, "weight": inputs["weight"].requires_grad_()}, backend="cuda")


CHECKED = """
import importlib, importlib.util, sys
import torch
op = importlib.import_module("flashtalk_rt.ops.slice_conv")
spec = importlib.util.spec_from_file_location("built._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
op.extension = lambda: module
for case in op.SPEC.cases:
    for dtype in (torch.bfloat16, torch.float16):
        inputs = case.make(torch.device("cuda"), dtype, torch.Generator("cuda").manual_seed(0))
        assert op.slice_conv(**inputs, backend="cuda").isfinite().all(), case.name
"""


@pytest.mark.gpu
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
def test_compute_sanitizer_finds_nothing(extension: ModuleType, tool: str) -> None:
    # torch's cache would hide accesses between its tensors, and some errors of the API are torch's questions.
    options = ["--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"]
    done = subprocess.run(
        ["compute-sanitizer", *options, sys.executable, "-c", CHECKED, str(extension.__file__)],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.timeout(600)
@with_dtypes
@torch.no_grad()
def test_the_vae_takes_the_kernel_where_it_was_measured_faster(
    extension: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the last level's convolutions listed, decoding gives the same to the dtype's rounding."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(num_res_blocks=1)).to("cuda", dtype).eval().requires_grad_(False).prepare()
    latent = torch.randn(1, 16, 2, 6, 4, device="cuda")
    calls: list[torch.Size] = []
    kernel = op._kernel

    def counted(x: Tensor, *others: Tensor | None) -> Tensor:
        calls.append(x.shape)
        out: Tensor = kernel(x, *others)
        return out

    monkeypatch.setattr(op, "_kernel", counted)
    through_cudnn = vae.decode(latent).float()
    assert calls == []
    monkeypatch.setattr(op, "MEASURED_FASTER", {(96, 96, 3, 3): (48 * 32, 4 * 48 * 32)})
    through_ours = vae.decode(latent).float()
    assert calls == [(3, 48, 32, 96)] * 4 + [(6, 48, 32, 96)] * 4  # two blocks, at one frame and at four
    assert (through_ours - through_cudnn).norm() / through_cudnn.norm() < 4 * torch.finfo(dtype).eps
    with ops.plain_backends():
        vae.decode(latent)
    assert len(calls) == 8
