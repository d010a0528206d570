// What the models of the kernels share: a check that ends the program, and bfloat16 as a float.
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
