// What the launches ask of the driver and of the device.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "api/cuda_check.h"

namespace flashtalk {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// There is no libcuda to link where there is no GPU, so the driver's function is asked for at run time.
inline EncodeTiled encode_tiled() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    FT_CHECK_CUDA(cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess || function == nullptr) {
        throw std::runtime_error("cudaGetDriverEntryPointByVersion found no cuTensorMapEncodeTiled: result " +
                                 std::to_string(static_cast<int>(found)));
    }
    return reinterpret_cast<EncodeTiled>(function);
}

inline int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    FT_CHECK_CUDA(cudaDeviceGetAttribute(&value, which, device));
    return value;
}

// Enqueues blocks in a row, with more shared memory than a kernel gets unasked.
template <size_t kCount>
void launch(const void* kernel, int blocks, int threads, int shared_bytes, std::array<void*, kCount> parameters,
            uintptr_t stream) {
    FT_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    FT_CHECK_CUDA(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                                   parameters.data(), static_cast<size_t>(shared_bytes),
                                   reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace flashtalk
