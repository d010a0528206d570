// The way from wgmma's accumulators to 16 bytes of a row: an exchange among the four lanes of a row.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FT_HOST_DEVICE __host__ __device__
#else
#define FT_HOST_DEVICE
#endif

namespace flashtalk {

// Four lanes hold 4 blocks of 8 columns, two columns (one word) a block each.  Transposed, a lane holds the
// 8 columns of the block of its own number: 16 bytes of memory.  Two exchanges, with the lane whose number
// differs in `bit` (1, then 2), of two words each.  The transposition is its own inverse.
constexpr FT_HOST_DEVICE uint32_t quad_send(const uint32_t (&v)[4], int lane, int bit, int i) {
    const bool high = (lane & bit) != 0;
    if (bit == 1) return high ? v[2 * i] : v[2 * i + 1];
    return high ? v[i] : v[i + 2];
}

constexpr FT_HOST_DEVICE void quad_receive(uint32_t (&v)[4], int lane, int bit, uint32_t first, uint32_t second) {
    const bool high = (lane & bit) != 0;
    if (bit == 1) {
        v[0] = high ? first : v[0];
        v[2] = high ? second : v[2];
        v[1] = high ? v[1] : first;
        v[3] = high ? v[3] : second;
    } else {
        v[0] = high ? first : v[0];
        v[1] = high ? second : v[1];
        v[2] = high ? v[2] : first;
        v[3] = high ? v[3] : second;
    }
}

#ifdef __CUDACC__
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const uint32_t first = __shfl_xor_sync(0xFFFFFFFF, quad_send(v, lane, bit, 0), bit);
        const uint32_t second = __shfl_xor_sync(0xFFFFFFFF, quad_send(v, lane, bit, 1), bit);
        quad_receive(v, lane, bit, first, second);
    }
}
#endif

}  // namespace flashtalk
