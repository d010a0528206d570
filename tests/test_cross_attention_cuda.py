"""The CUDA kernel of cross-attention: its model and its machine code anywhere, itself on an H100."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from csrc_build import kernel_code, needs_cxx, needs_nvcc, run_model, skip_without_kernel
from random_tensors import empty_is_nan
from torch import Tensor

from flashtalk_rt import ops
from flashtalk_rt.errors import InputError
from flashtalk_rt.ops import reference

cuda = sys.modules["flashtalk_rt.ops.dual_cross_attention_cuda"]
HELD = 48  # text keys


# --- where it cannot run ----------------------------------------------------------------------------


@needs_cxx
def test_the_model_of_the_hardware_gives_the_plain_sums(tmp_path: Path) -> None:
    """TMA boxes with zero fill, swizzle, descriptors, fragments, the blocks' shares, the pipeline."""
    assert "320 keys" in run_model("cross_attention_model", tmp_path)


@pytest.mark.timeout(600)
@needs_nvcc
def test_the_machine_code_keeps_a_tile_in_registers(tmp_path: Path) -> None:
    (part,) = kernel_code("cross_attention", tmp_path).split("Function : ")[1:]
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", part, re.MULTILINE)

    def at(pattern: str) -> list[int]:
        return [i for i, line in enumerate(code) if re.search(pattern, line)]

    assert at(r"\b(LDL|STL)\b") == [], "local memory"
    scores, more, sums = (at(p) for p in (r"HGMMA\.64x192x16", r"HGMMA\.64x128x16(?!.*tnspB)", r"tnspB"))
    assert (len(scores), len(more), len(sums)) == (8, 8, 320 // 16)
    assert len(at("HGMMA")) == 36
    assert len(at(r"MUFU\.EX2")) == 320 // 2, "a thread's weights"
    start = at(r"USETMAXREG\.DEALLOC")[0]  # what follows is the loading warp's, which kept 40
    assert max(int(r) for line in code[start:] for r in re.findall(r"\bR(\d+)\b", line)) < 40


# --- on a GPU --------------------------------------------------------------------------------------

Call = Callable[..., Tensor]


@pytest.fixture
def kernel() -> Call:
    """The op by the CUDA kernel.  Empty memory is NaN."""
    found = cuda.extension()
    skip_without_kernel(found)
    assert found.CROSS_TEXT_KEYS == HELD

    def run(*tensors: Tensor, **options: Tensor | None) -> Tensor:
        with empty_is_nan():
            return ops.dual_cross_attention(*tensors, backend="cuda", **options)

    return run


def draw(batch: int, length: int, heads: int, text: int, image: int) -> list[Tensor]:
    """q, text k and v, image k and v."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = (length, text, text, image, image)
    made = [torch.randn(batch, n, heads, 128, generator=generator, device="cuda") for n in sizes]
    return [x.bfloat16() for x in made]


def close(out: Tensor, tensors: list[Tensor], bias: Tensor | None) -> None:
    """Within twice the error of bfloat16 eager."""
    exact = reference.dual_cross_attention(*(x.float() for x in tensors), bias)
    allowed = 2 * (reference.dual_cross_attention(*tensors, bias).float() - exact).abs().max() + 1e-5
    if tensors[1].shape[1] == 1:
        # Eager's weight of the only text key is 1; ours is the image's total, to bfloat16's 2^-9.
        allowed += tensors[2].abs().max() * 2**-9
    assert bool(out.isfinite().all())
    assert (out.float() - exact).abs().max() <= allowed


@pytest.mark.gpu
# One tile and several, whole and ragged; fewer tiles than multiprocessors, as many, many more; the numbers of
# image keys that are special; text that is one key, or all that is held.
@pytest.mark.parametrize(
    ("batch", "length", "heads", "text", "image"),
    [
        (1, 128, 1, 1, 256), (1, 129, 2, 48, 257), (2, 300, 3, 33, 272), (3, 700, 40, 17, 271),
        (1, 8448, 1, 48, 257), (1, 12096, 40, 33, 257),
    ],
)  # fmt: skip
def test_the_cuda_kernel(kernel: Call, batch: int, length: int, heads: int, text: int, image: int) -> None:
    tensors = draw(batch, length, heads, text, image)
    out = kernel(*tensors)
    rows = torch.arange(0, length, max(1, length // 400)).cuda()
    close(out[:, rows], [tensors[0][:, rows], *tensors[1:]], None)
    assert torch.equal(out, kernel(*tensors)), "the same call gives the same bits"


@pytest.mark.gpu
@pytest.mark.parametrize("visible", [1, 20, HELD, HELD + 1, 300, 512])
def test_the_hidden_end_of_the_text_may_be_anything(kernel: Call, visible: int) -> None:
    """Up to what is held by the CUDA kernel, beyond by Triton's behind it."""
    tensors = draw(2, 500, 3, 512, 257)
    bias = torch.randn(512, device="cuda")
    bias[visible:] = float("-inf")
    shown = [tensors[0], *(x[:, :visible] for x in tensors[1:3]), *tensors[3:]]
    for x in tensors[1:3]:
        x[:, visible:] = float("nan")
    close(kernel(*tensors, text_bias=bias), shown, bias[:visible])


@pytest.mark.gpu
def test_each_batch_goes_to_the_kernel_that_its_text_fits(kernel: Call) -> None:
    tensors = draw(3, 200, 2, 100, 260)
    bias = torch.randn(3, 100, device="cuda")
    for i, visible in enumerate((10, 100, HELD)):
        bias[i, visible:] = float("-inf")
    bias[0, 3] = float("-inf")  # hidden in the middle
    close(kernel(*tensors, text_bias=bias), tensors, bias)


@pytest.mark.gpu
def test_large_scores_in_either_softmax(kernel: Call) -> None:
    q, text_k, text_v, image_k, image_v = draw(1, 256, 2, 40, 257)
    for scale_text, scale_image in ((8, 0.1), (0.1, 8)):
        tensors = [q, text_k * scale_text, text_v, image_k * scale_image, image_v]
        close(kernel(*tensors), tensors, None)


@pytest.mark.gpu
def test_what_the_cuda_kernel_does_not_take_is_refused_or_left_to_triton(kernel: Call) -> None:
    for sizes, why in (
        ((1, 200, 2, 20, 255), "takes 256 to 272 image keys, not 255"),
        ((1, 200, 2, 49, 257), "takes 48 text keys without a bias, not 49"),
        ((1, 127, 2, 20, 257), "takes 128 queries or more, not 127"),
    ):
        tensors = draw(*sizes)
        with pytest.raises(InputError, match=why):
            kernel(*tensors)
        found = ops.dual_cross_attention(*tensors)
        assert torch.equal(found, ops.dual_cross_attention(*tensors, backend="triton"))


@pytest.mark.gpu
def test_the_cuda_kernel_is_a_torch_op_and_replays_in_a_graph(kernel: Call) -> None:
    tensors = draw(1, 150, 2, 512, 257)
    bias = ops.padding_bias(20, 512, torch.device("cuda"))
    torch.library.opcheck(
        torch.ops.flashtalk_rt.dual_cross_attention_cuda, (*tensors, bias),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    expected = kernel(*tensors, text_bias=bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(*tensors, text_bias=bias)
    for _ in range(2):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
    # Another prompt needs no new capture: whose it is, only the device knows.
    bias.copy_(ops.padding_bias(100, 512, bias.device))
    graph.replay()
    close(out, tensors, bias)
    with pytest.raises(InputError, match="has no gradient"):
        kernel(tensors[0].requires_grad_(), *tensors[1:])
