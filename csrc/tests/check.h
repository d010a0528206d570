// What the models of the kernels share: a check that ends the program, bfloat16 as a float, a barrier.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define CHECK(condition, ...)                   \
    do {                                        \
        if (!(condition)) {                     \
            std::printf("line %d: ", __LINE__); \
            std::printf(__VA_ARGS__);           \
            std::printf("\n");                  \
            std::exit(1);                       \
        }                                       \
    } while (0)

inline float to_float(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// mbarrier: a phase completes when its arrivals and bytes are in; a wait for a parity passes when the phase
// of that parity was the last to complete (before the first, that is parity 1).
struct Barrier {
    int arrivals, pending, phase = 0;
    explicit Barrier(int count) : arrivals(count), pending(count) {}
    void arrive() {
        CHECK(pending > 0, "one arrival too many");
        if (--pending == 0) {
            pending = arrivals;
            ++phase;
        }
    }
    bool passed(uint32_t parity) const { return ((phase + 1) & 1) == static_cast<int>(parity); }
};
