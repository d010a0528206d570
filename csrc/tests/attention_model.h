// The hardware as the PTX ISA describes it, as far as attention uses it: TMA and wgmma, on the CPU.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "include/attention.h"

namespace flashtalk::attention {

inline uint16_t to_bf16(float value) {  // to the nearest, halves to the even one
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

// CU_TENSOR_MAP_SWIZZLE_128B and wgmma's mode 1: bits 4-6 of a shared address are XORed with bits 7-9.
inline uint32_t swizzle_128(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

using Shared = std::vector<uint8_t>;

// [batch, rows, heads, 128] with strides in elements.
struct Array {
    int batch, rows, heads;
    std::array<int, 3> strides;  // batch, row, head
    std::vector<uint16_t> data;

    size_t at(int b, int r, int h, int c) const {
        return static_cast<size_t>(b * strides[0] + r * strides[1] + h * strides[2] + c);
    }
};

// A box of 64 columns, one head and `box` rows, zeros where it lies outside.
inline int load_box(Shared& shared, uint32_t to, const Array& from, int box, int column, int head, int row, int batch) {
    CHECK(to % 1024 == 0, "the swizzle does not start at %u", to);
    CHECK(box <= 256, "a box of %d rows", box);
    for (int r = 0; r < box; ++r)
        for (int c = 0; c < kHalf; ++c) {
            const bool inside = row + r < from.rows && head < from.heads && batch < from.batch;
            const uint16_t value = inside ? from.data[from.at(batch, row + r, head, column + c)] : 0;
            std::memcpy(&shared[swizzle_128(to + static_cast<uint32_t>((r * kHalf + c) * 2))], &value, 2);
        }
    return box * kHalf * 2;
}

inline float operand(const Shared& shared, uint64_t descriptor, int mn, int k, bool k_major) {
    CHECK(descriptor >> 62 == 1, "swizzle mode %d", static_cast<int>(descriptor >> 62));
    CHECK((descriptor >> 49 & 7) == 0, "base offset");
    const auto start = static_cast<int>(descriptor & 0x3FFF) << 4;
    const auto leading = static_cast<int>(descriptor >> 16 & 0x3FFF) << 4;
    const auto stride = static_cast<int>(descriptor >> 32 & 0x3FFF) << 4;
    // K-major: eight rows of 128 bytes, then the stride offset; 16 columns stay inside the span.  MN-major: 64
    // columns, then the leading offset; eight keys of 128 bytes, then the stride offset.
    const int address = k_major ? start + mn / 8 * stride + mn % 8 * 128 + k * 2
                                : start + mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128;
    uint16_t value;
    std::memcpy(&value, &shared[swizzle_128(static_cast<uint32_t>(address))], 2);
    return to_float(value);
}

template <int kCount>
using Registers = std::vector<std::array<float, kCount>>;  // of each thread of a warpgroup

// d [64, kN] += a [64, 16] b [kN, 16]^T.  registers[thread][4 block + 2 half + column] as the PTX ISA has it.
template <int kN>
void mma(Registers<kN / 2>& d, const std::array<std::array<float, kMmaK>, 64>& a, const Shared& shared, uint64_t b,
         bool k_major, bool accumulate) {
    for (int n = 0; n < kN; ++n) {
        std::array<float, kMmaK> column;
        for (int k = 0; k < kMmaK; ++k) column[k] = operand(shared, b, n, k, k_major);
        for (int row = 0; row < 64; ++row) {
            float sum = 0;
            for (int k = 0; k < kMmaK; ++k) sum += a[row][k] * column[k];
            const int thread = row / 16 * 32 + row % 8 * 4 + n % 8 / 2;
            float& to = d[static_cast<size_t>(thread)][n / 8 * 4 + row / 8 % 2 * 2 + n % 2];
            to = accumulate ? to + sum : sum;
        }
    }
}

// The A operand from registers as the PTX ISA has it: word i of a thread holds row lane / 4 + 8 (i % 2) and
// columns 2 (lane % 4) + 8 (i / 2) and the next, the first in its low half.
inline std::array<std::array<float, kMmaK>, 64> from_registers(const std::vector<std::array<uint32_t, 4>>& words) {
    std::array<std::array<float, kMmaK>, 64> a{};
    for (int thread = 0; thread < 128; ++thread)
        for (int i = 0; i < 4; ++i) {
            const int row = thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8, column = thread % 4 * 2 + i / 2 * 8;
            const uint32_t word = words[static_cast<size_t>(thread)][static_cast<size_t>(i)];
            a[row][column] = to_float(static_cast<uint16_t>(word));
            a[row][column + 1] = to_float(static_cast<uint16_t>(word >> 16));
        }
    return a;
}

}  // namespace flashtalk::attention
