// The slice convolution's shapes, tiles and index arithmetic.
//
// Plain C++ without CUDA headers: the kernel, its host side and a test that models the hardware on the
// CPU (csrc/tests/slice_conv_model.cpp) all compute with these functions.
//
// One block computes a patch of `kRows` x 8 output pixels of one frame and `kN` output channels, as
//   out[pixel, o] = sum over (dt, slab, dx, dy, c) of x[pixel + (dt, dy, dx), c] * w[o, dt, dy, dx, c].
// A stage of the pipeline holds the input of one (dt, slab of 32 channels, dx): the patch's rows and, for
// a 3x3 kernel, one row above and below, 8 pixels wide and shifted by dx; and the weights of its taps dy.
// Eight pixels of one row are the eight rows of a wgmma core matrix, so the tap dy only moves the start
// of the operand by whole core matrices: the input is loaded three times a 3x3 kernel, not nine.
#pragma once

#include <cstdint>

#include "include/quad.h"

namespace flashtalk {

constexpr int kSlab = 32;             // input channels a stage: 96, 192 and 384 are multiples
constexpr int kRowBytes = kSlab * 2;  // one pixel's (or output channel's) slab, one span of the 64-byte swizzle
constexpr int kPatchWidth = 8;        // pixels: the rows of a core matrix
constexpr int kGroupBytes = kPatchWidth * kRowBytes;  // a core matrix row group; the swizzle repeats after it
constexpr int kMmaK = 16;                             // input channels of one wgmma
constexpr int kMmaKBytes = kMmaK * 2;
constexpr int kConsumers = 2;         // warpgroups that multiply
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kOutputMultiple = 96;  // output channels of the narrowest tile
constexpr int kMaxSharedBytes = 232448;  // what an sm_90 block may have
constexpr int kSharedAlignment = 1024;   // asked for at run time: the start of shared memory promises only 16
constexpr int kMaxStages = 6;

struct SliceConvShape {
    int32_t frames_out, height, width, in_channels, out_channels, kernel_t;
};

// What the tensors hold.  Sums are fp32 for either.
enum Element { kBf16, kFp16, kElements };

// The kernel's parameters beside its two tensor maps.  NDHWC; `residual` may be null.
struct SliceConvArgs {
    SliceConvShape shape;
    const void* bias;
    const void* residual;
    void* out;
};

// kM64: products of 64 rows a warpgroup holds; kSpatial: the kernel's height and width, 1 or 3.
template <int kN_, int kM64_, int kSpatial_>
struct SliceConvTile {
    static constexpr int kN = kN_;
    static constexpr int kM64 = kM64_;
    static constexpr int kSpatial = kSpatial_;
    static constexpr int kRows = kConsumers * kM64 * 8;
    static constexpr int kBoxRows = kRows + kSpatial - 1;
    static constexpr int kInputBytes = kBoxRows * kGroupBytes;
    static constexpr int kTapBytes = kN * kRowBytes;
    static constexpr int kStageBytes = kInputBytes + kSpatial * kTapBytes;
    static constexpr int kFit = (kMaxSharedBytes - kSharedAlignment) / (kStageBytes + 16);
    static constexpr int kStages = kFit < kMaxStages ? kFit : kMaxStages;
    // Stages, then a full and an empty barrier for each.
    static constexpr int kSharedBytes = kSharedAlignment + kStages * (kStageBytes + 16);

    static_assert(kN % 32 == 0 && kN <= 256, "the epilogue writes 32 channels at a time, wgmma takes 256");
    static_assert(kSpatial == 1 || kSpatial == 3, "same padding of an odd kernel, unrolled");
    static_assert(kBoxRows <= 256 && kN <= 256, "a TMA box has at most 256 elements a side");
    static_assert(kTapBytes % kGroupBytes == 0, "each tap's weights start where the swizzle repeats");
    static_assert(kM64 * kN <= 384, "accumulators of a thread: kM64 * kN / 2 registers");
    static_assert(kStages >= 3, "a stage in use, one being released, one in flight");
};

// A position in the ring of stages, and the parity of its current round.
template <class Tile>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;

