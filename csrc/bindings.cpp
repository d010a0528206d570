// The Python module flashtalk_rt._C: addresses and sizes in, nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "api/chunk_attention.h"
#include "api/cross_attention.h"
#include "api/quantized_attention.h"
#include "api/slice_conv.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
    module.doc() = "CUDA kernels for sm_90a.  Pointers and streams are integers; the caller keeps the memory.";
    module.def(
        "slice_conv",
        [](uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t out, int frames, int height,
           int width, int in_channels, int out_channels, int kernel_t, int spatial, const std::string& dtype,
           int device, uintptr_t stream) {
            flashtalk::slice_conv({x, weight, bias, residual, out, frames, height, width, in_channels, out_channels,
                                   kernel_t, spatial, dtype, device, stream});
        },
        py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"), py::arg("out"),
        py::arg("frames"), py::arg("height"), py::arg("width"), py::arg("in_channels"), py::arg("out_channels"),
        py::arg("kernel_t"), py::arg("spatial"), py::arg("dtype"), py::arg("device"), py::arg("stream"),
        "Enqueue a slice convolution (csrc/api/slice_conv.h).  ValueError for what the kernel does not take, "
        "RuntimeError naming the call for an error of CUDA.");
    module.def(
        "chunk_attention",
        [](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, const std::array<int64_t, 3>& q_strides,
           const std::array<int64_t, 3>& k_strides, const std::array<int64_t, 3>& v_strides, int batch, int length,
           int keys, int heads, int device, uintptr_t stream) {
            flashtalk::chunk_attention({q, k, v, out, q_strides, k_strides, v_strides, batch, length, keys, heads,
                                        device, stream});
        },
        py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("q_strides"),
        py::arg("k_strides"), py::arg("v_strides"), py::arg("batch"), py::arg("length"), py::arg("keys"),
        py::arg("heads"), py::arg("device"), py::arg("stream"),
        "Enqueue an attention (csrc/api/chunk_attention.h).  ValueError for what the kernel does not take, "
        "RuntimeError naming the call for an error of CUDA.");
    module.attr("QUANTIZED_TILE_KEYS") = flashtalk::kQuantizedTileKeys;
    module.def(
        "quantized_attention",
        [](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t q_scale, uintptr_t k_scale, uintptr_t v_scale,
           uintptr_t v_mean, uintptr_t out, int batch, int length, int keys, int heads, int device,
           uintptr_t stream) {
            flashtalk::quantized_attention({q, k, v, q_scale, k_scale, v_scale, v_mean, out, batch, length, keys,
                                            heads, device, stream});
        },
        py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("q_scale"), py::arg("k_scale"),
        py::arg("v_scale"), py::arg("v_mean"), py::arg("out"), py::arg("batch"), py::arg("length"), py::arg("keys"), py::arg("heads"),
        py::arg("device"), py::arg("stream"),
        "Enqueue an eight-bit attention (csrc/api/quantized_attention.h).  ValueError for what the kernel does not "
        "take, RuntimeError naming the call for an error of CUDA.");
    module.attr("CROSS_TEXT_KEYS") = flashtalk::kCrossTextKeys;
    module.attr("CROSS_IMAGE_KEYS") = py::make_tuple(flashtalk::kCrossFewestImageKeys, flashtalk::kCrossMostImageKeys);
    module.def(
        "cross_attention",
        [](uintptr_t q, uintptr_t text_k, uintptr_t text_v, uintptr_t image_k, uintptr_t image_v, uintptr_t text_bias,
           uintptr_t out, int batch, int length, int text, int image, int heads, bool shared_bias, int device,
           uintptr_t stream) {
            flashtalk::cross_attention({q, text_k, text_v, image_k, image_v, text_bias, out, batch, length, text,
                                        image, heads, shared_bias, device, stream});
        },
        py::kw_only(), py::arg("q"), py::arg("text_k"), py::arg("text_v"), py::arg("image_k"), py::arg("image_v"),
        py::arg("text_bias"), py::arg("out"), py::arg("batch"), py::arg("length"), py::arg("text"), py::arg("image"),
        py::arg("heads"), py::arg("shared_bias"), py::arg("device"), py::arg("stream"),
        "Enqueue a cross-attention to text and image (csrc/api/cross_attention.h).  ValueError for what the kernel "
        "does not take, RuntimeError naming the call for an error of CUDA.");
}
