// The Python module flashtalk_rt._C: addresses and sizes in, nothing of torch.
#include <pybind11/pybind11.h>

#include <string>

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
}
