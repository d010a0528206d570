// The eight-bit attention kernel's tiles and index arithmetic.
//
// Queries and keys are int8: a row of 128 columns is one span of the 128-byte swizzle.  Values are e4m3 and lie
// transposed, [128 columns, keys], as eight-bit products take K-major operands alone: a tile of them is spans of
// 32 keys, a row a column, with the 32-byte swizzle.
#pragma once

#include "include/self_attention.h"

namespace flashtalk::attention::quantized {

constexpr int kMmaK = 32;                  // what one eight-bit wgmma sums over
constexpr int kRowBytes = kDim;            // of a query or a key
constexpr int kSpanBytes = kDim * kMmaK;   // of the values of 32 keys: a box of TMA, and a product's operand

struct Tile {
    // Warpgroups that multiply: their softmax takes longer than their products, and where one waits, two work.
    static constexpr int kConsumers = 3;
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kQueries = kConsumers * kMmaRows;
    static constexpr int kKeys = 96;  // that share a scale
    static constexpr int kTileBytes = kKeys * kRowBytes;  // of keys, or of values
    static constexpr int kSpans = kKeys / kMmaK;
    static constexpr int kQueryBytes = kQueries * kRowBytes;
    static constexpr int kSharedBytes = shared_bytes(kQueryBytes, kTileBytes);

    static_assert(kKeys % kMmaK == 0 && kKeys <= 256, "values come in whole spans, a box has 256 rows");
    static_assert(kTileBytes % 1024 == 0 && kQueryBytes % 1024 == 0, "each tile starts where the swizzle repeats");
    static_assert(kSharedBytes <= kMaxSharedBytes, "shared memory");
};

// Of values: K-major, eight columns of 32 bytes and then the stride offset; swizzle mode 3 (32 bytes).  The
// leading offset is not read.  Queries and keys: `descriptor` in include/attention.h.
constexpr FT_HOST_DEVICE uint64_t value_descriptor(uint32_t shared_address) {
    return static_cast<uint64_t>((shared_address & 0x3FFFF) >> 4) | static_cast<uint64_t>(1) << 16 |
           static_cast<uint64_t>(8 * kMmaK >> 4) << 32 | static_cast<uint64_t>(3) << 62;
}

// The accumulators hold, of each block of 8 columns, two neighbours (fragment_column).  The A operand of
// m64nNk32 in registers holds, of 32 positions, 4 (lane % 4).. of the first and of the second 16, four to a
// word; word 4 step + w is of row half w % 2 and of 16 positions w / 2.  So that scores become weights without
// leaving their thread, position p is that of this key, and the values lie in that order:
constexpr FT_HOST_DEVICE int position_key(int p) { return p / 16 * 16 + p % 4 / 2 * 8 + p % 16 / 4 * 2 + p % 2; }

// The accumulators that word i packs are this one, the next, and those 4 and 5 on.
constexpr FT_HOST_DEVICE int word_register(int i) { return i / 2 * 8 + i % 2 * 2; }

struct Scales {
    const float* q;       // [batch, heads, length]
    const float* k;       // [batch, heads, tiles of keys]
    const float* v;       // [batch, heads]
    const float* v_mean;  // [batch, heads, 128]: what was taken off the values
};

extern const void* const kKernel;  // kernels/quantized_attention.cu: (CUtensorMap q, k and v, Shape, Scales, void* out)

}  // namespace flashtalk::attention::quantized
