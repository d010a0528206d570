// What the self-attention kernels' host sides share: the limits of their walk over tiles.
#pragma once

#include <algorithm>
#include <limits>

#include "api/attention_call.h"
#include "include/self_attention.h"

namespace flashtalk::attention {

// Rows are rounded up to tiles, in 32 bits.
inline void check_rows(const Checks& checks, int length, int keys) {
    if (std::max(length, keys) > std::numeric_limits<int>::max() / 2) checks.refuse("too many rows");
}

// Blocks for tiles of so many queries: a multiprocessor holds one, which goes from tile to tile.
inline int block_count(const Checks& checks, const Shape& shape, int queries, int device) {
    const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    const int64_t tiles = tile_count(shape, queries);
    // The grid's stride is added to a tile's number before it is compared.
    if (tiles > std::numeric_limits<int>::max() - multiprocessors) checks.refuse("too many queries");
    return static_cast<int>(std::min<int64_t>(tiles, multiprocessors));
}

}  // namespace flashtalk::attention
