// Implicit-GEMM convolution of a slice of video for sm_90a: TMA loads, wgmma products, persistent blocks.
//
// include/slice_conv.h says how an output tile maps to boxes, stages and products.  One warp loads, two
// warpgroups multiply; each owns half of the patch's rows and all of the output channels.  The input
// arrives finished (normalised, activated, its past frames in front): it goes from TMA straight into
// swizzled shared memory, where no thread could touch it without a round trip through registers: three
// warps that normalised each stage there took 1.7 to 3.6 times as long as the products.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "include/slice_conv.h"
#include "include/sm90.cuh"

namespace flashtalk {
namespace {

constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;  // 128 * 24 + 256 * 240 = 64512 of the 65536 of a multiprocessor

// Shared-memory addresses of the stages and their barriers.
template <class Tile>
struct Stages {
    uint32_t base;

    __device__ uint32_t data(int stage) const { return base + stage * Tile::kStageBytes; }
    __device__ uint32_t full(int stage) const { return base + Tile::kStages * Tile::kStageBytes + stage * 16; }
    __device__ uint32_t empty(int stage) const { return full(stage) + 8; }
};

template <class Tile>
__device__ __forceinline__ void produce(
    const Stages<Tile>& stages, const CUtensorMap& x, const CUtensorMap& weight, const SliceConvShape& shape) {
    prefetch_map(x);
    prefetch_map(weight);
    const int tiles = static_cast<int>(tile_count(shape, Tile::kN, Tile::kRows));
    Ring<Tile> ring;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const TileOrigin origin = tile_origin(shape, Tile::kN, Tile::kRows, tile);
        for (int dt = 0; dt < shape.kernel_t; ++dt) {
            for (int slab = 0; slab < shape.in_channels / kSlab; ++slab) {
                for (int dx = 0; dx < Tile::kSpatial; ++dx, ring.next()) {
                    const uint32_t full = stages.full(ring.stage);
                    const uint32_t data = stages.data(ring.stage);
                    barrier_wait(stages.empty(ring.stage), ring.parity ^ 1);
                    // A box counts whole, also where it lies outside of the tensor.
                    barrier_expect(full, Tile::kStageBytes);
                    const InputBox box = input_box(origin, Tile::kSpatial, dt, slab, dx);
                    load_box(data, x, full, box.c, box.w, box.h, box.t);
#pragma unroll
                    for (int dy = 0; dy < Tile::kSpatial; ++dy) {
                        const int offset = weight_offset(Tile::kInputBytes, Tile::kTapBytes, dy, 0);
                        load_box(data + offset, weight, full, box.c, dx, dy, dt, origin.o);
                    }
                }
            }
        }
    }
}

// Two neighbouring elements in a word, the first in its low half.
template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
    if constexpr (std::is_same_v<Element, __half>) {
        return {__half2float(__ushort_as_half(static_cast<uint16_t>(pair))),
                __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16)))};
    } else {
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000)};
    }
}

template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<Element, __half>) {
        const __half2 pair = __floats2half2_rn(low, high);
        return static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16 | __half_as_ushort(pair.x);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16 | __bfloat16_as_ushort(pair.x);
    }
}

// out = accumulators + bias (+ residual), added in fp32 and rounded once; pixels outside are not written.
template <class Tile, class Element, bool kResidual>
__device__ __forceinline__ void write_tile(
    const float (&sums)[Tile::kM64][Tile::kN / 2], const SliceConvArgs& args, const TileOrigin& origin, int group) {
    const int lane = threadIdx.x % 32;
    const int quad = lane % 4;
    const SliceConvShape& shape = args.shape;
    const Pixel corner = fragment_pixel(Tile::kM64, group, 0, threadIdx.x / 32 % 4, lane, 0);
    // Rows of the picture from the corner down; none right of its last column.
    const int left = origin.w + corner.w < shape.width ? shape.height - origin.h - corner.h : 0;
    const int64_t row = (static_cast<int64_t>(origin.t) * shape.height + origin.h + corner.h) * shape.width;
    const int64_t start = (row + origin.w + corner.w) * shape.out_channels + origin.o + quad * 8;
    const int pitch = shape.width * shape.out_channels;
    const auto* bias = static_cast<const uint32_t*>(args.bias) + origin.o / 2 + quad;
    const auto* residual = static_cast<const uint16_t*>(args.residual) + start;
    auto* out = static_cast<uint16_t*>(args.out) + start;
#pragma unroll
    for (int first = 0; first < Tile::kN; first += 32) {  // four blocks of 8 channels
        uint32_t shifts[4];  // as loaded: registers are short here
#pragma unroll
        for (int i = 0; i < 4; ++i) shifts[i] = __ldg(bias + first / 2 + i * 4);
#pragma unroll
        for (int m = 0; m < Tile::kM64; ++m) {
            uint32_t words[2][4] = {};
            int at[2];
            bool inside[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int down = fragment_pixel(Tile::kM64, 0, m, 0, 0, half).h;
                inside[half] = down < left;
                at[half] = down * pitch + first;
                if (kResidual && inside[half]) {
                    const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(residual + at[half]));
                    words[half][0] = loaded.x, words[half][1] = loaded.y;
                    words[half][2] = loaded.z, words[half][3] = loaded.w;
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (kResidual) transpose_quad(words[half], lane);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* sum = &sums[m][(first / 8 + i) * 4 + half * 2];
                    const float2 shift = unpack<Element>(shifts[i]);
                    const float2 added = unpack<Element>(words[half][i]);
                    words[half][i] = pack<Element>(sum[0] + shift.x + added.x, sum[1] + shift.y + added.y);
                }
                transpose_quad(words[half], lane);
                if (inside[half]) {
                    *reinterpret_cast<uint4*>(out + at[half]) =
                        make_uint4(words[half][0], words[half][1], words[half][2], words[half][3]);
                }
            }
        }
    }
}

