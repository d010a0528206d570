// The text and image attention kernel's shared memory and its share of the work.
//
// A block holds the keys and values of one head: the first kImage of the image, the image's tail of kTail at
// most, then kText of the text.  One row of shared memory each, so that both softmaxes are columns of one
// product.  Two warpgroups take turns at its tiles of 64 queries, which arrive by TMA in rings of their own.
#pragma once

#include "include/attention.h"

namespace flashtalk::attention::cross {

constexpr int kImage = 256;
constexpr int kTail = 16;
constexpr int kText = 48;
constexpr int kKeys = kImage + kTail + kText;
constexpr int kConsumers = 2;                    // warpgroups that multiply
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kStages = 2;                       // tiles of queries in each one's ring

// Scores come as two products, which are the columns of two arrays of registers.
constexpr int kFirst = 192;
constexpr int kSecond = kKeys - kFirst;          // the image's last 64, its tail, the text
constexpr int kTailColumn = kImage - kFirst;     // of the second
constexpr int kTextColumn = kTailColumn + kTail;

constexpr int kHalfBytes = kKeys * kRowBytes;    // of keys, or of values
constexpr int kTileBytes = kHalves * kHalfBytes;
constexpr int kQueryHalfBytes = kMmaRows * kRowBytes;
constexpr int kQueryBytes = kHalves * kQueryHalfBytes;
constexpr int kQuerySlots = kConsumers * kStages;
constexpr int kSlots = 2 + kQuerySlots;          // 0 the keys, 1 the values, then the queries
constexpr int kDataBytes = 2 * kTileBytes + kQuerySlots * kQueryBytes;
constexpr int kSharedBytes = kSharedAlignment + kDataBytes + kSlots * 16 + 16;

static_assert(kTail * kRowBytes % kGroupBytes == 0, "tail and text start where the swizzle repeats");
static_assert(kHalfBytes % kGroupBytes == 0 && kQueryHalfBytes % kGroupBytes == 0, "so do the halves");
static_assert(kFirst * kRowBytes % kGroupBytes == 0, "so does the second product");
static_assert(kFirst % kMmaK == 0 && kSecond % kMmaK == 0, "values are summed 16 at a time");
static_assert(kSharedBytes <= kMaxSharedBytes, "shared memory");

// Where things lie, from a 1024-byte aligned start on.
struct Memory {
    uint32_t base;

    FT_HOST_DEVICE uint32_t data(int slot) const {
        return base + (slot < 2 ? slot * kTileBytes : 2 * kTileBytes + (slot - 2) * kQueryBytes);
    }
    FT_HOST_DEVICE uint32_t full(int slot) const { return base + kDataBytes + slot * 16; }
    FT_HOST_DEVICE uint32_t empty(int slot) const { return full(slot) + 8; }
    FT_HOST_DEVICE uint32_t open() const { return full(kSlots); }
};

// A position in a warpgroup's ring of queries, and the parity of its current round.
struct QueryRing {
    int group;
    int stage = 0;
    uint32_t parity = 0;

    FT_HOST_DEVICE int slot() const { return 2 + group * kStages + stage; }
    FT_HOST_DEVICE void next() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct Shape {
    int32_t batch, heads, length, text, image;
    int64_t bias_stride;  // from a batch's text biases to the next one's: 0 where all share them
};

constexpr FT_HOST_DEVICE int head_tiles(const Shape& shape) { return ceil_div(shape.length, kMmaRows); }

constexpr FT_HOST_DEVICE int64_t tile_count(const Shape& shape) {
    return static_cast<int64_t>(head_tiles(shape)) * shape.heads * shape.batch;
}

// A block's tiles are first_tile(block) .. first_tile(block + 1), in the order of batch, head, queries: most
// blocks see one head, some two.  Its tile number n, from 0, is warpgroup n % kConsumers'.
constexpr FT_HOST_DEVICE int first_tile(const Shape& shape, int block, int blocks) {
    return static_cast<int>(tile_count(shape) * block / blocks);
}

// A block's tiles of one head.
struct Segment {
    int batch, head;
    int begin, end;  // of all tiles
};

constexpr FT_HOST_DEVICE Segment segment_from(const Shape& shape, int tile, int end) {
    const int across = head_tiles(shape), pair = tile / across;
    const int last = (pair + 1) * across;
    return {pair / shape.heads, pair % shape.heads, tile, last < end ? last : end};
}

// The first tile of a segment that is `group`'s, for a block whose tiles begin at `first`.
constexpr FT_HOST_DEVICE int own_tile(const Segment& segment, int first, int group) {
    return segment.begin + (segment.begin - first + group) % kConsumers;
}

// Tensor maps, in the order of the kernel's parameters.
enum Map { kQueryMap, kImageKeys, kImageValues, kTailKeys, kTailValues, kTextKeys, kTextValues, kMaps };

extern const void* const kKernel;  // (Maps, Shape, const float* text_bias or null, void* out)

}  // namespace flashtalk::attention::cross