    FT_HOST_DEVICE void next() {
        if (++stage == Tile::kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

constexpr FT_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct TileOrigin {
    int o, w, h, t;  // the first output channel, column, row and frame
};

constexpr FT_HOST_DEVICE int64_t tile_count(const SliceConvShape& shape, int n, int rows) {
    return static_cast<int64_t>(ceil_div(shape.out_channels, n)) * ceil_div(shape.width, kPatchWidth) *
           ceil_div(shape.height, rows) * shape.frames_out;
}

// A compiled tile, for the host side to choose from.
struct SliceConvVariant {
    int n, spatial, rows, box_rows, shared_bytes;
    const void* kernels[kElements];  // (CUtensorMap x, CUtensorMap weight, SliceConvArgs)
};
constexpr int kVariants = 8;
extern const SliceConvVariant kSliceConvVariants[kVariants];  // kernels/slice_conv.cu; preferred ones first

template <class Tile>
constexpr SliceConvVariant describe(const void* bf16, const void* fp16) {
    return {Tile::kN, Tile::kSpatial, Tile::kRows, Tile::kBoxRows, Tile::kSharedBytes, {bf16, fp16}};
}

// A multiprocessor holds one block, so a variant takes its rounds of blocks times a tile's work.  A half
// tile reads a third to two thirds more for a product, for which it is charged an eighth: an estimate,
// which keeps it to pictures that are too small for the machine.  Null if no variant fits.
constexpr const SliceConvVariant* choose(
    const SliceConvVariant (&variants)[kVariants], const SliceConvShape& shape, int spatial, int multiprocessors) {
    const SliceConvVariant* best = nullptr;
    int64_t best_cost = 0;
    for (const SliceConvVariant& variant : variants) {
        if (variant.spatial != spatial || shape.out_channels % variant.n != 0) continue;
        const int64_t tiles = tile_count(shape, variant.n, variant.rows);
        const int64_t work = int64_t{variant.n} * variant.rows;
        const bool whole = variant.n * variant.rows == 192 * 32;
        const int64_t cost = (tiles + multiprocessors - 1) / multiprocessors * work * (whole ? 8 : 9);
        if (best == nullptr || cost < best_cost) {
            best = &variant;
            best_cost = cost;
        }
    }
    return best;
}

// Output channels change fastest: neighbouring blocks then read the same input, through the L2 cache.
constexpr FT_HOST_DEVICE TileOrigin tile_origin(const SliceConvShape& shape, int n, int rows, int tile) {
    const int across_o = ceil_div(shape.out_channels, n);
    const int across_w = ceil_div(shape.width, kPatchWidth);
    const int across_h = ceil_div(shape.height, rows);
    const int o = tile % across_o;
    const int w = tile / across_o % across_w;
    const int h = tile / across_o / across_w % across_h;
    const int t = tile / across_o / across_w / across_h;
    return {o * n, w * kPatchWidth, h * rows, t};
}

// Box corner in x [T, H, W, C], innermost first.  Corners may be negative or past the end: TMA fills what
// lies outside with zeros, which is the spatial padding.  In time the input carries its own past.
struct InputBox {
    int c, w, h, t;
};

constexpr FT_HOST_DEVICE InputBox input_box(const TileOrigin& origin, int spatial, int dt, int slab, int dx) {
    const int padding = spatial / 2;
    return {slab * kSlab, origin.w + dx - padding, origin.h - padding, origin.t + dt};
}

// Where a warpgroup's 64-row product `m` of tap dy and channels 16 k.. starts in a stage.
constexpr FT_HOST_DEVICE int input_offset(int m64, int group, int m, int dy, int k) {
    return ((group * m64 + m) * 8 + dy) * kGroupBytes + k * kMmaKBytes;
}

constexpr FT_HOST_DEVICE int weight_offset(int input_bytes, int tap_bytes, int dy, int k) {
    return input_bytes + dy * tap_bytes + k * kMmaKBytes;
}

// wgmma's shared-memory matrix descriptor (PTX ISA, "matrix descriptor"): K-major, 64-byte swizzle.
// Bits 0-13 the start, 16-29 the leading offset (not used by a swizzled K-major operand of one span), 32-45
// the pitch of eight-row groups, 49-51 the base offset (0: the pattern starts at multiples of 512), 62-63
// the swizzle (2: 64 bytes).  Addresses and offsets are in units of 16 bytes.
constexpr FT_HOST_DEVICE uint64_t matrix_descriptor(uint32_t shared_address) {
    return static_cast<uint64_t>((shared_address & 0x3FFFF) >> 4) | static_cast<uint64_t>(1) << 16 |
           static_cast<uint64_t>(kGroupBytes >> 4) << 32 | static_cast<uint64_t>(2) << 62;
}

// Of the low word alone: the start cannot carry out of its bits, and a 64-bit sum would cost registers.
constexpr FT_HOST_DEVICE uint64_t advance(uint64_t descriptor, int bytes) {
    return descriptor >> 32 << 32 | (static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(bytes >> 4));
}

// The accumulators of m64nNk16: a thread holds, of each block of 8 columns, two neighbouring columns of two
// rows, in registers 4 block + 2 half + column.  Rows are pixels: eight in a row of the picture.
struct Pixel {
    int h, w;  // relative to the tile's origin
};

constexpr FT_HOST_DEVICE Pixel fragment_pixel(int m64, int group, int m, int warp, int lane, int half) {
    const int row = warp * 16 + half * 8 + lane / 4;
    return {(group * m64 + m) * 8 + row / kPatchWidth, row % kPatchWidth};
}

}  // namespace flashtalk
