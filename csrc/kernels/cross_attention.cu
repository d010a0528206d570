// Cross-attention to text and image for sm_90a, bf16 heads of 128 columns: two softmaxes of each query, summed.
//
// Persistent blocks of one warp that loads (TMA), one that opens what was loaded, and two warpgroups that multiply (wgmma), each on its own
// tiles of 64 queries: the softmax of the one falls into the products of the other.  A head's keys and values
// stay in shared memory, all scores of a query in registers, so both softmaxes are exact at once and nothing
// is rescaled.  include/cross_attention.h says what lies where.
//
// A batch whose text has more than kText visible keys is left alone: another kernel's.
#include "include/attention_mma.cuh"
#include "include/attention_rows.cuh"
#include "include/cross_attention.h"
#include "include/sm90.cuh"

namespace flashtalk::attention::cross {
namespace {

constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;  // 128 * 40 + 256 * 232 = 64512 of the 65536 of a multiprocessor

struct Maps {
    CUtensorMap map[kMaps];
};

// One more than the last text key whose bias does not hide it; the same in every lane of a warp.
__device__ __forceinline__ int visible_end(const float* bias, int keys) {
    if (bias == nullptr) return keys;
    int end = 0;
    for (int key = threadIdx.x % 32; key < keys; key += 32) {
        if (bias[key] != -INFINITY) end = key + 1;
    }
    return __reduce_max_sync(0xFFFFFFFF, end);
}

// The parts of a block's work that this kernel serves, one after the other.
template <class Serve>
__device__ __forceinline__ void walk(const Shape& shape, const float* text_bias, Serve serve) {
    const int first = first_tile(shape, blockIdx.x, gridDim.x);
    const int end = first_tile(shape, blockIdx.x + 1, gridDim.x);
    int batch = -1, text_end = 0;
    for (int tile = first; tile < end;) {
        const Segment segment = segment_from(shape, tile, end);
        const float* bias = text_bias == nullptr ? nullptr : text_bias + segment.batch * shape.bias_stride;
        if (segment.batch != batch) {
            batch = segment.batch;
            text_end = visible_end(bias, shape.text);
        }
        if (text_end <= kText) serve(segment, first, bias, text_end);
        tile = segment.end;
    }
}

// What waits for what: every slot has a full barrier, which one arrival and the copies' bytes complete, and
// an empty one, which the warps that read it complete: all eight for keys and values, four for queries.  The
// values' full barrier is waited for by the warp that opens them, whose 32 lanes complete the open barrier.
// Keys and values have a round a segment, in which each warpgroup waits for "full" or "open" and arrives at
// "empty" once, also without a tile in it: so nobody is two rounds ahead.  The loading warp needs a segment's
// keys to be empty before its first queries and the values after them; the warpgroups complete both without
// what is loaded then.
__device__ __forceinline__ void produce(const Memory& memory, const Maps& maps, const Shape& shape, const float* bias) {
    const bool loads = threadIdx.x == 0;
    QueryRing rings[kConsumers] = {{0}, {1}};
    uint32_t round = 0;
    walk(shape, bias, [&](const Segment& segment, int first, const float*, int) {
        // Image, tail and text of a slot: 0 the keys, 1 the values.
        const auto load = [&](int slot) {
            barrier_wait(memory.empty(slot), round ^ 1);
            if (!loads) return;
            barrier_expect(memory.full(slot), kTileBytes);  // a box counts whole: past the end it is zeros
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                const uint32_t to = memory.data(slot) + half * kHalfBytes, full = memory.full(slot);
                const int column = half * kHalf;
                load_box(to, maps.map[kImageKeys + slot], full, column, segment.head, 0, segment.batch);
                load_box(to + kImage * kRowBytes, maps.map[kTailKeys + slot], full, column, segment.head, kImage,
                         segment.batch);
                load_box(to + (kImage + kTail) * kRowBytes, maps.map[kTextKeys + slot], full, column, segment.head, 0,
                         segment.batch);
            }
        };
        load(0);
        const int head_begin = (segment.batch * shape.heads + segment.head) * head_tiles(shape);
        for (int tile = segment.begin; tile < segment.end; ++tile) {
            const int group = (tile - first) % kConsumers;
            QueryRing ring = group == 0 ? rings[0] : rings[1];
            barrier_wait(memory.empty(ring.slot()), ring.parity ^ 1);
            if (loads) {
                barrier_expect(memory.full(ring.slot()), kQueryBytes);
#pragma unroll
                for (int half = 0; half < kHalves; ++half) {
                    load_box(memory.data(ring.slot()) + half * kQueryHalfBytes, maps.map[kQueryMap],
                             memory.full(ring.slot()), half * kHalf, segment.head, (tile - head_begin) * kMmaRows,
                             segment.batch);
                }
            }
            ring.next();
            (group == 0 ? rings[0] : rings[1]) = ring;
            if (tile == min(segment.begin + kConsumers, segment.end) - 1) load(1);
        }
        round ^= 1;
    });
}

// A warp that opens each segment's values: hidden text may be anything, also NaN, which a weight of 0 does not
// remove, so it becomes zeros.
__device__ __forceinline__ void scrub(const Memory& memory, const Shape& shape, const float* bias) {
    uint32_t round = 0;
    walk(shape, bias, [&](const Segment&, int, const float*, int text_end) {
        barrier_wait(memory.full(1), round);
        for (int row = text_end; row < kText; ++row) {
            // 16 bytes a lane, eight lanes a half.
            const int lane = threadIdx.x % 32;
            const uint32_t to = memory.data(1) + lane / 8 % kHalves * kHalfBytes + (kImage + kTail + row) * kRowBytes;
            if (lane < 8 * kHalves) store_zeros(to + lane % 8 * 16);
        }
        async_fence();
        barrier_arrive(memory.open());
        round ^= 1;
    });
}

// The largest of a thread's scores of the row of `half`, among registers kBegin .. kEnd of an array.
template <int kBegin, int kEnd, int kCount>
__device__ __forceinline__ float largest(const float (&scores)[kCount], int half) {
    float even = scores[kBegin + 2 * half], odd = scores[kBegin + 2 * half + 1];  // two chains
#pragma unroll
    for (int i = kBegin + 4; i < kEnd; i += 4) {
        even = fmaxf(even, scores[i + 2 * half]);
        odd = fmaxf(odd, scores[i + 2 * half + 1]);
    }
    return fmaxf(even, odd);
}

// Scores of the row of `half` become 2^(scale score - shift); returns their sum.
template <int kBegin, int kEnd, int kCount>
__device__ __forceinline__ float weigh(float (&scores)[kCount], int half, float scale, float shift) {
    float sum = 0.0f;
#pragma unroll
    for (int i = kBegin; i < kEnd; i += 4) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
            float& score = scores[i + 2 * half + column];
            score = exp2_approximate(fmaf(score, scale, -shift));
            sum += score;
        }
    }
    return sum;
}

