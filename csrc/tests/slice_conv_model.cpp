// A model of the slice convolution on the CPU: TMA, wgmma and mbarrier as the PTX ISA describes them, driven
// by the kernel's own index arithmetic, against the plain sum.  Prints a line and returns 1 at a difference.
// Elements are bf16: to that arithmetic an fp16 is the same two bytes.
#include "include/slice_conv.h"

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"

using namespace flashtalk;

namespace {

uint16_t to_bf16(float value) {  // exact: the model's numbers are small integers
    uint32_t word;
    std::memcpy(&word, &value, 4);
    CHECK((word & 0xFFFF) == 0, "%f is no bf16", value);
    return static_cast<uint16_t>(word >> 16);
}

// CU_TENSOR_MAP_SWIZZLE_64B and wgmma's mode 2: bits 4-5 of a shared address are XORed with bits 7-8.
uint32_t swizzle_64(uint32_t address) { return address ^ ((address >> 7 & 3) << 4); }

using Shared = std::vector<uint8_t>;

// A bulk tensor copy of one box, zeros where it lies outside; sizes, box and corner innermost first.
template <size_t kRank>
int load_box(Shared& shared, uint32_t to, const std::vector<uint16_t>& data, const std::array<int, kRank>& sizes,
             const std::array<int, kRank>& box, const std::array<int, kRank>& corner) {
    CHECK(to % 128 == 0, "TMA destination %u", to);
    CHECK(box[0] * 2 == 64, "the row of a 64-byte swizzle is %d bytes", box[0] * 2);
    int count = 1;
    for (int side : box) {
        CHECK(side <= 256, "a box side of %d", side);
        count *= side;
    }
    for (int i = 0; i < count; ++i) {
        int64_t at = 0, stride = 1;
        bool inside = true;
        for (size_t d = 0, rest = static_cast<size_t>(i); d < kRank; ++d) {
            const int coordinate = corner[d] + static_cast<int>(rest % static_cast<size_t>(box[d]));
            rest /= static_cast<size_t>(box[d]);
            inside = inside && coordinate >= 0 && coordinate < sizes[d];
            at += coordinate * stride;
            stride *= sizes[d];
        }
        const uint16_t value = inside ? data[static_cast<size_t>(at)] : 0;
        std::memcpy(&shared[swizzle_64(to + static_cast<uint32_t>(i) * 2)], &value, 2);
    }
    return count * 2;
}

// Element (row, k) of a K-major wgmma operand.
float operand(const Shared& shared, uint64_t descriptor, int row, int k) {
    CHECK(descriptor >> 62 == 2, "swizzle mode %d", static_cast<int>(descriptor >> 62));
    CHECK((descriptor >> 49 & 7) == 0, "base offset");
    const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
    const auto pitch = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
    const uint32_t address = start + static_cast<uint32_t>(row / 8) * pitch +
                             static_cast<uint32_t>(row % 8 * 64 + k * 2);
    uint16_t value;
    std::memcpy(&value, &shared[swizzle_64(address)], 2);
    return to_float(value);
}

// d [64, n] += a b^T.  registers[thread][4 block + 2 half + column] as the PTX ISA lays them out.
template <int kN>
void mma(std::vector<std::array<float, kN / 2>>& registers, const Shared& shared, uint64_t a, uint64_t b,
         bool accumulate) {
    std::array<std::array<float, kMmaK>, kN> columns;
    for (int n = 0; n < kN; ++n)
        for (int k = 0; k < kMmaK; ++k) columns[n][k] = operand(shared, b, n, k);
    for (int row = 0; row < 64; ++row) {
        std::array<float, kMmaK> values;
        for (int k = 0; k < kMmaK; ++k) values[k] = operand(shared, a, row, k);
        for (int n = 0; n < kN; ++n) {
            float sum = 0;
            for (int k = 0; k < kMmaK; ++k) sum += values[k] * columns[n][k];
            const int thread = row / 16 * 32 + row % 8 * 4 + n % 8 / 2;
            float& d = registers[static_cast<size_t>(thread)][n / 8 * 4 + row / 8 % 2 * 2 + n % 2];
            d = accumulate ? d + sum : sum;
        }
    }
}

void transpose_quad(std::array<std::array<uint32_t, 4>, 4>& lanes) {
    for (int bit = 1; bit <= 2; bit *= 2) {
        const auto before = lanes;
        for (int lane = 0; lane < 4; ++lane) {
            uint32_t other[4], mine[4];
            std::memcpy(other, before[lane ^ bit].data(), 16);
            std::memcpy(mine, before[lane].data(), 16);
            quad_receive(mine, lane, bit, quad_send(other, lane ^ bit, bit, 0), quad_send(other, lane ^ bit, bit, 1));
            std::memcpy(lanes[lane].data(), mine, 16);
        }
    }
}

template <class Tile>
void convolve(const SliceConvShape& shape, std::mt19937& random) {
    constexpr int kN = Tile::kN, kSpatial = Tile::kSpatial;
    const int frames = shape.frames_out + shape.kernel_t - 1, c_in = shape.in_channels, o_out = shape.out_channels;
    const auto draw = [&](int64_t count) {
        std::vector<uint16_t> values(static_cast<size_t>(count));
        for (uint16_t& value : values) value = to_bf16(static_cast<float>(static_cast<int>(random() % 3) - 1));
        return values;
    };
    const auto x = draw(int64_t{frames} * shape.height * shape.width * c_in);
    const auto weight = draw(int64_t{o_out} * shape.kernel_t * kSpatial * kSpatial * c_in);
    std::vector<float> out(static_cast<size_t>(shape.frames_out) * shape.height * shape.width * o_out);
    std::vector<int> writes(out.size());

    const auto tiles = static_cast<int>(tile_count(shape, kN, Tile::kRows));
    Shared shared(Tile::kSharedBytes);
    int used = 0;  // stages, so that each one's addresses are tried
    for (int tile = 0; tile < tiles; ++tile) {
        const TileOrigin origin = tile_origin(shape, kN, Tile::kRows, tile);
        std::vector<std::vector<std::array<float, kN / 2>>> sums(
            kConsumers * Tile::kM64, std::vector<std::array<float, kN / 2>>(128));
        int step = 0;
        for (int dt = 0; dt < shape.kernel_t; ++dt)
            for (int slab = 0; slab < c_in / kSlab; ++slab)
                for (int dx = 0; dx < kSpatial; ++dx, ++step, ++used) {
                    const auto stage =
                        static_cast<uint32_t>(kSharedAlignment + used % Tile::kStages * Tile::kStageBytes);
                    const InputBox box = input_box(origin, kSpatial, dt, slab, dx);
                    int bytes = load_box<4>(shared, stage, x, {c_in, shape.width, shape.height, frames},
                                            {kSlab, kPatchWidth, Tile::kBoxRows, 1}, {box.c, box.w, box.h, box.t});
                    for (int dy = 0; dy < kSpatial; ++dy) {
                        const int offset = weight_offset(Tile::kInputBytes, Tile::kTapBytes, dy, 0);
                        bytes += load_box<5>(shared, stage + static_cast<uint32_t>(offset), weight,
                                             {c_in, kSpatial, kSpatial, shape.kernel_t, o_out}, {kSlab, 1, 1, 1, kN},
                                             {box.c, dx, dy, dt, origin.o});
                    }
                    CHECK(bytes == Tile::kStageBytes, "%d bytes in a stage of %d", bytes, Tile::kStageBytes);
                    const uint64_t start = matrix_descriptor(stage);
                    for (int group = 0; group < kConsumers; ++group)
                        for (int dy = 0; dy < kSpatial; ++dy)
                            for (int k = 0; k < kSlab / kMmaK; ++k)
                                for (int m = 0; m < Tile::kM64; ++m)
                                    mma<kN>(sums[static_cast<size_t>(group * Tile::kM64 + m)], shared,
                                            advance(start, input_offset(Tile::kM64, group, m, dy, k)),
                                            advance(start, weight_offset(Tile::kInputBytes, Tile::kTapBytes, dy, k)),
                                            step > 0 || dy > 0 || k > 0);
                }
        // The epilogue's way: pairs of columns, exchanged among four lanes into 8 columns of one block.
        for (int group = 0; group < kConsumers; ++group)
            for (int m = 0; m < Tile::kM64; ++m)
                for (int half = 0; half < 2; ++half)
                    for (int quads = 0; quads < 32; ++quads)
                        for (int first = 0; first < kN; first += 32) {
                            std::array<std::array<uint32_t, 4>, 4> lanes;
                            for (int q = 0; q < 4; ++q)
                                for (int i = 0; i < 4; ++i) {
                                    const auto& held = sums[static_cast<size_t>(group * Tile::kM64 + m)]
                                                           [static_cast<size_t>(quads * 4 + q)];
                                    const int at = (first / 8 + i) * 4 + half * 2;
                                    lanes[q][i] =
                                        static_cast<uint32_t>(to_bf16(held[at + 1])) << 16 | to_bf16(held[at]);
                                }
                            const auto before = lanes;
                            transpose_quad(lanes);
                            for (int q = 0; q < 4; ++q) {
                                const int thread = quads * 4 + q;
                                const Pixel pixel =
                                    fragment_pixel(Tile::kM64, group, m, thread / 32, thread % 32, half);
                                const int h = origin.h + pixel.h, w = origin.w + pixel.w;
                                if (h >= shape.height || w >= shape.width) continue;
                                for (int i = 0; i < 8; ++i) {
                                    const int64_t row = (int64_t{origin.t} * shape.height + h) * shape.width + w;
                                    const auto at = static_cast<size_t>(row * o_out + origin.o + first + q * 8 + i);
                                    out[at] = to_float(static_cast<uint16_t>(lanes[q][i / 2] >> i % 2 * 16));
                                    ++writes[at];
                                }
                            }
                            transpose_quad(lanes);
                            CHECK(lanes == before, "the exchange is not its own inverse");
                        }
    }

    const int padding = kSpatial / 2;
    size_t at = 0;
    for (int t = 0; t < shape.frames_out; ++t)
        for (int h = 0; h < shape.height; ++h)
            for (int w = 0; w < shape.width; ++w)
                for (int o = 0; o < o_out; ++o, ++at) {
                    float sum = 0;
                    for (int dt = 0; dt < shape.kernel_t; ++dt)
                        for (int dy = 0; dy < kSpatial; ++dy)
                            for (int dx = 0; dx < kSpatial; ++dx) {
                                const int ih = h + dy - padding, iw = w + dx - padding;
                                if (ih < 0 || ih >= shape.height || iw < 0 || iw >= shape.width) continue;
                                const uint16_t* a =
                                    &x[static_cast<size_t>((((t + dt) * shape.height + ih) * shape.width + iw) * c_in)];
                                const uint16_t* b = &weight[static_cast<size_t>(
                                    (((o * shape.kernel_t + dt) * kSpatial + dy) * kSpatial + dx) * c_in)];
                                for (int c = 0; c < c_in; ++c) sum += to_float(a[c]) * to_float(b[c]);
                            }
                    CHECK(writes[at] == 1, "out[%d, %d, %d, %d] was written %d times", t, h, w, o, writes[at]);
                    CHECK(out[at] == sum, "out[%d, %d, %d, %d] is %f, not %f", t, h, w, o, out[at], sum);
                }
}

// The kernel's order of waits and arrivals, its threads in random order: nobody may hang, read a stage before
// it is filled or have it overwritten while products may read it.
template <class Tile>
void pipeline(int tiles, int steps, std::mt19937& random) {
    constexpr int kWarps = kConsumers * 4;
    std::vector<Barrier> full(Tile::kStages, Barrier(1)), empty(Tile::kStages, Barrier(kWarps));
    std::vector<int> holds(Tile::kStages, -1), readers(Tile::kStages, 0);
    struct Warp {
        Ring<Tile> ring;
        int step = 0, previous = -1;
    };
    std::vector<Warp> warps(kWarps);
    Ring<Tile> producer;
    int produced = 0, idle = 0;
    const int total = tiles * steps;
    while (true) {
        bool moved = false, finished = produced == total;
        const auto who = random() % (kWarps + 1);
        if (who == kWarps) {
            if (produced < total && empty[static_cast<size_t>(producer.stage)].passed(producer.parity ^ 1)) {
                const auto stage = static_cast<size_t>(producer.stage);
                CHECK(readers[stage] == 0, "stage %d is overwritten while it is read", producer.stage);
                holds[stage] = produced++;
                full[stage].arrive();  // and its bytes
                producer.next();
                moved = true;
            }
        } else if (Warp& warp = warps[who]; warp.step < total) {
            const auto stage = static_cast<size_t>(warp.ring.stage);
            if (full[stage].passed(warp.ring.parity)) {
                CHECK(holds[stage] == warp.step, "step %d reads the stage of step %d", warp.step, holds[stage]);
                ++readers[stage];
                const auto release = [&](int previous) {
                    --readers[static_cast<size_t>(previous)];
                    empty[static_cast<size_t>(previous)].arrive();
                };
                if (warp.step % steps > 0) release(warp.previous);
                warp.previous = warp.ring.stage;
                if (++warp.step % steps == 0) release(warp.previous);
                warp.ring.next();
                moved = true;
            }
        }
        for (const Warp& warp : warps) finished = finished && warp.step == total;
        if (finished) return;
        idle = moved ? 0 : idle + 1;
        CHECK(idle < 100000, "the pipeline hangs: %d of %d stages were filled", produced, total);
    }
}

template <int kN, int kM64, int kSpatial>
void variant(std::mt19937& random) {
    using Tile = SliceConvTile<kN, kM64, kSpatial>;
    static_assert(Tile::kSharedBytes <= kMaxSharedBytes);
    // A whole tile and a ragged one each way; two slabs and two tiles of output channels; two frames.
    convolve<Tile>({2, Tile::kRows + 3, 11, 2 * kSlab, 2 * kN, 3}, random);
    convolve<Tile>({1, 1, 1, kSlab, kN, 1}, random);  // less than a box
    pipeline<Tile>(4, Tile::kStages + 1, random);
    pipeline<Tile>(7, 1, random);
    std::printf("%d %d %d: %d stages of %d bytes, %d of shared memory\n", kN, kM64, kSpatial, Tile::kStages,
                Tile::kStageBytes, Tile::kSharedBytes);
}

// Whole tiles where they fill an H100, half ones where the picture is small.
void choices() {
    const SliceConvVariant variants[kVariants] = {
        describe<SliceConvTile<192, 2, 3>>(nullptr, nullptr), describe<SliceConvTile<96, 4, 3>>(nullptr, nullptr),
        describe<SliceConvTile<192, 1, 3>>(nullptr, nullptr), describe<SliceConvTile<96, 2, 3>>(nullptr, nullptr),
        describe<SliceConvTile<192, 2, 1>>(nullptr, nullptr), describe<SliceConvTile<96, 4, 1>>(nullptr, nullptr),
        describe<SliceConvTile<192, 1, 1>>(nullptr, nullptr), describe<SliceConvTile<96, 2, 1>>(nullptr, nullptr),
    };
    const auto check = [&](const SliceConvShape& shape, int spatial, int n, int rows) {
        const SliceConvVariant* found = choose(variants, shape, spatial, 132);
        CHECK(found != nullptr && found->n == n && found->rows == rows, "%d x %d to %d channels: a tile of %d x %d",
              shape.height, shape.width, shape.out_channels, found->rows, found->n);
    };
    // The decoder's levels, the last first.
    check({4, 768, 448, 96, 96, 3}, 3, 96, 64);
    check({4, 384, 224, 192, 192, 3}, 3, 192, 32);
    check({2, 192, 112, 384, 384, 3}, 3, 192, 32);
    check({1, 96, 56, 384, 384, 3}, 3, 192, 16);
    for (const int spatial : {1, 3}) {
        // What the tests on a GPU call, to run every variant.
        check({1, 250, 250, 96, 96, 3}, spatial, 96, 64);
        check({1, 125, 250, 96, 192, 3}, spatial, 192, 32);
        check({1, 65, 17, 96, 96, 3}, spatial, 96, 32);
        check({1, 65, 17, 96, 192, 3}, spatial, 192, 16);
        // What the sanitizers see (tests/conv_inputs.py): with more tiles than there are blocks.
        const struct {
            SliceConvShape shape;
            int n, rows;
        } many[] = {
            {{2, 260, 192, 64, 96, 3}, 96, 64},
            {{1, 260, 192, 64, 192, 3}, 192, 32},
            {{4, 70, 130, 64, 96, 3}, 96, 32},
            {{4, 33, 130, 64, 192, 3}, 192, 16},
        };
        for (const auto& [shape, n, rows] : many) {
            check(shape, spatial, n, rows);
            CHECK(tile_count(shape, n, rows) > 132, "a block has but one tile of %d x %d", rows, n);
        }
    }
    CHECK(choose(variants, {1, 9, 9, 32, 100, 1}, 1, 132) == nullptr, "100 channels were accepted");
}

}  // namespace

int main() {
    choices();
    std::mt19937 random(1);
    variant<192, 2, 3>(random);
    variant<96, 4, 3>(random);
    variant<192, 1, 3>(random);
    variant<96, 2, 3>(random);
    variant<192, 2, 1>(random);
    variant<96, 4, 1>(random);
    variant<192, 1, 1>(random);
    variant<96, 2, 1>(random);
    return 0;
}
