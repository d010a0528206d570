// Attention of a bf16 head of 128 columns for sm_90a, forward, every query over every key: the design of
// FlashAttention-3 (arXiv 2407.08608).
//
// Persistent blocks of one warp that loads (TMA) and two warpgroups that multiply (wgmma).  The scores of the
// next tile of keys are asked for before the weighted sum of the last, and the softmax of the one runs while
// the other is computed; beyond that, the warpgroups take turns to issue products, so that one's softmax
// falls into the other's products.  include/chunk_attention.h says what lies where and why.
#include "include/attention_mma.cuh"
#include "include/attention_rows.cuh"
#include "include/chunk_attention.h"
#include "include/sm90.cuh"

namespace flashtalk::attention {
namespace {

constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;  // 128 * 24 + 256 * 240 = 64512 of the 65536 of a multiprocessor
constexpr int kTurnBarrier = 1;          // and 2: one a warpgroup; 0 is __syncthreads()

// What waits for what.  Every slot (the queries, two stages of keys, two of values) has a full barrier, which
// one arrival and the copies' bytes complete, and an empty one, which the eight consumer warps complete.
// Producer and consumers pass through each slot's rounds in the same order, and each waits for round r of
// "full" (parity r & 1), or round r - 1 of "empty" (parity (r & 1) ^ 1; before the first, complete): neither
// barrier can be two rounds ahead of a thread that waits for it, as the other side needs that thread's own
// arrival for it.  So parities are unambiguous.
//
// The producer loads in the order of the consumers' waits: K_last, Q, then K_n, V_n+1 downward, V_0.  The
// consumers' only other wait is for their turn (below).  A warpgroup releases what the producer needs for a
// load before it waits for a turn or for that load: K_n goes where K_n+2 was, V_n+1 where V_n+3 was, and
// both are released before the step that asks for K_n+1; Q is released before the last V is waited for.
__device__ __forceinline__ void produce(
    const Memory<Tile>& memory, const CUtensorMap& q, const CUtensorMap& k, const CUtensorMap& v,
    const Shape& shape) {
    prefetch_map(q);
    prefetch_map(k);
    prefetch_map(v);
    const int tiles = static_cast<int>(tile_count(shape, kQueries));
    const int last = ceil_div(shape.keys, Tile::kKeys) - 1;
    Ring keys{1}, values{1 + kStages};
    uint32_t round = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, round ^= 1) {
        const Origin origin = tile_origin(shape, kQueries, tile);
        const auto load = [&](Ring& ring, const CUtensorMap& map, int number) {
            const uint32_t data = memory.data(ring.slot()), full = memory.full(ring.slot());
            barrier_wait(memory.empty(ring.slot()), ring.parity ^ 1);
            barrier_expect(full, Tile::kTileBytes);  // a box counts whole, also past the end, where it is zeros
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                load_box(data + half * Tile::kHalfBytes, map, full, half * kHalf, origin.head,
                         number * Tile::kKeys, origin.batch);
            }
            ring.next();
        };
        load(keys, k, last);
        barrier_wait(memory.empty(0), round ^ 1);
        barrier_expect(memory.full(0), Tile::kQueryBytes);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            load_box(memory.data(0) + half * Tile::kQueryHalfBytes, q, memory.full(0), half * kHalf, origin.head,
                     origin.query, origin.batch);
        }
        for (int n = last - 1; n >= 0; --n) {
            load(keys, k, n);
            load(values, v, n + 1);
        }
        load(values, v, 0);
    }
}

// --- one warpgroup's part -----------------------------------------------------------------------------

// The online softmax of a thread's two rows.
struct Rows {
    float top[2];    // the largest score; four lanes share a row and hold the same
    float total[2];  // the sum of 2^(kScale (score - top)) over the thread's own columns

    // scores become weights; returns what earlier sums are multiplied by.
    template <bool kFirst, int kCount>
    __device__ __forceinline__ float2 update(float (&scores)[kCount]) {
        float fade[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // Two chains: one warp of a scheduler computes this while the other multiplies.
            float even = scores[2 * half], odd = scores[2 * half + 1];
#pragma unroll
            for (int i = 4; i < kCount; i += 4) {
                even = fmaxf(even, scores[i + 2 * half]);
                odd = fmaxf(odd, scores[i + 2 * half + 1]);
            }
            float high = fmaxf(even, odd);
            if (!kFirst) high = fmaxf(high, top[half]);
            high = quad_max(high);
            fade[half] = kFirst ? 0.0f : exp2_approximate((top[half] - high) * kScale);
            top[half] = high;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float shift = top[half] * kScale;
            float sum = kFirst ? 0.0f : total[half] * fade[half];
#pragma unroll
            for (int i = 0; i < kCount; i += 4) {
#pragma unroll
                for (int column = 0; column < 2; ++column) {
                    float& score = scores[i + 2 * half + column];
                    score = exp2_approximate(fmaf(score, kScale, -shift));
                    sum += score;
                }
            }
            total[half] = sum;
        }
        return {fade[0], fade[1]};
    }
};

