// The attention kernel's tiles, shared memory and index arithmetic.
//
// Plain C++ without CUDA headers: the kernel, its host side and a test that models the hardware on the CPU
// (csrc/tests/chunk_attention_model.cpp) all compute with these functions.
//
// A block computes kQueries queries of one head at a time: two warpgroups of 64 queries each, which walk the
// keys in tiles of kKeys, the last (ragged) tile first.  Everything in shared memory is rows of one query or
// key in two halves of 64 columns: 128 bytes a row, the span of the 128-byte swizzle, so a tile is two boxes
// of TMA.  The swizzle repeats every eight rows, 1024 bytes, and every half starts at a multiple of that.
#pragma once

#include <cstdint>

#include "include/quad.h"

namespace flashtalk::attention {

constexpr int kDim = 128;                  // of a head
constexpr int kHalf = 64;                  // columns of a half
constexpr int kHalves = kDim / kHalf;      // boxes a tile
constexpr int kRowBytes = kHalf * 2;       // of a half
constexpr int kGroupBytes = 8 * kRowBytes;  // rows after which the swizzle repeats
constexpr int kMmaK = 16;                  // what one wgmma sums over
constexpr int kMmaRows = 64;               // queries of a warpgroup
constexpr int kConsumers = 2;              // warpgroups that multiply
constexpr int kQueries = kConsumers * kMmaRows;
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kStages = 2;                 // tiles of keys, and of values, in shared memory
constexpr int kSlots = 1 + 2 * kStages;
constexpr int kMaxSharedBytes = 232448;    // what an sm_90 block may have
constexpr int kSharedAlignment = 1024;     // asked for at run time: the start of shared memory promises only 16

// kKeys: keys a tile.
template <int kKeys_>
struct Tile {
    static constexpr int kKeys = kKeys_;
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
template <class Tile>
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

constexpr FT_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

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

// A compiled tile, for the host side to choose from.
struct Variant {
    int keys, shared_bytes;
    const void* kernel;  // (CUtensorMap q, CUtensorMap k, CUtensorMap v, Shape, void* out)
};
constexpr int kVariants = 3;
extern const Variant kVariantTable[kVariants];  // kernels/chunk_attention.cu; the preferred one first

}  // namespace flashtalk::attention
