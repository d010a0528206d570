// A model of attention on the CPU: the hardware of attention_model.h and named barriers, driven by the kernel's
// own index arithmetic, against the plain sum.  Prints a line and returns 1 at a difference.
#include "include/chunk_attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "attention_model.h"

using namespace flashtalk::attention;

namespace {

void attend(const Shape& shape, std::mt19937& random) {
    constexpr int kKeys = Tile::kKeys;
    std::normal_distribution<float> normal;
    const auto draw = [&](int rows, bool fused) {  // a slice of a projection, or heads in front
        const int pitch = shape.heads * kDim * 3;
        Array x{shape.batch, rows, shape.heads, {rows * pitch, pitch, kDim}, {}};
        if (!fused) x.strides = {shape.heads * rows * kDim, kDim, rows * kDim};
        x.data.resize(static_cast<size_t>(shape.batch * rows * pitch));
        for (uint16_t& value : x.data) value = to_bf16(normal(random));
        return x;
    };
    const Array q = draw(shape.length, false), k = draw(shape.keys, false), v = draw(shape.keys, true);
    std::vector<float> out(static_cast<size_t>(shape.batch * shape.length * shape.heads * kDim));
    std::vector<int> writes(out.size());

    Shared shared(Tile::kSharedBytes);
    const Memory<Tile> memory{kSharedAlignment};
    CHECK(memory.spare() + 16 <= Tile::kSharedBytes, "shared memory ends before the spare word");
    const float scale = 1 / std::sqrt(static_cast<float>(kDim)) * 1.4426950408889634f;
    const int last = ceil_div(shape.keys, kKeys) - 1;
    for (int tile = 0; tile < static_cast<int>(tile_count(shape, Tile::kQueries)); ++tile) {
        const Origin origin = tile_origin(shape, Tile::kQueries, tile);
        for (int half = 0; half < kHalves; ++half) {
            const auto to = memory.data(0) + static_cast<uint32_t>(half * Tile::kQueryHalfBytes);
            load_box(shared, to, q, Tile::kQueries, half * kHalf, origin.head, origin.query, origin.batch);
        }
        std::vector<Registers<kDim / 2>> sums(Tile::kConsumers, Registers<kDim / 2>(128));
        std::vector<std::array<float, 2>> top(Tile::kConsumers * 128, {-INFINITY, -INFINITY}), total(Tile::kConsumers * 128);
        for (int n = last; n >= 0; --n) {
            const int key_slot = 1 + (last - n) % kStages, value_slot = key_slot + kStages;
            int bytes = 0;
            for (int half = 0; half < kHalves; ++half) {
                const auto offset = static_cast<uint32_t>(half * Tile::kHalfBytes);
                for (const auto& [slot, from] : {std::pair(key_slot, &k), std::pair(value_slot, &v)})
                    bytes += load_box(shared, memory.data(slot) + offset, *from, kKeys, half * kHalf, origin.head,
                                      n * kKeys, origin.batch);
            }
            CHECK(bytes == 2 * Tile::kTileBytes, "%d bytes in two tiles of %d", bytes, Tile::kTileBytes);
            for (int group = 0; group < Tile::kConsumers; ++group) {
                const auto rows = static_cast<uint32_t>(group * kMmaRows * kRowBytes);
                const uint64_t query = descriptor(memory.data(0) + rows, 16);
                Registers<kKeys / 2> scores(128);
                for (int step = 0; step < kDim / kMmaK; ++step) {
                    const uint64_t a = advance(query, column_step(Tile::kQueryHalfBytes, step));
                    std::array<std::array<float, kMmaK>, 64> left;
                    for (int row = 0; row < 64; ++row)
                        for (int c = 0; c < kMmaK; ++c) left[row][c] = operand(shared, a, row, c, true);
                    const uint64_t b = descriptor(memory.data(key_slot), 16);
                    mma<kKeys>(scores, left, shared, advance(b, column_step(Tile::kHalfBytes, step)), true, step > 0);
                }
                for (int quad = 0; quad < 32; ++quad)  // four lanes share two rows
                    for (int half = 0; half < 2; ++half) {
                        float high = top[static_cast<size_t>(group * 128 + quad * 4)][half];
                        for (int t = quad * 4; t < quad * 4 + 4; ++t)
                            for (int i = 0; i < kKeys / 2; ++i) {
                                if (fragment_half(i) != half) continue;
                                float& score = scores[static_cast<size_t>(t)][i];
                                if (n * kKeys + fragment_column(t % 32, i) >= shape.keys) score = -INFINITY;
                                high = std::max(high, score);
                            }
                        for (int t = quad * 4; t < quad * 4 + 4; ++t) {
                            const auto at = static_cast<size_t>(group * 128 + t);
                            const float fade = std::exp2((top[at][half] - high) * scale);
                            top[at][half] = high;
                            total[at][half] *= fade;
                            for (int i = 0; i < kKeys / 2; ++i) {
                                if (fragment_half(i) != half) continue;
                                float& score = scores[static_cast<size_t>(t)][i];
                                score = std::exp2((score - high) * scale);
                                total[at][half] += score;
                            }
                            for (int i = 0; i < kDim / 2; ++i)
                                if (fragment_half(i) == half) sums[group][static_cast<size_t>(t)][i] *= fade;
                        }
                    }
                const uint64_t b = descriptor(memory.data(value_slot), Tile::kHalfBytes);
                for (int step = 0; step < kKeys / kMmaK; ++step) {
                    std::vector<std::array<uint32_t, 4>> words(128);
                    for (size_t t = 0; t < 128; ++t)
                        for (int i = 0; i < 4; ++i) {
                            const float* pair = &scores[t][step * 8 + i * 2];
                            words[t][i] = static_cast<uint32_t>(to_bf16(pair[1])) << 16 | to_bf16(pair[0]);
                        }
                    mma<kDim>(sums[group], from_registers(words), shared, advance(b, key_step(step)), false, true);
                }
            }
        }
        for (int group = 0; group < Tile::kConsumers; ++group)
            for (int t = 0; t < 128; ++t)
                for (int i = 0; i < kDim / 2; ++i) {
                    const int half = fragment_half(i);
                    const int query = origin.query + group * kMmaRows + fragment_row(t / 32, t % 32, half);
                    if (query >= shape.length) continue;
                    float whole = 0;
                    for (int lane = 0; lane < 4; ++lane)
                        whole += total[static_cast<size_t>(group * 128 + t / 4 * 4 + lane)][half];
                    const auto at = static_cast<size_t>(
                        ((origin.batch * shape.length + query) * shape.heads + origin.head) * kDim +
                        fragment_column(t % 32, i));
                    out[at] = sums[group][static_cast<size_t>(t)][i] / whole;
                    ++writes[at];
                }
    }

    size_t at = 0;
    for (int b = 0; b < shape.batch; ++b)
        for (int i = 0; i < shape.length; ++i)
            for (int h = 0; h < shape.heads; ++h) {
                std::vector<double> weights(static_cast<size_t>(shape.keys));
                double whole = 0;
                for (int j = 0; j < shape.keys; ++j) {
                    double score = 0;
                    for (int c = 0; c < kDim; ++c)
                        score += static_cast<double>(to_float(q.data[q.at(b, i, h, c)])) *
                                 to_float(k.data[k.at(b, j, h, c)]);
                    whole += weights[static_cast<size_t>(j)] = std::exp(score / std::sqrt(128.0));
                }
                for (int c = 0; c < kDim; ++c, ++at) {
                    double sum = 0;
                    for (int j = 0; j < shape.keys; ++j)
                        sum += weights[static_cast<size_t>(j)] / whole * to_float(v.data[v.at(b, j, h, c)]);
                    CHECK(writes[at] == 1, "out[%d, %d, %d, %d] was written %d times", b, i, h, c, writes[at]);
                    CHECK(std::abs(out[at] - sum) < 4e-3, "out[%d, %d, %d, %d] is %f, not %f", b, i, h, c, out[at],
                          sum);
                }
            }
}

// The order of loads, waits, arrivals and turns, as a list for each thread that has one: the producer and the
// consumers' warps.  Played in random order, nobody may hang, read what is not there or overwrite what is read.
struct Event {
    enum Kind { kLoad, kWait, kRelease, kTake, kGrant } kind;
    int slot, number;  // the number of the tile that is loaded, waited for or released
    uint32_t parity;
};

void pipeline(int tiles, int key_tiles, std::mt19937& random) {
    constexpr int kWarps = Tile::kConsumers * 4;
    std::vector<std::vector<Event>> programs(1 + kWarps);
    Ring keys{1}, values{1 + kStages};
    int key_number = 0, value_number = 0;
    const auto load = [&](Ring& ring, int& number) {
        programs[0].push_back({Event::kLoad, ring.slot(), number++, ring.parity ^ 1});
        ring.next();
    };
    for (int tile = 0; tile < tiles; ++tile) {
        load(keys, key_number);
        programs[0].push_back({Event::kLoad, 0, tile, static_cast<uint32_t>(tile & 1) ^ 1});
        for (int n = key_tiles - 2; n >= 0; --n) {
            load(keys, key_number);
            load(values, value_number);
        }
        load(values, value_number);
    }
    for (int warp = 0; warp < kWarps; ++warp) {
        std::vector<Event>& program = programs[static_cast<size_t>(1 + warp)];
        const int group = warp / 4;
        Ring keys{1}, values{1 + kStages};
        int key_number = 0, value_number = 0;
        const auto wait = [&](const Ring& ring, int number) {
            program.push_back({Event::kWait, ring.slot(), number, ring.parity});
        };
        const auto release = [&](Ring& ring, int& number) {
            program.push_back({Event::kRelease, ring.slot(), number++, 0});
            ring.next();
        };
        if (group == 1) program.push_back({Event::kGrant, 0, 0, 0});
        for (int tile = 0; tile < tiles; ++tile) {
            program.push_back({Event::kWait, 0, tile, static_cast<uint32_t>(tile & 1)});
            wait(keys, key_number);
            release(keys, key_number);
            for (int n = key_tiles - 2; n >= 0; --n) {
                wait(keys, key_number);
                program.push_back({Event::kTake, group, 0, 0});
                wait(values, value_number);
                program.push_back({Event::kGrant, 1 - group, 0, 0});
                release(keys, key_number);
                release(values, value_number);
            }
            program.push_back({Event::kRelease, 0, tile, 0});
            wait(values, value_number);
            release(values, value_number);
        }
        if (group == 0) program.push_back({Event::kTake, 0, 0, 0});
    }

    std::vector<Barrier> full(kSlots, Barrier(1)), empty(kSlots, Barrier(kWarps));
    std::vector<int> holds(kSlots, -1), readers(kSlots, 0);
    std::vector<size_t> at(programs.size());
    // Eight arrivals, of four warps that grant and four that take, complete a named barrier.
    std::array<int, Tile::kConsumers> arrived{}, granted{}, completed{};
    std::vector<int> taken(programs.size(), -1);  // the phase that a warp waits for, once it has arrived
    for (size_t running = programs.size(), idle = 0; running > 0;) {
        const size_t who = random() % programs.size();
        if (at[who] == programs[who].size()) continue;
        const Event& event = programs[who][at[who]];
        const auto slot = static_cast<size_t>(event.slot);
        const auto arrive = [&] {
            CHECK(arrived[slot] < kWarps, "a named barrier has one arrival too many");
            if (++arrived[slot] == kWarps) {
                arrived[slot] = granted[slot] = 0;
                ++completed[slot];
            }
        };
        bool moved = true;
        switch (event.kind) {
            case Event::kLoad:
                moved = empty[slot].passed(event.parity);
                if (!moved) break;
                CHECK(readers[slot] == 0, "slot %d is overwritten while it is read", event.slot);
                holds[slot] = event.number;
                full[slot].arrive();
                break;
            case Event::kWait:
                moved = full[slot].passed(event.parity);
                if (!moved) break;
                CHECK(holds[slot] == event.number, "%d is read, not %d", holds[slot], event.number);
                ++readers[slot];
                break;
            case Event::kRelease:
                CHECK(holds[slot] == event.number, "%d was overwritten by %d", event.number, holds[slot]);
                --readers[slot];
                empty[slot].arrive();
                break;
            case Event::kGrant:
                CHECK(++granted[slot] <= 4, "a turn is granted twice");
                arrive();
                break;
            case Event::kTake:
                if (taken[who] < 0) {
                    taken[who] = completed[slot];
                    arrive();
                }
                moved = completed[slot] > taken[who];
                if (moved) taken[who] = -1;
                break;
        }
        if (moved && ++at[who] == programs[who].size()) --running;
        idle = moved ? 0 : idle + 1;
        CHECK(idle < 100000, "the pipeline hangs");
    }
    for (int group = 0; group < Tile::kConsumers; ++group) CHECK(arrived[group] == 0, "a grant is left over");
}

}  // namespace

int main() {
    std::mt19937 random(0);
    for (int key_tiles = 1; key_tiles <= 6; ++key_tiles) pipeline(5, key_tiles, random);
    // Ragged queries and keys, in one tile and in more; several heads and batches.
    attend({1, 2, Tile::kQueries + 70, 2 * Tile::kKeys + 5}, random);
    attend({2, 1, 3, Tile::kKeys}, random);
    attend({1, 1, 65, 1}, random);
    std::printf("%d bytes of shared memory\n", Tile::kSharedBytes);
}