// out = sums / total; queries past the end are not written.
__device__ __forceinline__ void write_out(
    const float (&sums)[kDim / 2], const Rows& rows, const Shape& shape, const Origin& origin, int group,
    uint16_t* out) {
    const int query = origin.query + group * kMmaRows;  // the warpgroup's first
    const int64_t row = (static_cast<int64_t>(origin.batch) * shape.length + query) * shape.heads + origin.head;
    const float factors[2] = {__fdividef(1.0f, quad_sum(rows.total[0])), __fdividef(1.0f, quad_sum(rows.total[1]))};
    write_rows(sums, factors, out + row * kDim, shape.heads * kDim, shape.length - query);
}

// Turns: warpgroup g waits at its own named barrier for the other's arrival there.  Both take the same number
// of turns, strictly one after the other, warpgroup 0 first; warpgroup 1 grants that first turn before all
// else.  No second arrival comes before the first was waited for: to grant a turn one must have had one's own.
__device__ __forceinline__ void take_turn(int group) { named_wait<128 * kConsumers>(kTurnBarrier + group); }
__device__ __forceinline__ void grant_turn(int group) { named_arrive<128 * kConsumers>(kTurnBarrier + group); }

__device__ __forceinline__ void consume(const Memory<Tile>& memory, const Shape& shape, uint16_t* out, int group) {
    const bool signals = threadIdx.x % 32 == 0;  // each warp releases what it has read
    const int tiles = static_cast<int>(tile_count(shape, kQueries));
    const int last = ceil_div(shape.keys, Tile::kKeys) - 1;
    const int rest = shape.keys - last * Tile::kKeys;  // keys of the last tile
    const uint64_t q = descriptor(memory.data(0) + group * kMmaRows * kRowBytes, 16);
    const auto key_tile = [&](const Ring& ring) { return descriptor(memory.data(ring.slot()), 16); };
    const auto value_tile = [&](const Ring& ring) { return descriptor(memory.data(ring.slot()), Tile::kHalfBytes); };
    const auto wait_full = [&](const Ring& ring) { barrier_wait(memory.full(ring.slot()), ring.parity); };
    const auto release = [&](Ring& ring) {
        if (signals) barrier_arrive(memory.empty(ring.slot()));
        ring.next();
    };
    Ring keys{1}, values{1 + kStages};
    uint32_t round = 0;
    if (group == 1) grant_turn(0);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, round ^= 1) {
        float scores[Tile::kKeys / 2], sums[kDim / 2] = {};
        uint32_t weights[Tile::kKeys / 4];
        Rows rows;
        barrier_wait(memory.full(0), round);
        wait_full(keys);
        issue_scores<Tile::kQueryHalfBytes, Tile::kHalfBytes>(scores, q, key_tile(keys));
        mma_wait<0>();
        pin(scores);
        release(keys);
        if (rest < Tile::kKeys) {
#pragma unroll
            for (int i = 0; i < Tile::kKeys / 2; ++i) {
                if (fragment_column(threadIdx.x % 32, i) >= rest) scores[i] = -INFINITY;
            }
        }
        rows.update<true>(scores);
        pack_all(scores, weights);
        for (int n = last - 1; n >= 0; --n) {
            wait_full(keys);
            take_turn(group);
            issue_scores<Tile::kQueryHalfBytes, Tile::kHalfBytes>(scores, q, key_tile(keys));  // of tile n
            wait_full(values);
            issue_values(sums, weights, value_tile(values));  // of tile n + 1
            grant_turn(1 - group);
            mma_wait<1>();
            pin(scores);
            release(keys);
            const float2 fade = rows.update<false>(scores);
            finish_weights(rows.total, memory.spare());
            mma_wait<0>();
            pin(sums);
            pin(weights);
            release(values);
            pack_all(scores, weights);
#pragma unroll
            for (int i = 0; i < kDim / 2; ++i) sums[i] *= fragment_half(i) == 0 ? fade.x : fade.y;
        }
        if (signals) barrier_arrive(memory.empty(0));
        wait_full(values);
        issue_values(sums, weights, value_tile(values));
        mma_wait<0>();
        pin(sums);
        release(values);
        write_out(sums, rows, shape, tile_origin(shape, kQueries, tile), group, out);
    }
    if (group == 0) take_turn(0);  // the last grant, so that none is left over
}

__global__ void __launch_bounds__(kThreads, 1) chunk_attention_kernel(
    const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
    const __grid_constant__ Shape shape, uint16_t* out) {
    extern __shared__ uint8_t shared[];
    const uint32_t start = shared_address(shared);
    const Memory<Tile> memory{(start + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment};
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < kSlots; ++slot) {
            barrier_init(memory.full(slot), 1);
            barrier_init(memory.empty(slot), kConsumers * 4);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<kProducerRegisters>();
        if (threadIdx.x == 0) produce(memory, q, k, v, shape);
    } else {
        take_registers<kConsumerRegisters>();
        consume(memory, shape, out, __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0) - 1);
    }
}

}  // namespace

const void* const kKernel = reinterpret_cast<const void*>(&chunk_attention_kernel);

}  // namespace flashtalk::attention
