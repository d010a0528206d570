// The attention kernel's tiles, shared memory and index arithmetic.
//
// A block computes kQueries queries of one head at a time: two warpgroups of 64 queries each, which walk the
// keys in tiles of kKeys, the last (ragged) tile first.
#pragma once

#include <cstdint>

#include "include/attention.h"

namespace flashtalk::attention {

constexpr int kConsumers = 2;              // warpgroups that multiply
constexpr int kQueries = kConsumers * kMmaRows;
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kStages = 2;                 // tiles of keys, and of values, in shared memory
constexpr int kSlots = 1 + 2 * kStages;

struct Tile {
    static constexpr int kKeys = 192;  // faster than 176 and 128
    static constexpr int kHalfBytes = kKeys * kRowBytes;
    static constexpr int kTileBytes = kHalves * kHalfBytes;  // of keys, or of values
    static constexpr int kQueryHalfBytes = kQueries * kRowBytes;
    static constexpr int kQueryBytes = kHalves * kQueryHalfBytes;
    // The queries, the keys' stages, the values' stages; a full and an empty barrier for each; a spare word.
    static constexpr int kDataBytes = kQueryBytes + 2 * kStages * kTileBytes;
    static constexpr int kSharedBytes = kSharedAlignment + kDataBytes + kSlots * 16 + 16;

    static_assert(kKeys % kMmaK == 0 && kKeys <= 256, "values are summed 16 at a time, a box has 256 rows");
    static_assert(kHalfBytes % kGroupBytes == 0, "each half starts where the swizzle repeats");
    static_assert(kSharedBytes <= kMaxSharedBytes, "shared memory");
};

// Where things lie, from a 1024-byte aligned start on.  Slot 0 holds the queries; 1 + stage keys;
// 1 + kStages + stage values.
struct Memory {
    uint32_t base;

    FT_HOST_DEVICE uint32_t data(int slot) const {
        return base + (slot == 0 ? 0 : Tile::kQueryBytes + (slot - 1) * Tile::kTileBytes);
    }
    FT_HOST_DEVICE uint32_t full(int slot) const { return base + Tile::kDataBytes + slot * 16; }
    FT_HOST_DEVICE uint32_t empty(int slot) const { return full(slot) + 8; }
    FT_HOST_DEVICE uint32_t spare() const { return full(kSlots); }
};

// A position in a ring of stages, whose first slot is `first`, and the parity of its current round.
struct Ring {
    int first;
    int stage = 0;
    uint32_t parity = 0;

    FT_HOST_DEVICE int slot() const { return first + stage; }
    FT_HOST_DEVICE void next() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct Shape {
    int32_t batch, heads, length, keys;
};

constexpr FT_HOST_DEVICE int64_t tile_count(const Shape& shape) {
    return static_cast<int64_t>(ceil_div(shape.length, kQueries)) * shape.heads * shape.batch;
}

struct Origin {
    int query, head, batch;
};

// Queries change fastest: blocks at work together share a head's keys and values, through the L2 cache.
constexpr FT_HOST_DEVICE Origin tile_origin(const Shape& shape, int tile) {
    const int across = ceil_div(shape.length, kQueries);
    return {tile % across * kQueries, tile / across % shape.heads, tile / across / shape.heads};
}

extern const void* const kKernel;  // kernels/chunk_attention.cu: (CUtensorMap q, k and v, Shape, void* out)

}  // namespace flashtalk::attention
