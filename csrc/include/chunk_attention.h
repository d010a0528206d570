// The bf16 attention kernel's tiles.
#pragma once

#include "include/self_attention.h"

namespace flashtalk::attention {

struct Tile {
    static constexpr int kConsumers = 2;  // warpgroups that multiply
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kQueries = kConsumers * kMmaRows;
    static constexpr int kKeys = 192;  // faster than 176 and 128
    static constexpr int kHalfBytes = kKeys * kRowBytes;
    static constexpr int kTileBytes = kHalves * kHalfBytes;  // of keys, or of values
    static constexpr int kQueryHalfBytes = kQueries * kRowBytes;
    static constexpr int kQueryBytes = kHalves * kQueryHalfBytes;
    static constexpr int kSharedBytes = shared_bytes(kQueryBytes, kTileBytes);

    static_assert(kKeys % kMmaK == 0 && kKeys <= 256, "values are summed 16 at a time, a box has 256 rows");
    static_assert(kHalfBytes % kGroupBytes == 0, "each half starts where the swizzle repeats");
    static_assert(kSharedBytes <= kMaxSharedBytes, "shared memory");
};

extern const void* const kKernel;  // kernels/chunk_attention.cu: (CUtensorMap q, k and v, Shape, void* out)

}  // namespace flashtalk::attention
