// Attention's operands in shared memory and in registers: what its kernels for heads of 128 columns share.
//
// Plain C++ without CUDA headers: the kernels, their host side and the tests that model the hardware on the
// CPU (csrc/tests) all compute with these functions.
//
// Everything in shared memory is rows of one query or key in two halves of 64 columns: 128 bytes a row, the
// span of the 128-byte swizzle, so some rows of a head are two boxes of TMA.  The swizzle repeats every eight
// rows, 1024 bytes, and every half starts at a multiple of that.
#pragma once

#include <cstdint>

#include "include/quad.h"

namespace flashtalk::attention {

constexpr int kDim = 128;                  // of a head
constexpr int kHalf = 64;                  // columns of a half
constexpr int kHalves = kDim / kHalf;      // boxes of some rows
constexpr int kRowBytes = kHalf * 2;       // of a half
constexpr int kGroupBytes = 8 * kRowBytes;  // rows after which the swizzle repeats
constexpr int kMmaK = 16;                  // what one wgmma sums over
constexpr int kMmaRows = 64;               // queries of a warpgroup
constexpr int kMaxSharedBytes = 232448;    // what an sm_90 block may have
constexpr int kSharedAlignment = 1024;     // asked for at run time: the start of shared memory promises only 16

constexpr FT_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// wgmma's shared-memory matrix descriptor (PTX ISA, "matrix descriptor"), 128-byte swizzle: bits 0-13 the
// start, 16-29 the leading offset, 32-45 the stride offset, 49-51 the base offset (0: the swizzle starts at
// multiples of 1024), 62-63 the swizzle (1: 128 bytes).  Addresses and offsets are in units of 16 bytes.
//
// Queries and keys: the columns are what is summed over, and contiguous ("K-major").  The stride offset is
// that of eight-row groups.  16 columns are 32 bytes inside the span, so the leading offset is not read.
//
// Values: the keys are what is summed over, the columns (N) are contiguous ("MN-major"; the instruction's
// transpose bit).  The canonical layout, in elements of 2 bytes, is for column ((8, 8, n)) and key ((8, k))
//   ((1, 8, LBO), (64, SBO)):
// a span of 64 columns, eight keys 128 bytes apart; the leading offset leads to the next 64 columns, which
// is the other half of the tile, and the stride offset to the next eight keys, 1024 bytes on.
constexpr FT_HOST_DEVICE uint64_t descriptor(uint32_t shared_address, int leading_bytes) {
    return static_cast<uint64_t>((shared_address & 0x3FFFF) >> 4) |
           static_cast<uint64_t>(leading_bytes >> 4) << 16 | static_cast<uint64_t>(kGroupBytes >> 4) << 32 |
           static_cast<uint64_t>(1) << 62;
}

// Of the low word alone: the start cannot carry out of its bits, and a 64-bit sum would cost registers.
constexpr FT_HOST_DEVICE uint64_t advance(uint64_t descriptor, int bytes) {
    return descriptor >> 32 << 32 | (static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(bytes >> 4));
}

// Where columns 16 step.. of rows start, for a half of `half_bytes`: the queries' and keys' operand.
constexpr FT_HOST_DEVICE int column_step(int half_bytes, int step) {
    constexpr int kSteps = kHalf / kMmaK;
    return step / kSteps * half_bytes + step % kSteps * kMmaK * 2;
}

// Where keys 16 step.. start: the values' operand.
constexpr FT_HOST_DEVICE int key_step(int step) { return step * kMmaK * kRowBytes; }

// The accumulators of m64nNk16: a thread holds, of each block of 8 columns, two neighbouring columns of two
// rows, 8 apart, in registers 4 block + 2 half + column.  The A operand of m64nNk16 in registers holds, of 16
// columns, those of the first block and then of the second, packed: register i of the operand of step k is
// that of accumulators 8 k + 2 i and 8 k + 2 i + 1.  So scores become weights without leaving their thread.
constexpr FT_HOST_DEVICE int fragment_row(int warp, int lane, int half) { return warp * 16 + half * 8 + lane / 4; }
constexpr FT_HOST_DEVICE int fragment_half(int i) { return i / 2 % 2; }
constexpr FT_HOST_DEVICE int fragment_column(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

}  // namespace flashtalk::attention
