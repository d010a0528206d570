// Attention of int8 queries and keys and e4m3 values for sm_90a, forward, every query over every key: the
// design of kernels/chunk_attention.cu with eight-bit products, and without turns.
//
// Scores are exact in int32.  Weights are scaled by 2^8 and rounded to e4m3; their sums, by which the result is
// divided, are of the unrounded ones.
#include <cuda_fp8.h>

#include <cfloat>

#include "include/attention_rows.cuh"
#include "include/quantized_attention.h"
#include "include/self_attention.cuh"
#include "include/sm90.cuh"

namespace flashtalk::attention::quantized {
namespace {

constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 160;  // 128 * 24 + 384 * 160 = 64512 of the 65536 of a multiprocessor
constexpr float kWeightBits = 8.0f;      // e4m3 holds 2^-9 to 448, so weights from 2^-17 on

// --- products: asynchronous, sums in registers ----------------------------------------------------------

#define FT_WORDS_16(d, i)                                                                                     \
    "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), \
        "+r"(d[i + 7]), "+r"(d[i + 8]), "+r"(d[i + 9]), "+r"(d[i + 10]), "+r"(d[i + 11]), "+r"(d[i + 12]),      \
        "+r"(d[i + 13]), "+r"(d[i + 14]), "+r"(d[i + 15])

// d [64, 96] (+)= a [64, 32] b [96, 32]^T, int8 in shared memory.  `accumulate` 0 ignores d's old values.
__device__ __forceinline__ void mma_scores(int (&d)[48], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.ne.b32 p, %50, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
        "}, %48, %49, p;\n}"
        : FT_WORDS_16(d, 0), FT_WORDS_16(d, 16), FT_WORDS_16(d, 32)
        : "l"(a), "l"(b), "r"(accumulate));
}

// d [64, 128] += a [64, 32] b [128, 32]^T, e4m3: a in registers, b in shared memory.  The trailing immediates:
// neither negated.
__device__ __forceinline__ void mma_values(float (&d)[64], const uint32_t* a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, p, 1, 1;\n}"
        : FT_REGISTERS_16(d, 0), FT_REGISTERS_16(d, 16), FT_REGISTERS_16(d, 32), FT_REGISTERS_16(d, 48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}

#undef FT_WORDS_16

__device__ __forceinline__ void issue_scores(int (&scores)[Tile::kKeys / 2], uint64_t q, uint64_t k) {
    pin(scores);
    mma_fence();
#pragma unroll
    for (int step = 0; step < kDim / kMmaK; ++step)
        mma_scores(scores, advance(q, step * kMmaK), advance(k, step * kMmaK), step > 0);
    mma_commit();
}

__device__ __forceinline__ void issue_values(
    float (&sums)[kDim / 2], uint32_t (&weights)[Tile::kKeys / 8], uint64_t v) {
    pin(sums);
    pin(weights);
    mma_fence();
#pragma unroll
    for (int span = 0; span < Tile::kSpans; ++span) mma_values(sums, &weights[span * 4], advance(v, span * kSpanBytes));
    mma_commit();
}

// How the warp that loads fills a slot.
struct Boxes {
    const CUtensorMap &q, &k, &v;

    __device__ __forceinline__ void queries(uint32_t to, uint32_t full, const Origin& origin) const {
        load_box(to, q, full, 0, origin.head, origin.query, origin.batch);
    }
    __device__ __forceinline__ void keys(uint32_t to, uint32_t full, const Origin& origin, int first) const {
        load_box(to, k, full, 0, origin.head, first, origin.batch);
    }
    __device__ __forceinline__ void values(uint32_t to, uint32_t full, const Origin& origin, int first) const {
#pragma unroll
        for (int span = 0; span < Tile::kSpans; ++span)
            load_box(to + span * kSpanBytes, v, full, first + span * kMmaK, 0, origin.head, origin.batch);
    }
};

// --- one warpgroup's part -------------------------------------------------------------------------------

// The online softmax of a thread's two rows.
struct Rows {
    float top[2];    // the largest score, in powers of two; four lanes share a row and hold the same
    float total[2];  // the sum of the thread's own weights

