// What attention's host sides share: checks of sizes and pointers, and the tensor maps.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "api/driver.h"
#include "include/attention.h"

namespace flashtalk::attention {

constexpr int kAlignment = 16;  // bytes: of pointers and strides

// Of a call of the function `name`, to be refused with what is wrong.
struct Checks {
    const char* name;

    [[noreturn]] void refuse(const std::string& what) const {
        throw std::invalid_argument(std::string(name) + ": " + what);
    }
    void positive(const char* what, int value) const {
        if (value < 1) refuse(std::string(what) + " is " + std::to_string(value) + "; it must be 1 or more");
    }
    void pointer(const char* what, uintptr_t pointer) const {
        if (pointer == 0) refuse(std::string(what) + " is null");
        if (pointer % kAlignment != 0) refuse(std::string(what) + " is not aligned to 16 bytes");
    }
};

// A bf16 tensor [batch, rows, heads, 128]; strides in elements: of the batch, of a row, of a head.
struct Operand {
    uintptr_t data;
    std::array<int, 3> sizes;
    std::array<int64_t, 3> strides;

    static Operand contiguous(uintptr_t data, int batch, int rows, int heads) {
        const int64_t row = static_cast<int64_t>(heads) * kDim;
        return {data, {batch, rows, heads}, {row * rows, row, kDim}};
    }
};

// Read in boxes of 64 columns of `box_rows` rows of one head, which lie in shared memory as rows of 128 bytes.
// What is past the end is zeros.
inline CUtensorMap tensor_map(EncodeTiled encode, const Operand& x, int box_rows) {
    const auto size = [&](size_t i) { return static_cast<cuuint64_t>(x.sizes[i]); };
    const auto stride = [&](size_t i) {
        return static_cast<cuuint64_t>(x.sizes[i] > 1 ? x.strides[i] * 2 : kAlignment);
    };
    const std::array<cuuint64_t, 4> dims{kDim, size(2), size(1), size(0)};
    const std::array<cuuint64_t, 3> pitches{stride(2), stride(1), stride(0)};
    const std::array<cuuint32_t, 4> box{kHalf, 1, static_cast<cuuint32_t>(box_rows), 1};
    const std::array<cuuint32_t, 4> steps{1, 1, 1, 1};
    CUtensorMap map;
    check_driver(
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, reinterpret_cast<void*>(x.data), dims.data(),
               pitches.data(), box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),  // zeros
        "cuTensorMapEncodeTiled");
    return map;
}

}  // namespace flashtalk::attention
