// A model of cross-attention on the CPU: the hardware of attention_model.h, driven by the kernel's own index
// arithmetic, against the plain sums.  Prints a line and returns 1 at a difference.
#include "include/cross_attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "attention_model.h"

using namespace flashtalk::attention;
using namespace flashtalk::attention::cross;

namespace {

constexpr float kScale = 0.08838834764831845f;

struct Inputs {
    Shape shape;
    int visible;  // text keys; the others are NaN
    Array q, text_k, text_v, image_k, image_v;
    std::vector<float> bias;

    Inputs(const Shape& shape, int visible, std::mt19937& random) : shape(shape), visible(visible) {
        std::normal_distribution<float> normal;
        const auto draw = [&](int rows, int shown) {
            const int pitch = shape.heads * kDim;
            Array x{shape.batch, rows, shape.heads, {rows * pitch, pitch, kDim}, {}};
            x.data.resize(static_cast<size_t>(shape.batch * rows * pitch));
            for (size_t i = 0; i < x.data.size(); ++i) {
                const bool hidden = static_cast<int>(i) / pitch % rows >= shown;
                x.data[i] = hidden ? 0x7FC0 : to_bf16(normal(random));
            }
            return x;
        };
        q = draw(shape.length, shape.length);
        text_k = draw(shape.text, visible);
        text_v = draw(shape.text, visible);
        image_k = draw(shape.image, shape.image);
        image_v = draw(shape.image, shape.image);
        for (int t = 0; t < shape.text; ++t) bias.push_back(t < visible ? normal(random) : -INFINITY);
    }
};

// The boxes of a segment's keys (or values), as `produce` loads them, and the zeros of `scrub`.
void load(Shared& shared, uint32_t to, const Inputs& in, const Array& image, const Array& text, const Segment& segment,
          bool scrubbed) {
    int bytes = 0;
    for (int half = 0; half < kHalves; ++half) {
        const uint32_t at = to + static_cast<uint32_t>(half * kHalfBytes);
        const auto box = [&](int row, const Array& from, int rows, int first) {
            bytes += load_box(shared, at + static_cast<uint32_t>(row * kRowBytes), from, rows, half * kHalf,
                              segment.head, first, segment.batch);
        };
        box(0, image, kImage, 0);
        box(kImage, image, kTail, kImage);
        box(kImage + kTail, text, kText, 0);
        for (int row = in.visible; scrubbed && row < kText; ++row)
            for (int i = 0; i < kRowBytes; ++i)
                shared[at + static_cast<uint32_t>((kImage + kTail + row) * kRowBytes + i)] = 0;
    }
    CHECK(bytes == kTileBytes, "%d bytes in a slot of %d", bytes, kTileBytes);
}

template <int kN>
void scores_of(Registers<kN / 2>& scores, const Shared& shared, uint64_t q, uint64_t k) {
    for (int step = 0; step < kDim / kMmaK; ++step) {
        const uint64_t a = advance(q, column_step(kQueryHalfBytes, step));
        std::array<std::array<float, kMmaK>, 64> left;
        for (int row = 0; row < 64; ++row)
            for (int c = 0; c < kMmaK; ++c) left[row][c] = operand(shared, a, row, c, true);
        mma<kN>(scores, left, shared, advance(k, column_step(kHalfBytes, step)), true, step > 0);
    }
}

template <int kCount>
void add_values(Registers<kDim / 2>& sums, const Registers<kCount>& weights, const Shared& shared, uint64_t v) {
    for (int step = 0; step < kCount / 8; ++step) {
        std::vector<std::array<uint32_t, 4>> words(128);
        for (size_t t = 0; t < 128; ++t)
            for (int i = 0; i < 4; ++i) {
                const float* pair = &weights[t][step * 8 + i * 2];
                words[t][i] = static_cast<uint32_t>(to_bf16(pair[1])) << 16 | to_bf16(pair[0]);
            }
        mma<kDim>(sums, from_registers(words), shared, advance(v, key_step(step)), false, true);
    }
}

// One tile of queries; `out` [64, 128], in the order of rows and columns.
void compute(const Inputs& in, const Shared& shared, const Memory& memory, int slot, std::vector<float>& out) {
    Registers<kFirst / 2> a(128);
    Registers<kSecond / 2> b(128);
    const uint64_t q = descriptor(memory.data(slot), 16), k = descriptor(memory.data(0), 16);
    scores_of<kFirst>(a, shared, q, k);
    scores_of<kSecond>(b, shared, q, advance(k, kFirst * kRowBytes));
    for (int row = 0; row < kMmaRows; ++row) {
        float image_top = -INFINITY, text_top = -INFINITY, image_total = 0, text_total = 0;
        // Every score of the row: its register and whether it is the text's.
        const auto each = [&](auto&& visit) {
            for (int t = 0; t < 128; ++t) {
                const auto thread = static_cast<size_t>(t);
                for (int half = 0; half < 2; ++half) {
                    if (fragment_row(t / 32, t % 32, half) != row) continue;
                    for (int i = 0; i < kFirst / 2; ++i)
                        if (fragment_half(i) == half) visit(a[thread][i], false);
                    for (int i = 0; i < kSecond / 2; ++i)
                        if (fragment_half(i) == half) visit(b[thread][i], i >= kTextColumn / 2);
                }
            }
        };
        for (int t = 0; t < 128; ++t)
            for (int i = kTailColumn / 2; i < kSecond / 2; ++i) {
                if (fragment_row(t / 32, t % 32, fragment_half(i)) != row) continue;
                float& score = b[static_cast<size_t>(t)][i];
                const int column = fragment_column(t % 32, i);
                if (column < kTextColumn) {
                    if (column - kTailColumn + kImage >= in.shape.image) score = -INFINITY;
                } else {
                    const int key = column - kTextColumn;
                    score = key >= in.visible ? -INFINITY : score + in.bias[static_cast<size_t>(key)] / kScale;
                }
            }
        each([&](float score, bool text) {
            float& top = text ? text_top : image_top;
            top = std::max(top, score);
        });
        each([&](float& score, bool text) {
            score = std::exp((score - (text ? text_top : image_top)) * kScale);
            (text ? text_total : image_total) += score;
        });
        each([&](float& score, bool text) { score *= text ? image_total / text_total : 1.0f; });
        for (int c = 0; c < kDim; ++c) out[static_cast<size_t>(row * kDim + c)] = image_total;
    }
    Registers<kDim / 2> sums(128);
    const uint64_t v = descriptor(memory.data(1), kHalfBytes);
    add_values<kFirst / 2>(sums, a, shared, v);
    add_values<kSecond / 2>(sums, b, shared, advance(v, key_step(kFirst / kMmaK)));
    for (int t = 0; t < 128; ++t)
        for (int i = 0; i < kDim / 2; ++i) {
            float& to = out[static_cast<size_t>(fragment_row(t / 32, t % 32, fragment_half(i)) * kDim +
                                                fragment_column(t % 32, i))];
            to = sums[static_cast<size_t>(t)][i] / to;
        }
}

double softmax_sum(const Array& q, const Array& k, const Array& v, const std::vector<float>& bias, int keys, int b, int i,
                   int h, int c) {
    double whole = 0, sum = 0;
    for (int j = 0; j < keys; ++j) {
        double score = 0;
        for (int d = 0; d < kDim; ++d)
            score += static_cast<double>(to_float(q.data[q.at(b, i, h, d)])) * to_float(k.data[k.at(b, j, h, d)]);
        const double weight = std::exp(score * kScale + (bias.empty() ? 0.0 : bias[static_cast<size_t>(j)]));
        whole += weight;
        sum += weight * to_float(v.data[v.at(b, j, h, c)]);
    }
    return sum / whole;
}

void attend(const Shape& shape, int visible, int blocks, std::mt19937& random) {
    const Inputs in(shape, visible, random);
    Shared shared(kSharedBytes);
    const Memory memory{kSharedAlignment};
    CHECK(memory.open() + 8 <= kSharedBytes, "shared memory ends before the open barrier");
    std::vector<int> computed(static_cast<size_t>(tile_count(shape)));
    for (int block = 0; block < blocks; ++block) {
        const int first = first_tile(shape, block, blocks), end = first_tile(shape, block + 1, blocks);
        for (int begin = first; begin < end;) {
            const Segment segment = segment_from(shape, begin, end);
            CHECK(segment.begin == begin && segment.end > begin && segment.end <= end, "segment");
            load(shared, memory.data(0), in, in.image_k, in.text_k, segment, false);
            load(shared, memory.data(1), in, in.image_v, in.text_v, segment, true);
            const int head_begin = (segment.batch * shape.heads + segment.head) * head_tiles(shape);
            for (int group = 0; group < kConsumers; ++group) {
                QueryRing ring{group};
                for (int tile = own_tile(segment, first, group); tile < segment.end; tile += kConsumers, ring.next()) {
                    CHECK((tile - first) % kConsumers == group, "tile %d is not group %d's", tile, group);
                    ++computed[static_cast<size_t>(tile)];
                    const int query = (tile - head_begin) * kMmaRows;
                    for (int half = 0; half < kHalves; ++half)
                        load_box(shared, memory.data(ring.slot()) + static_cast<uint32_t>(half * kQueryHalfBytes), in.q,
                                 kMmaRows, half * kHalf, segment.head, query, segment.batch);
                    std::vector<float> out(kMmaRows * kDim);
                    compute(in, shared, memory, ring.slot(), out);
                    for (int row = 0; row < std::min(kMmaRows, shape.length - query); row += 7)
                        for (int c = 0; c < kDim; c += 5) {
                            const int b = segment.batch, h = segment.head, i = query + row;
                            const double exact =
                                softmax_sum(in.q, in.text_k, in.text_v, in.bias, visible, b, i, h, c) +
                                softmax_sum(in.q, in.image_k, in.image_v, {}, shape.image, b, i, h, c);
                            const float found = out[static_cast<size_t>(row * kDim + c)];
                            CHECK(std::abs(found - exact) < 1e-2, "out[%d, %d, %d, %d] is %f, not %f", b, i, h, c,
                                  found, exact);
                        }
                }
            }
            begin = segment.end;
        }
    }
    for (size_t tile = 0; tile < computed.size(); ++tile)
        CHECK(computed[tile] == 1, "tile %d was computed %d times", static_cast<int>(tile), computed[tile]);
}

// The order of loads, waits and arrivals, as a list for each thread that has one: the producer, the warp that
// opens values, the consumers' warps.  Played in random order, nobody may hang, read what is not there or
// overwrite what is read.
struct Event {
    enum Kind { kLoad, kOpen, kWait, kWaitOpen, kRelease } kind;
    int slot, number;  // the number of what is loaded, waited for or released
    uint32_t parity;
};

void pipeline(const Shape& shape, int blocks, std::mt19937& random) {
    constexpr int kWarps = kConsumers * 4;
    for (int block = 0; block < blocks; ++block) {
        const int first = first_tile(shape, block, blocks), end = first_tile(shape, block + 1, blocks);
        std::vector<std::vector<Event>> programs(2 + kWarps);
        std::vector<QueryRing> rings{{0}, {1}};
        uint32_t round = 0;
        int number = 0;
        for (int begin = first; begin < end; round ^= 1, ++number) {
            const Segment segment = segment_from(shape, begin, end);
            programs[0].push_back({Event::kLoad, 0, number, round ^ 1});
            for (int tile = segment.begin; tile < segment.end; ++tile) {
                QueryRing& ring = rings[static_cast<size_t>((tile - first) % kConsumers)];
                programs[0].push_back({Event::kLoad, ring.slot(), tile, ring.parity ^ 1});
                ring.next();
                if (tile == std::min(segment.begin + kConsumers, segment.end) - 1)
                    programs[0].push_back({Event::kLoad, 1, number, round ^ 1});
            }
            programs[1].push_back({Event::kOpen, 1, number, round});
            begin = segment.end;
        }
        for (int warp = 0; warp < kWarps; ++warp) {
            std::vector<Event>& program = programs[static_cast<size_t>(2 + warp)];
            QueryRing ring{warp / 4};
            uint32_t round = 0;
            int number = 0;
            for (int begin = first; begin < end; round ^= 1, ++number) {
                const Segment segment = segment_from(shape, begin, end);
                int tile = own_tile(segment, first, warp / 4);
                program.push_back({Event::kWait, 0, number, round});
                if (tile >= segment.end) program.push_back({Event::kRelease, 0, number, 0});
                for (; tile < segment.end; tile += kConsumers, ring.next()) {
                    program.push_back({Event::kWait, ring.slot(), tile, ring.parity});
                    program.push_back({Event::kRelease, ring.slot(), tile, 0});
                    if (tile + kConsumers >= segment.end) program.push_back({Event::kRelease, 0, number, 0});
                    program.push_back({Event::kWaitOpen, 1, number, round});
                }
                program.push_back({Event::kWaitOpen, 1, number, round});
                program.push_back({Event::kRelease, 1, number, 0});
                begin = segment.end;
            }
        }

        std::vector<Barrier> full(kSlots, Barrier(1)), empty;
        for (int slot = 0; slot < kSlots; ++slot) empty.emplace_back(slot < 2 ? kWarps : 4);
        Barrier open(1);
        std::vector<int> holds(kSlots, -1), released(kSlots, kWarps);
        int opened = -1;
        std::vector<size_t> at(programs.size());
        size_t running = 0;
        for (const auto& program : programs) running += !program.empty();
        for (size_t idle = 0; running > 0;) {
            const size_t who = random() % programs.size();
            if (at[who] == programs[who].size()) continue;
            const Event& event = programs[who][at[who]];
            const auto slot = static_cast<size_t>(event.slot);
            bool moved = true;
            switch (event.kind) {
                case Event::kLoad:
                    moved = empty[slot].passed(event.parity);
                    if (!moved) break;
                    CHECK(released[slot] >= (slot < 2 ? kWarps : 4), "slot %d is overwritten while it is read", event.slot);
                    released[slot] = 0;
                    holds[slot] = event.number;
                    full[slot].arrive();
                    break;
                case Event::kOpen:
                    moved = full[slot].passed(event.parity);
                    if (!moved) break;
                    CHECK(holds[slot] == event.number, "%d is opened, not %d", holds[slot], event.number);
                    opened = event.number;
                    open.arrive();
                    break;
                case Event::kWait:
                    moved = full[slot].passed(event.parity);
                    if (moved) CHECK(holds[slot] == event.number, "%d is read, not %d", holds[slot], event.number);
                    break;
                case Event::kWaitOpen:
                    moved = open.passed(event.parity);
                    if (moved) CHECK(opened == event.number, "%d is open, not %d", opened, event.number);
                    break;
                case Event::kRelease:
                    CHECK(holds[slot] == event.number, "%d was overwritten by %d", event.number, holds[slot]);
                    ++released[slot];
                    empty[slot].arrive();
                    break;
            }
            if (moved && ++at[who] == programs[who].size()) --running;
            idle = moved ? 0 : idle + 1;
            CHECK(idle < 100000, "the pipeline hangs");
        }
    }
}

}  // namespace

int main() {
    std::mt19937 random(0);
    // Ragged queries; several heads and batches; a block of one tile, of two heads, of many.
    attend({1, 2, 150, 40, 257, 0}, 33, 2, random);
    attend({2, 1, 65, 64, 272, 64}, 48, 3, random);
    attend({1, 1, 64, 1, 256, 0}, 1, 1, random);
    for (const auto& [length, heads, blocks] :
         {std::array{64, 1, 1}, {640, 3, 4}, {64, 7, 2}, {130, 5, 3}, {64, 9, 9}, {1000, 4, 1}, {300, 6, 7}})
        pipeline({1, heads, length, 40, 257, 0}, blocks, random);
    std::printf("%d keys: %d bytes of shared memory\n", kKeys, kSharedBytes);
}
