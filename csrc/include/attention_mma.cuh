// The warpgroup products of attention, and the named barriers by which its warpgroups take turns.
#pragma once

#include "include/attention.h"
#include "include/sm90.cuh"

namespace flashtalk::attention {

// --- named barriers: kThreads threads in all, of which some wait and the others pass by ---------------

template <int kThreads>
__device__ __forceinline__ void named_wait(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

template <int kThreads>
__device__ __forceinline__ void named_arrive(int id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// --- products: asynchronous, fp32 sums in registers ---------------------------------------------------

// d [64, N] (+)= a [64, 16] b [N, 16]^T, bf16 in shared memory.  `accumulate` 0 ignores d's old values.  The
// trailing immediates: neither negated, both K-major.
__device__ __forceinline__ void mma_scores(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, p, 1, 1, 0, 0;\n}"
        : FT_REGISTERS_16(d, 0), FT_REGISTERS_16(d, 16), FT_REGISTERS_16(d, 32), FT_REGISTERS_16(d, 48)
        : "l"(a), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void mma_scores(float (&d)[96], uint64_t a, uint64_t b, int accumulate) {
    flashtalk::mma<__nv_bfloat16>(d, a, b, accumulate);
}

// d [64, 128] += a [64, 16] b [16, 128]: a in registers, b in shared memory.  The trailing immediates: neither
// negated, b MN-major.
__device__ __forceinline__ void mma_values(float (&d)[64], const uint32_t* a, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
        : FT_REGISTERS_16(d, 0), FT_REGISTERS_16(d, 16), FT_REGISTERS_16(d, 32), FT_REGISTERS_16(d, 48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}

// --- groups of products, each asked for as a whole ----------------------------------------------------

// scores [64, 2 kCount] = q k^T over all columns; q [64, 128] and the keys lie in halves of so many bytes.
template <int kQueryHalfBytes, int kKeyHalfBytes, int kCount>
__device__ __forceinline__ void issue_scores(float (&scores)[kCount], uint64_t q, uint64_t k) {
    pin(scores);
    mma_fence();
#pragma unroll
    for (int step = 0; step < kDim / kMmaK; ++step) {
        mma_scores(scores, advance(q, column_step(kQueryHalfBytes, step)),
                   advance(k, column_step(kKeyHalfBytes, step)), step > 0);
    }
    mma_commit();
}

// sums [64, 128] += weights [64, 4 kWords] v: a thread's words hold two keys of one row each.
template <int kWords>
__device__ __forceinline__ void issue_values(float (&sums)[kDim / 2], uint32_t (&weights)[kWords], uint64_t v) {
    pin(sums);
    pin(weights);
    mma_fence();
#pragma unroll
    for (int step = 0; step < kWords / 4; ++step) mma_values(sums, &weights[step * 4], advance(v, key_step(step)));
    mma_commit();
}

}  // namespace flashtalk::attention