    // x: scores, which become weights.  factor: from a row's scores to powers of two.  Returns what earlier
    // sums are multiplied by.
    template <bool kFirst, int kCount>
    __device__ __forceinline__ float2 update(float (&x)[kCount], const float (&factor)[2]) {
        float fade[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float even = x[2 * half], odd = x[2 * half + 1];
#pragma unroll
            for (int i = 4; i < kCount; i += 4) {
                even = fmaxf(even, x[i + 2 * half]);
                odd = fmaxf(odd, x[i + 2 * half + 1]);
            }
            float high = quad_max(fmaxf(even, odd)) * factor[half];
            if (!kFirst) high = fmaxf(high, top[half]);
            fade[half] = kFirst ? 0.0f : exp2_approximate(top[half] - high);
            top[half] = high;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float shift = top[half] - kWeightBits;
            float sum = kFirst ? 0.0f : total[half] * fade[half];
#pragma unroll
            for (int i = 0; i < kCount; i += 4) {
#pragma unroll
                for (int column = 0; column < 2; ++column) {
                    float& score = x[i + 2 * half + column];
                    score = exp2_approximate(fmaf(score, factor[half], -shift));
                    sum += score;
                }
            }
            total[half] = sum;
        }
        return {fade[0], fade[1]};
    }
};

__device__ __forceinline__ uint32_t pack_two(float low, float high) {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

template <int kCount>
__device__ __forceinline__ void pack_all(const float (&x)[kCount], uint32_t (&words)[kCount / 4]) {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
        const int at = word_register(i);
        words[i] = pack_two(x[at], x[at + 1]) | pack_two(x[at + 4], x[at + 5]) << 16;
    }
}

__device__ __forceinline__ void consume(
    const Memory<Tile>& memory, const Shape& shape, const Scales& scales, uint16_t* out, int group) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const bool signals = lane == 0;  // each warp releases what it has read
    const int tiles = static_cast<int>(tile_count(shape, Tile::kQueries));
    const int key_tiles = ceil_div(shape.keys, Tile::kKeys), last = key_tiles - 1;
    const int rest = shape.keys - last * Tile::kKeys;  // keys of the last tile
    const uint64_t q = descriptor(memory.data(0) + group * kMmaRows * kRowBytes, 16);
    const auto key_tile = [&](const Ring& ring) { return descriptor(memory.data(ring.slot()), 16); };
    const auto value_tile = [&](const Ring& ring) { return value_descriptor(memory.data(ring.slot())); };
    const auto wait_full = [&](const Ring& ring) { barrier_wait(memory.full(ring.slot()), ring.parity); };
    const auto release = [&](Ring& ring) {
        if (signals) barrier_arrive(memory.empty(ring.slot()));
        ring.next();
    };
    Ring keys{1}, values{1 + kStages};
    uint32_t round = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, round ^= 1) {
        const Origin origin = tile_origin(shape, Tile::kQueries, tile);
        const int query = origin.query + group * kMmaRows;  // the warpgroup's first
        const int64_t head = static_cast<int64_t>(origin.batch) * shape.heads + origin.head;
        const float* k_scale = scales.k + head * key_tiles;
        float q_scale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = min(query + fragment_row(warp, lane, half), shape.length - 1);
            q_scale[half] = __ldg(scales.q + head * shape.length + row) * kScale;
        }
        float tile_scale = __ldg(k_scale + last), ahead = __ldg(k_scale + max(last - 1, 0));
        int scores[Tile::kKeys / 2];
        float x[Tile::kKeys / 2], sums[kDim / 2] = {};
        uint32_t weights[Tile::kKeys / 8];
        Rows rows;
        const auto update = [&](auto first) {
            // Not zero, which a hidden key's score would make NaN.
            const float factor[2] = {fmaxf(q_scale[0] * tile_scale, FLT_MIN), fmaxf(q_scale[1] * tile_scale, FLT_MIN)};
            return rows.update<first.value>(x, factor);
        };
        barrier_wait(memory.full(0), round);
        wait_full(keys);
        issue_scores(scores, q, key_tile(keys));
        mma_wait<0>();
        pin(scores);
        release(keys);
#pragma unroll
        for (int i = 0; i < Tile::kKeys / 2; ++i)
            x[i] = fragment_column(lane, i) < rest ? __int2float_rn(scores[i]) : -INFINITY;
        update(std::true_type{});
        pack_all(x, weights);
        for (int n = last - 1; n >= 0; --n) {
            tile_scale = ahead;
            ahead = __ldg(k_scale + max(n - 1, 0));
            wait_full(keys);
            issue_scores(scores, q, key_tile(keys));  // of tile n
            wait_full(values);
            issue_values(sums, weights, value_tile(values));  // of tile n + 1
            mma_wait<1>();
            pin(scores);
            release(keys);
#pragma unroll
            for (int i = 0; i < Tile::kKeys / 2; ++i) x[i] = __int2float_rn(scores[i]);
            const float2 fade = update(std::false_type{});
            finish_weights(rows.total, memory.spare());
            mma_wait<0>();
            pin(sums);
            pin(weights);
            release(values);
            pack_all(x, weights);
            // After the first tiles a row's largest score seldom changes.
            if (__any_sync(0xFFFFFFFF, fade.x != 1.0f || fade.y != 1.0f)) {
#pragma unroll
                for (int i = 0; i < kDim / 2; ++i) sums[i] *= fragment_half(i) == 0 ? fade.x : fade.y;
            }
        }
        if (signals) barrier_arrive(memory.empty(0));
        wait_full(values);
        issue_values(sums, weights, value_tile(values));
        mma_wait<0>();
        pin(sums);
        release(values);
        const float v_scale = __ldg(scales.v + head);
        const float factors[2] = {
            __fdividef(v_scale, quad_sum(rows.total[0])), __fdividef(v_scale, quad_sum(rows.total[1]))};
        const float2* mean = reinterpret_cast<const float2*>(scales.v_mean + head * kDim) + lane % 4;
#pragma unroll
        for (int i = 0; i < kDim / 2; i += 4) {  // a block of 8 columns, of which this thread has two
            const float2 both = __ldg(mean + i);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sums[i + 2 * half] = fmaf(sums[i + 2 * half], factors[half], both.x);
                sums[i + 2 * half + 1] = fmaf(sums[i + 2 * half + 1], factors[half], both.y);
            }
        }
        const int64_t row = (static_cast<int64_t>(origin.batch) * shape.length + query) * shape.heads + origin.head;
        write_rows(sums, {1.0f, 1.0f}, out + row * kDim, shape.heads * kDim, shape.length - query);
    }
}

__global__ void __launch_bounds__(Tile::kThreads, 1) quantized_attention_kernel(
    const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
    const __grid_constant__ Shape shape, const __grid_constant__ Scales scales, uint16_t* out) {
    run_block<Tile, kProducerRegisters, kConsumerRegisters>(
        shape, Boxes{q, k, v},
        [&](const Memory<Tile>& memory, int group) { consume(memory, shape, scales, out, group); });
}

}  // namespace

const void* const kKernel = reinterpret_cast<const void*>(&quantized_attention_kernel);

}  // namespace flashtalk::attention::quantized
