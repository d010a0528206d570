// What the self-attention kernels share: where operands lie in shared memory, and the walk over tiles.
//
// A block computes Tile::kQueries queries of one head at a time, 64 a warpgroup, which walk the keys in tiles
// of Tile::kKeys, the last (ragged) tile first.
#pragma once

#include <cstdint>

#include "include/attention.h"

namespace flashtalk::attention {

constexpr int kStages = 2;  // tiles of keys, and of values, in shared memory
constexpr int kSlots = 1 + 2 * kStages;

// Of a tile of so many bytes of queries and of keys (or values): the queries, the keys' stages, the values'
// stages; a full and an empty barrier for each; a spare word.
constexpr FT_HOST_DEVICE int data_bytes(int query_bytes, int tile_bytes) {
    return query_bytes + 2 * kStages * tile_bytes;
}
constexpr FT_HOST_DEVICE int shared_bytes(int query_bytes, int tile_bytes) {
    return kSharedAlignment + data_bytes(query_bytes, tile_bytes) + kSlots * 16 + 16;
}

// Where things lie, from a 1024-byte aligned start on.  Slot 0 holds the queries; 1 + stage keys;
// 1 + kStages + stage values.
template <class Tile>
struct Memory {
    static constexpr int kDataBytes = data_bytes(Tile::kQueryBytes, Tile::kTileBytes);
    uint32_t base;

    FT_HOST_DEVICE uint32_t data(int slot) const {
        return base + (slot == 0 ? 0 : Tile::kQueryBytes + (slot - 1) * Tile::kTileBytes);
    }
    FT_HOST_DEVICE uint32_t full(int slot) const { return base + kDataBytes + slot * 16; }
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

constexpr FT_HOST_DEVICE int64_t tile_count(const Shape& shape, int queries) {
    return static_cast<int64_t>(ceil_div(shape.length, queries)) * shape.heads * shape.batch;
}

struct Origin {
    int query, head, batch;
};

// Queries change fastest: blocks at work together share a head's keys and values, through the L2 cache.
constexpr FT_HOST_DEVICE Origin tile_origin(const Shape& shape, int queries, int tile) {
    const int across = ceil_div(shape.length, queries);
    return {tile % across * queries, tile / across % shape.heads, tile / across / shape.heads};
}

}  // namespace flashtalk::attention
