// CUDA return codes become exceptions that name the call and the value.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace flashtalk {

inline void check_cuda(cudaError_t code, const char* call) {
    if (code == cudaSuccess) return;
    throw std::runtime_error(std::string(call) + " returned " + std::to_string(static_cast<int>(code)) + " (" +
                             cudaGetErrorName(code) + ": " + cudaGetErrorString(code) + ")");
}

// The driver is not linked, so its errors have no text here: see CUresult in cuda.h.
inline void check_driver(CUresult code, const char* call) {
    if (code == CUDA_SUCCESS) return;
    throw std::runtime_error(std::string(call) + " returned " + std::to_string(static_cast<int>(code)));
}

#define FT_CHECK_CUDA(call) ::flashtalk::check_cuda((call), #call)

}  // namespace flashtalk
