// What the launches ask of the driver and of the device.
#pragma once

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

}  // namespace flashtalk
