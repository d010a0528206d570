// What a thread of attention does with its two rows of scores and sums (fragment_row in include/attention.h).
#pragma once

#include <cuda_bf16.h>

#include "include/attention.h"

namespace flashtalk::attention {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kScale = 0.08838834764831845f * kLog2E;  // kDim^-0.5 log2(e): 2^ of a score times this is its weight

__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Of the four lanes that share a row.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

// Has the weights computed before what follows.  ptxas moves the softmax past a wait for products, where it
// overlaps nothing; a volatile store it leaves before the wait, with all that its condition depends on: the
// sums, hence every weight.  A sum of weights is never negative, so nothing is stored (nor if it is NaN).  A
// branch in its place would end the registers' life in asynchronous products: ptxas then spills.
__device__ __forceinline__ void finish_weights(const float (&totals)[2], uint32_t spare) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.lt.f32 p, %0, 0f00000000;\n"
        "@p st.volatile.shared.f32 [%1], %0;\n}" ::"f"(totals[0] + totals[1]),
        "r"(spare)
        : "memory");
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16 | __bfloat16_as_ushort(pair.x);
}

template <int kCount>
__device__ __forceinline__ void pack_all(const float (&from)[kCount], uint32_t (&to)[kCount / 2]) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) to[i] = pack(from[2 * i], from[2 * i + 1]);
}

// A warpgroup's 64 rows of sums, each times its factor, rounded once: to `out`, where the first row begins, and
// every `pitch` elements on.  Only `rows` of them are written.
__device__ __forceinline__ void write_rows(
    const float (&sums)[kDim / 2], const float (&factors)[2], uint16_t* out, int pitch, int rows) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = fragment_row(warp, lane, half);
        uint16_t* to = out + static_cast<int64_t>(row) * pitch + lane % 4 * 8;
#pragma unroll
        for (int first = 0; first < kDim; first += 32) {  // four blocks of 8 columns
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* sum = &sums[(first / 8 + i) * 4 + half * 2];
                words[i] = pack(sum[0] * factors[half], sum[1] * factors[half]);
            }
            transpose_quad(words, lane);
            if (row < rows) *reinterpret_cast<uint4*>(to + first) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

}  // namespace flashtalk::attention
