// Attention of a bf16 head of 128 columns for sm_90a, forward, every query over every key: the design of
// FlashAttention-3 (arXiv 2407.08608).
//
// Persistent blocks of one warp that loads (TMA) and two warpgroups that multiply (wgmma).  The scores of the
// next tile of keys are asked for before the weighted sum of the last, and the softmax of the one runs while
// the other is computed; beyond that, the warpgroups take turns to issue products, so that one's softmax
// falls into the other's products.  include/self_attention.h says what lies where.
#include "include/attention_mma.cuh"
#include "include/attention_rows.cuh"
#include "include/chunk_attention.h"
#include "include/self_attention.cuh"
#include "include/sm90.cuh"

namespace flashtalk::attention {
namespace {

constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;  // 128 * 24 + 256 * 240 = 64512 of the 65536 of a multiprocessor
constexpr int kTurnBarrier = 1;          // and 2: one a warpgroup; 0 is __syncthreads()

// How the warp that loads fills a slot: by halves of 64 columns.
struct Boxes {
    const CUtensorMap &q, &k, &v;

    template <int kHalfBytes>
    __device__ __forceinline__ static void load(
        uint32_t to, const CUtensorMap& map, uint32_t full, const Origin& origin, int row) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
            load_box(to + half * kHalfBytes, map, full, half * kHalf, origin.head, row, origin.batch);
    }
    __device__ __forceinline__ void queries(uint32_t to, uint32_t full, const Origin& origin) const {
        load<Tile::kQueryHalfBytes>(to, q, full, origin, origin.query);
    }
    __device__ __forceinline__ void keys(uint32_t to, uint32_t full, const Origin& origin, int first) const {
        load<Tile::kHalfBytes>(to, k, full, origin, first);
    }
    __device__ __forceinline__ void values(uint32_t to, uint32_t full, const Origin& origin, int first) const {
        load<Tile::kHalfBytes>(to, v, full, origin, first);
    }
};

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
__device__ __forceinline__ void take_turn(int group) { named_wait<128 * Tile::kConsumers>(kTurnBarrier + group); }
__device__ __forceinline__ void grant_turn(int group) { named_arrive<128 * Tile::kConsumers>(kTurnBarrier + group); }

__device__ __forceinline__ void consume(const Memory<Tile>& memory, const Shape& shape, uint16_t* out, int group) {
    const bool signals = threadIdx.x % 32 == 0;  // each warp releases what it has read
    const int tiles = static_cast<int>(tile_count(shape, Tile::kQueries));
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
        write_out(sums, rows, shape, tile_origin(shape, Tile::kQueries, tile), group, out);
    }
    if (group == 0) take_turn(0);  // the last grant, so that none is left over
}

__global__ void __launch_bounds__(Tile::kThreads, 1) chunk_attention_kernel(
    const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
    const __grid_constant__ Shape shape, uint16_t* out) {
    run_block<Tile, kProducerRegisters, kConsumerRegisters>(
        shape, Boxes{q, k, v},
        [&](const Memory<Tile>& memory, int group) { consume(memory, shape, out, group); });
}

}  // namespace

const void* const kKernel = reinterpret_cast<const void*>(&chunk_attention_kernel);

}  // namespace flashtalk::attention
