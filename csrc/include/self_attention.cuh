// How a block of a self-attention kernel begins, and its warp that loads.
#pragma once

#include "include/self_attention.h"
#include "include/sm90.cuh"

namespace flashtalk::attention {

// What waits for what.  Every slot (the queries, two stages of keys, two of values) has a full barrier, which
// one arrival and the copies' bytes complete, and an empty one, which every consumer warp completes.
// Producer and consumers pass through each slot's rounds in the same order, and each waits for round r of
// "full" (parity r & 1), or round r - 1 of "empty" (parity (r & 1) ^ 1; before the first, complete): neither
// barrier can be two rounds ahead of a thread that waits for it, as the other side needs that thread's own
// arrival for it.  So parities are unambiguous.
//
// The producer loads in the order of the consumers' waits: K_last, Q, then K_n, V_n+1 downward, V_0.  A
// warpgroup releases what the producer needs for a load before it waits for that load (or for its turn, where
// warpgroups take turns): K_n goes where K_n+2 was, V_n+1 where V_n+3 was, and both are released before the
// step that asks for K_n+1; Q is released before the last V is waited for.
//
// boxes: the tensor maps q, k and v, and how one slot is filled, by copies to an address that signal its
// barrier:
//   queries(to, full, origin), keys(to, full, origin, first key), values(to, full, origin, first key).
// A box counts whole, also past the end, where it is zeros.
template <class Tile, class Boxes>
__device__ __forceinline__ void produce(const Memory<Tile>& memory, const Shape& shape, const Boxes& boxes) {
    const int tiles = static_cast<int>(tile_count(shape, Tile::kQueries));
    const int last = ceil_div(shape.keys, Tile::kKeys) - 1;
    Ring keys{1}, values{1 + kStages};
    uint32_t round = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, round ^= 1) {
        const Origin origin = tile_origin(shape, Tile::kQueries, tile);
        const auto begin = [&](const Ring& ring) {
            barrier_wait(memory.empty(ring.slot()), ring.parity ^ 1);
            barrier_expect(memory.full(ring.slot()), Tile::kTileBytes);
        };
        const auto load_keys = [&](int number) {
            begin(keys);
            boxes.keys(memory.data(keys.slot()), memory.full(keys.slot()), origin, number * Tile::kKeys);
            keys.next();
        };
        const auto load_values = [&](int number) {
            begin(values);
            boxes.values(memory.data(values.slot()), memory.full(values.slot()), origin, number * Tile::kKeys);
            values.next();
        };
        load_keys(last);
        barrier_wait(memory.empty(0), round ^ 1);
        barrier_expect(memory.full(0), Tile::kQueryBytes);
        boxes.queries(memory.data(0), memory.full(0), origin);
        for (int n = last - 1; n >= 0; --n) {
            load_keys(n);
            load_values(n + 1);
        }
        load_values(0);
    }
}

// Makes the barriers and hands the registers out: one thread of the first warpgroup loads, every thread of the
// others calls multiply(memory, number of its warpgroup among them).
template <class Tile, int kProducerRegisters, int kConsumerRegisters, class Boxes, class Multiply>
__device__ __forceinline__ void run_block(const Shape& shape, const Boxes& boxes, const Multiply& multiply) {
    static_assert(128 * (kProducerRegisters + Tile::kConsumers * kConsumerRegisters) <= 65536, "registers");
    extern __shared__ uint8_t shared[];
    const uint32_t start = shared_address(shared);
    const Memory<Tile> memory{(start + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment};
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < kSlots; ++slot) {
            barrier_init(memory.full(slot), 1);
            barrier_init(memory.empty(slot), Tile::kConsumers * 4);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<kProducerRegisters>();
        if (threadIdx.x == 0) {
            prefetch_map(boxes.q);
            prefetch_map(boxes.k);
            prefetch_map(boxes.v);
            produce(memory, shape, boxes);
        }
    } else {
        take_registers<kConsumerRegisters>();
        multiply(memory, __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0) - 1);
    }
}

}  // namespace flashtalk::attention
