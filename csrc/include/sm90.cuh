// Hopper's barriers, bulk tensor copies and warpgroup products as functions: one PTX instruction each.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace flashtalk {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- mbarrier: `barrier` is its shared-memory address -------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine; a __syncthreads() makes them visible to threads.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for `bytes` of copies too.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is complete.  On a fresh barrier the phase before the first, of
// parity 1, counts as complete.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done = 0;
    while (done == 0) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    }
}

// --- bulk tensor copies: global -> shared, signalling a barrier; coordinates innermost first ----------

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void load_box(
    uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

__device__ __forceinline__ void load_box(
    uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3, int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

// --- shared memory that threads write and products or copies touch next --------------------------------

// 16 bytes.
__device__ __forceinline__ void store_zeros(uint32_t address) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

// Orders this thread's earlier stores before what asynchronous units do after a barrier that follows.
__device__ __forceinline__ void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- warpgroups ---------------------------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Orders the accumulators' earlier register accesses before the products that follow.
__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving an access of these registers across this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <class Word, int kCount>
__device__ __forceinline__ void pin(Word (&registers)[kCount]) {
    static_assert(std::is_same_v<Word, int> || std::is_same_v<Word, uint32_t>);
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Sixteen accumulators from d[i] on, as operands of the asm that follows.
#define FT_REGISTERS_16(d, i)                                                                                 \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]), "+f"(d[i + 11]), "+f"(d[i + 12]),      \
        "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])

// `type`: the operands' type in PTX.  The trailing immediates: neither operand negated, both K-major.
#define FT_MMA_96(type)                                                                    \
    asm volatile(                                                                          \
        "{\n.reg .pred p;\n"                                                               \
        "setp.ne.b32 p, %50, 0;\n"                                                         \
        "wgmma.mma_async.sync.aligned.m64n96k16.f32." type "." type " {"                   \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"   \
        "}, %48, %49, p, 1, 1, 0, 0;\n}"                                                   \
        : FT_REGISTERS_16(d, 0), FT_REGISTERS_16(d, 16), FT_REGISTERS_16(d, 32)            \
        : "l"(a), "l"(b), "r"(accumulate))

#define FT_MMA_192(type)                                                                                 \
    asm volatile(                                                                                        \
        "{\n.reg .pred p;\n"                                                                             \
        "setp.ne.b32 p, %98, 0;\n"                                                                       \
        "wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type " {"                                \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                         \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "               \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "               \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "               \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "               \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"                 \
        "}, %96, %97, p, 1, 1, 0, 0;\n}"                                                                 \
        : FT_REGISTERS_16(d, 0), FT_REGISTERS_16(d, 16), FT_REGISTERS_16(d, 32), FT_REGISTERS_16(d, 48), \
          FT_REGISTERS_16(d, 64), FT_REGISTERS_16(d, 80)                                                 \
        : "l"(a), "l"(b), "r"(accumulate))

// d [64, N] (+)= a [64, 16] b [N, 16]^T, `Operand` in shared memory, fp32 in registers; asynchronous.
// `accumulate` 0 ignores d's old values.
template <class Operand>
__device__ __forceinline__ void mma(float (&d)[48], uint64_t a, uint64_t b, int accumulate) {
    static_assert(std::is_same_v<Operand, __nv_bfloat16> || std::is_same_v<Operand, __half>);
    if constexpr (std::is_same_v<Operand, __half>) {
        FT_MMA_96("f16");
    } else {
        FT_MMA_96("bf16");
    }
}

template <class Operand>
__device__ __forceinline__ void mma(float (&d)[96], uint64_t a, uint64_t b, int accumulate) {
    static_assert(std::is_same_v<Operand, __nv_bfloat16> || std::is_same_v<Operand, __half>);
    if constexpr (std::is_same_v<Operand, __half>) {
        FT_MMA_192("f16");
    } else {
        FT_MMA_192("bf16");
    }
}

#undef FT_MMA_192
#undef FT_MMA_96

}  // namespace flashtalk
