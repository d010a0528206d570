"""The CUDA extension: built by setup.py for sm_90a, its machine code, its index arithmetic, its refusals.

Without a GPU the kernel cannot run.  What can be shown is shown: it compiles without a warning, its machine
code multiplies on the tensor cores and keeps nothing in local memory, and a model of the hardware on the
CPU, driven by the kernel's own index arithmetic, gives the plain sum.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from csrc_build import CSRC, build, load, machine_code, needs_cxx, needs_nvcc, run_model

quantized_attention = importlib.import_module("flashtalk_rt.ops.quantized_attention")  # not the function
TILES = {(n, m64, spatial) for n, m64 in ((96, 2), (96, 4), (192, 1), (192, 2)) for spatial in (1, 3)}
ELEMENTS = {"13__nv_bfloat16": ".F32.BF16", "6__half": ".F32"}  # mangled name -> its wgmma in machine code


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension as setup.py builds it."""
    return build(tmp_path_factory.mktemp("csrc"))


def slice_convolutions(library: Path) -> dict[tuple[tuple[int, ...], str], list[str]]:
    """The instructions of every slice convolution, by its tile (n, m64, spatial) and element."""
    kernels: dict[tuple[tuple[int, ...], str], list[str]] = {}
    instructions: list[str] = []
    named = re.compile(rf"SliceConvTileILi(\d+)ELi(\d+)ELi(\d+)E+({'|'.join(ELEMENTS)})")
    for line in machine_code(library).splitlines():
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
    kernels = slice_convolutions(built)
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
def test_attention_in_eight_bits_names_what_it_does_not_take(built: Path) -> None:
    module = load(built)
    assert module.QUANTIZED_TILE_KEYS == quantized_attention.TILE_KEYS
    tensors = ("q", "k", "v", "q_scale", "k_scale", "v_scale", "v_mean", "out")
    call = {
        **dict.fromkeys(tensors, 1024),
        "device": 0,
        "stream": 0,
        "batch": 2,
        "length": 3,
        "keys": 3,
        "heads": 2,
    }
    for change, message in (
        ({"keys": 0}, "keys is 0; it must be 1 or more"),
        ({"v": 8}, "v is not aligned to 16 bytes"),
        ({"k_scale": 0}, "k_scale is null"),
        ({"length": (1 << 31) - 1}, "too many rows"),
    ):
        with pytest.raises(ValueError, match=message):
            module.quantized_attention(**{**call, **change})
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"cudaSetDevice\(call.device\) returned \d+ \(cudaError"):
            module.quantized_attention(**call)


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
    ):
        if torch.cuda.is_available() or message != "too many queries":  # that depends on the device
            with pytest.raises(ValueError, match=message):
                module.chunk_attention(**{**call, **change})
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"cudaSetDevice\(call.device\) returned \d+ \(cudaError"):
            module.chunk_attention(**{**call, "batch": 1, "q_strides": (1, 256, 128)})


@needs_cxx
def test_the_model_of_the_hardware_gives_the_plain_sum(tmp_path: Path) -> None:
    """TMA boxes with zero fill, swizzle, descriptors, fragments, the epilogue's exchange, the pipeline."""
    assert run_model("slice_conv_model", tmp_path).count("stages of") == len(TILES)


def test_device_code_knows_nothing_of_torch_and_one_file_of_python() -> None:
    sources = {p.relative_to(CSRC).as_posix(): p.read_text() for p in CSRC.rglob("*.*")}
    assert len(sources) >= 7
    for name, text in sources.items():
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text), name
        assert name == "bindings.cpp" or "pybind11" not in text, name
        assert text.count("\n") < 400, name