template <class Tile, class Element>
__device__ __forceinline__ void consume(const Stages<Tile>& stages, const SliceConvArgs& args, int group) {
    const SliceConvShape& shape = args.shape;
    const int tiles = static_cast<int>(tile_count(shape, Tile::kN, Tile::kRows));
    const int steps = shape.kernel_t * (shape.in_channels / kSlab) * Tile::kSpatial;
    const bool signals = threadIdx.x % 32 == 0;  // each warp releases what it has read
    Ring<Tile> ring;
    float sums[Tile::kM64][Tile::kN / 2] = {};
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        uint32_t previous = 0;  // the empty barrier of the stage before, which products may still read
        for (int step = 0; step < steps; ++step, ring.next()) {
            barrier_wait(stages.full(ring.stage), ring.parity);
            const uint64_t start = matrix_descriptor(stages.data(ring.stage));
#pragma unroll
            for (int m = 0; m < Tile::kM64; ++m) pin(sums[m]);
            mma_fence();
#pragma unroll
            for (int dy = 0; dy < Tile::kSpatial; ++dy) {
#pragma unroll
                for (int k = 0; k < kSlab / kMmaK; ++k) {
                    const uint64_t b = advance(start, weight_offset(Tile::kInputBytes, Tile::kTapBytes, dy, k));
#pragma unroll
                    for (int m = 0; m < Tile::kM64; ++m) {
                        const uint64_t a = advance(start, input_offset(Tile::kM64, group, m, dy, k));
                        mma<Element>(sums[m], a, b, dy == 0 && k == 0 ? step : 1);
                    }
                }
            }
            mma_commit();
            mma_wait<1>();
            if (step > 0 && signals) barrier_arrive(previous);
            previous = stages.empty(ring.stage);
        }
        mma_wait<0>();
#pragma unroll
        for (int m = 0; m < Tile::kM64; ++m) pin(sums[m]);
        if (signals) barrier_arrive(previous);
        const TileOrigin origin = tile_origin(shape, Tile::kN, Tile::kRows, tile);
        if (args.residual != nullptr) {
            write_tile<Tile, Element, true>(sums, args, origin, group);
        } else {
            write_tile<Tile, Element, false>(sums, args, origin, group);
        }
    }
}

template <class Tile, class Element>
__global__ void __launch_bounds__(kThreads, 1) slice_conv_kernel(
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
    const __grid_constant__ SliceConvArgs args) {
    extern __shared__ uint8_t shared[];
    const uint32_t start = shared_address(shared);
    const Stages<Tile> stages{(start + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Tile::kStages; ++stage) {
            barrier_init(stages.full(stage), 1);
            barrier_init(stages.empty(stage), kConsumers * 4);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<kProducerRegisters>();
        if (threadIdx.x == 0) produce<Tile>(stages, x, weight, args.shape);
    } else {
        take_registers<kConsumerRegisters>();
        consume<Tile, Element>(stages, args, __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0) - 1);
    }
}

template <int kN, int kM64, int kSpatial>
SliceConvVariant variant() {
    using Tile = SliceConvTile<kN, kM64, kSpatial>;
    return describe<Tile>(reinterpret_cast<const void*>(&slice_conv_kernel<Tile, __nv_bfloat16>),
                          reinterpret_cast<const void*>(&slice_conv_kernel<Tile, __half>));
}

}  // namespace

// Whole tiles have 192 accumulators a thread; half tiles fill the machine on small pictures.
const SliceConvVariant kSliceConvVariants[kVariants] = {
    variant<192, 2, 3>(), variant<96, 4, 3>(), variant<192, 1, 3>(), variant<96, 2, 3>(),
    variant<192, 2, 1>(), variant<96, 4, 1>(), variant<192, 1, 1>(), variant<96, 2, 1>(),
};

}  // namespace flashtalk
