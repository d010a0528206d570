// The host side of the slice convolution: check -> config -> args -> launch.
#pragma once

#include <cstdint>
#include <string>

namespace flashtalk {

// Device pointers to contiguous tensors of one dtype, aligned to 16 bytes; out overlaps none of the others.
//   out[t, h, w, o] = bias[o] + residual[t, h, w, o] + sum over dt, dy, dx, c of
//       x[t + dt, h + dy - spatial / 2, w + dx - spatial / 2, c] * weight[o, dt, dy, dx, c],
// x being zero beyond its height and width.
struct SliceConvCall {
    uintptr_t x;         // [frames, height, width, in_channels]
    uintptr_t weight;    // [out_channels, kernel_t, spatial, spatial, in_channels]
    uintptr_t bias;      // [out_channels]
    uintptr_t residual;  // like out; 0: none
    uintptr_t out;       // [frames - kernel_t + 1, height, width, out_channels]
    int frames, height, width, in_channels, out_channels;
    int kernel_t, spatial;  // spatial: the kernel's height and width, 1 or 3
    std::string dtype;      // "bfloat16" or "float16"; sums are fp32, rounded once
    int device;
    uintptr_t stream;
};

// Enqueues the convolution.  std::invalid_argument for sizes, pointers or a dtype the kernel does not take;
// std::runtime_error, naming the call and the value, for an error of CUDA.  May be captured in a graph.
void slice_conv(const SliceConvCall& call);

}  // namespace flashtalk