// Registers of the second array: the image's, its tail's, the text's.
constexpr int kTailRegister = kTailColumn / 2, kTextRegister = kTextColumn / 2, kRegisters = kSecond / 2;
constexpr int kBiases = kText / 4;  // a thread's text columns, the same in both rows

__device__ __forceinline__ void consume(
    const Memory& memory, const Shape& shape, const float* text_bias, uint16_t* out, int group) {
    const int lane = threadIdx.x % 32;
    const bool signals = lane == 0;  // each warp releases what it has read
    const uint64_t keys = descriptor(memory.data(0), 16);
    const uint64_t values = descriptor(memory.data(1), kHalfBytes);
    QueryRing ring{group};
    uint32_t round = 0;
    walk(shape, text_bias, [&](const Segment& segment, int first, const float* bias, int text_end) {
        const int head_begin = (segment.batch * shape.heads + segment.head) * head_tiles(shape);
        int tile = own_tile(segment, first, group);
        barrier_wait(memory.full(0), round);
        if (tile >= segment.end && signals) barrier_arrive(memory.empty(0));
        for (; tile < segment.end; tile += kConsumers) {
            float a[kFirst / 2], b[kSecond / 2];
            // To scores in powers of two; -inf for what is hidden.  Read again for every tile: kept, they would
            // take registers that the products need.
            float added[kBiases];
#pragma unroll
            for (int i = 0; i < kBiases; ++i) {
                const int key = fragment_column(lane, kTextRegister + i / 2 * 4 + i % 2) - kTextColumn;
                added[i] = key < text_end ? 0.0f : -INFINITY;
                if (bias != nullptr && key < text_end) added[i] = bias[key] * kLog2E;
            }
            barrier_wait(memory.full(ring.slot()), ring.parity);
            const uint64_t q = descriptor(memory.data(ring.slot()), 16);
            issue_scores<kQueryHalfBytes, kHalfBytes>(a, q, keys);
            issue_scores<kQueryHalfBytes, kHalfBytes>(b, q, advance(keys, kFirst * kRowBytes));
            mma_wait<1>();
            pin(a);
            float image_top[2] = {largest<0, kFirst / 2>(a, 0), largest<0, kFirst / 2>(a, 1)};
            mma_wait<0>();
            pin(b);
            if (signals) {
                barrier_arrive(memory.empty(ring.slot()));
                if (tile + kConsumers >= segment.end) barrier_arrive(memory.empty(0));
            }
            ring.next();
#pragma unroll
            for (int i = kTailRegister; i < kTextRegister; ++i) {
                if (fragment_column(lane, i) - kTailColumn + kImage >= shape.image) b[i] = -INFINITY;
            }
#pragma unroll
            for (int i = kTextRegister; i < kRegisters; ++i) {
                const float more = added[(i - kTextRegister) / 4 * 2 + i % 2];
                b[i] = more == -INFINITY ? more : fmaf(b[i], kScale, more);
            }
            float text_top[2], image_total[2], text_total[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                image_top[half] = quad_max(fmaxf(image_top[half], largest<0, kTextRegister>(b, half))) * kScale;
                text_top[half] = quad_max(largest<kTextRegister, kRegisters>(b, half));
                image_total[half] = weigh<0, kFirst / 2>(a, half, kScale, image_top[half]);
            }
            uint32_t first_weights[kFirst / 4], second_weights[kSecond / 4];
            pack_all(a, first_weights);
            barrier_wait(memory.open(), round);
            float sums[kDim / 2] = {};
            issue_values(sums, first_weights, values);
            float factors[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                image_total[half] += weigh<0, kTextRegister>(b, half, kScale, image_top[half]);
                text_total[half] = weigh<kTextRegister, kRegisters>(b, half, 1.0f, text_top[half]);
                // Both in one sum: the text's weights get the image's total by their own, and the sum is divided
                // by the image's.
                const float whole = quad_sum(image_total[half]);
                const float share = __fdividef(whole, quad_sum(text_total[half]));
#pragma unroll
                for (int i = kTextRegister + 2 * half; i < kRegisters; i += 4) {
                    b[i] *= share;
                    b[i + 1] *= share;
                }
                factors[half] = __fdividef(1.0f, whole);
            }
            pack_all(b, second_weights);
            issue_values(sums, second_weights, advance(values, key_step(kFirst / kMmaK)));
            mma_wait<0>();
            pin(sums);
            pin(first_weights);
            pin(second_weights);
            const int query = (tile - head_begin) * kMmaRows;
            const int64_t row = (static_cast<int64_t>(segment.batch) * shape.length + query) * shape.heads + segment.head;
            write_rows(sums, factors, out + row * kDim, shape.heads * kDim, shape.length - query);
        }
        barrier_wait(memory.open(), round);
        if (signals) barrier_arrive(memory.empty(1));
        round ^= 1;
    });
}

__global__ void __launch_bounds__(kThreads, 1) cross_attention_kernel(
    const __grid_constant__ Maps maps, const __grid_constant__ Shape shape, const float* text_bias, uint16_t* out) {
    extern __shared__ uint8_t shared[];
    const uint32_t start = shared_address(shared);
    const Memory memory{(start + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment};
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < kSlots; ++slot) {
            barrier_init(memory.full(slot), 1);
            barrier_init(memory.empty(slot), slot < 2 ? kConsumers * 4 : 4);
        }
        barrier_init(memory.open(), 32);
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<kProducerRegisters>();
        if (threadIdx.x < 32) {
            produce(memory, maps, shape, text_bias);
        } else if (threadIdx.x < 64) {
            scrub(memory, shape, text_bias);
        }
    } else {
        take_registers<kConsumerRegisters>();
        consume(memory, shape, text_bias, out, __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0) - 1);
    }
}

}  // namespace

const void* const kKernel = reinterpret_cast<const void*>(&cross_attention_kernel);

}  // namespace flashtalk::attention::cross
