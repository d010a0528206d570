// A model of eight-bit attention's operands on the CPU: boxes of TMA with the 128- and the 32-byte swizzle, and
// wgmma's operands as the PTX ISA lays them out, addressed by the kernel's own functions.  Every byte counts as
// an integer, so sums are exact.  Prints a line and returns 1 at a difference.
#include "include/quantized_attention.h"

#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "check.h"

namespace flashtalk::attention::quantized {
namespace {

using Bytes = std::vector<int8_t>;

// CU_TENSOR_MAP_SWIZZLE_128B and _32B, and wgmma's modes 1 and 3: bits 4-6 of an address XORed with bits 7-9, or
// bit 4 with bit 7.
uint32_t swizzled(uint32_t address, int mode) {
    return mode == 1 ? address ^ ((address >> 7 & 7) << 4) : address ^ ((address >> 7 & 1) << 4);
}

// A box of `rows` rows of `columns` bytes, the span of its swizzle, from rows of `pitch`; zeros past the end.
void load_box(Bytes& shared, uint32_t to, const Bytes& from, int rows, int columns, int pitch, int first_row,
              int first_column, int all_rows, int all_columns) {
    CHECK(to % 1024 == 0 || (columns == 32 && to % 256 == 0), "the swizzle does not start at %u", to);
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; ++c) {
            const int row = first_row + r, column = first_column + c;
            const bool inside = row < all_rows && column < all_columns;
            const auto at = to + static_cast<uint32_t>(r * columns + c);
            shared[swizzled(at, columns == 128 ? 1 : 3)] = inside ? from[static_cast<size_t>(row * pitch + column)] : 0;
        }
}

// Element (mn, k) of an operand in shared memory, K-major.
int operand(const Bytes& shared, uint64_t descriptor, int mn, int k) {
    const int mode = static_cast<int>(descriptor >> 62);
    const int span = mode == 1 ? 128 : 32;
    const auto start = static_cast<int>(descriptor & 0x3FFF) << 4, stride = static_cast<int>(descriptor >> 32 & 0x3FFF) << 4;
    CHECK(mode == 1 || mode == 3, "swizzle mode %d", mode);
    return shared[swizzled(static_cast<uint32_t>(start + mn / 8 * stride + mn % 8 * span + k), mode)];
}

// Element (row, k) of the A operand in registers: words [thread][4 step + w], four bytes each.
int register_operand(const std::vector<std::vector<int8_t>>& words, int row, int step, int k) {
    const int warp = row / 16, half = row % 16 / 8, lane = row % 8 * 4 + k % 16 / 4;
    const int word = 4 * step + k / 16 * 2 + half;
    return words[static_cast<size_t>(warp * 32 + lane)][static_cast<size_t>(word * 4 + k % 4)];
}

int8_t weight_of(int score) { return static_cast<int8_t>((score % 15 + 15) % 15 - 7); }

void tile(int length, int keys, std::mt19937& random) {
    std::uniform_int_distribution<int> byte(-127, 127);
    const int padded = ceil_div(keys, kMmaK) * kMmaK;
    Bytes q(static_cast<size_t>(length * kDim)), k(static_cast<size_t>(keys * kDim)), v(static_cast<size_t>(kDim * padded));
    for (auto* bytes : {&q, &k, &v})
        for (int8_t& value : *bytes) value = static_cast<int8_t>(byte(random));

    Bytes shared(static_cast<size_t>(Tile::kSharedBytes));
    const Memory<Tile> memory{kSharedAlignment};
    CHECK(memory.spare() + 16 <= static_cast<uint32_t>(Tile::kSharedBytes), "no room for the spare word");
    load_box(shared, memory.data(0), q, Tile::kQueries, kDim, kDim, 0, 0, length, kDim);
    load_box(shared, memory.data(1), k, Tile::kKeys, kDim, kDim, 0, 0, keys, kDim);
    for (int span = 0; span < Tile::kSpans; ++span)
        load_box(shared, memory.data(1 + kStages) + static_cast<uint32_t>(span * kSpanBytes), v, kDim, kMmaK, padded, 0,
                 span * kMmaK, kDim, padded);

    for (int group = 0; group < Tile::kConsumers; ++group) {
        const uint64_t rows = descriptor(memory.data(0) + static_cast<uint32_t>(group * kMmaRows * kRowBytes), 16);
        const uint64_t columns = descriptor(memory.data(1), 16), values = value_descriptor(memory.data(1 + kStages));
        // The accumulators, and what they become in their threads.
        std::vector<std::vector<int8_t>> words(128, std::vector<int8_t>(Tile::kKeys / 2));
        std::vector<int> scores(kMmaRows * Tile::kKeys);
        for (int thread = 0; thread < 128; ++thread) {
            const int warp = thread / 32, lane = thread % 32;
            std::vector<int> x(Tile::kKeys / 2);
            for (int i = 0; i < Tile::kKeys / 2; ++i) {
                const int row = fragment_row(warp, lane, fragment_half(i)), column = fragment_column(lane, i);
                for (int step = 0; step < kDim / kMmaK; ++step)
                    for (int c = 0; c < kMmaK; ++c)
                        x[static_cast<size_t>(i)] += operand(shared, advance(rows, step * kMmaK), row, c) *
                                                     operand(shared, advance(columns, step * kMmaK), column, c);
                scores[static_cast<size_t>(row * Tile::kKeys + column)] = x[static_cast<size_t>(i)];
            }
            for (int i = 0; i < Tile::kKeys / 8; ++i) {
                const int at = word_register(i);
                const int packed[] = {at, at + 1, at + 4, at + 5};
                for (int b = 0; b < 4; ++b)
                    words[static_cast<size_t>(thread)][static_cast<size_t>(i * 4 + b)] = weight_of(x[static_cast<size_t>(packed[b])]);
            }
        }
        for (int row = 0; row < kMmaRows; ++row) {
            const int query = group * kMmaRows + row;
            for (int key = 0; key < Tile::kKeys; ++key) {
                int expected = 0;
                for (int c = 0; c < kDim && query < length && key < keys; ++c)
                    expected += q[static_cast<size_t>(query * kDim + c)] * k[static_cast<size_t>(key * kDim + c)];
                CHECK(scores[static_cast<size_t>(row * Tile::kKeys + key)] == expected, "score of query %d, key %d", query, key);
            }
            for (int d = 0; d < kDim; ++d) {
                int sum = 0, expected = 0;
                for (int step = 0; step < Tile::kSpans; ++step)
                    for (int p = 0; p < kMmaK; ++p) {
                        const int value = operand(shared, advance(values, step * kSpanBytes), d, p);
                        sum += register_operand(words, row, step, p) * value;
                        const int key = step * kMmaK + position_key(p), at = step * kMmaK + p;
                        const int lies = at < padded ? v[static_cast<size_t>(d * padded + at)] : 0;
                        expected += weight_of(scores[static_cast<size_t>(row * Tile::kKeys + key)]) * lies;
                    }
                CHECK(sum == expected, "sum of query %d, column %d", query, d);
            }
        }
    }
}

void order() {
    bool seen[kMmaK] = {};
    for (int p = 0; p < kMmaK; ++p) seen[position_key(p)] = true;
    for (int key = 0; key < kMmaK; ++key) CHECK(seen[key], "key %d lies nowhere", key);
}

}  // namespace
}  // namespace flashtalk::attention::quantized

int main() {
    using namespace flashtalk::attention::quantized;
    std::mt19937 random(0);
    order();
    tile(Tile::kQueries, Tile::kKeys, random);
    tile(Tile::kQueries - 70, 37, random);
    std::printf("%d bytes of shared memory\n", Tile::kSharedBytes);
    return 0;
}
