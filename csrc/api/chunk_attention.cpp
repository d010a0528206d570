#include "api/chunk_attention.h"

#include <algorithm>
#include <limits>
#include <string>

#include "api/attention_call.h"
#include "include/chunk_attention.h"

namespace flashtalk {
namespace {

using namespace attention;

constexpr Checks kChecks{"chunk_attention"};
constexpr int64_t kMaxStrideBytes = int64_t{1} << 40;

// A dimension of size 1 may have any stride: it is never taken.
void check_strides(const char* name, const Operand& x) {
    for (size_t i = 0; i < 3; ++i) {
        const int64_t bytes = x.strides[i] * 2;
        if (x.sizes[i] > 1 && (bytes < kAlignment || bytes % kAlignment != 0 || bytes >= kMaxStrideBytes)) {
            kChecks.refuse("stride " + std::to_string(x.strides[i]) + " of " + name + " is no positive multiple of 8");
        }
    }
}

}  // namespace

void chunk_attention(const ChunkAttentionCall& call) {
    kChecks.positive("batch", call.batch);
    kChecks.positive("length", call.length);
    kChecks.positive("keys", call.keys);
    kChecks.positive("heads", call.heads);
    const Operand q{call.q, {call.batch, call.length, call.heads}, call.q_strides};
    const Operand k{call.k, {call.batch, call.keys, call.heads}, call.k_strides};
    const Operand v{call.v, {call.batch, call.keys, call.heads}, call.v_strides};
    kChecks.pointer("q", call.q);
    kChecks.pointer("k", call.k);
    kChecks.pointer("v", call.v);
    kChecks.pointer("out", call.out);
    check_strides("q", q);
    check_strides("k", k);
    check_strides("v", v);
    // Rows are rounded up to tiles, in 32 bits.
    if (std::max(call.length, call.keys) > std::numeric_limits<int>::max() / 2) kChecks.refuse("too many rows");
    FT_CHECK_CUDA(cudaSetDevice(call.device));

    Shape shape{call.batch, call.heads, call.length, call.keys};
    const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, call.device);
    const int64_t tiles = tile_count(shape, Tile::kQueries);
    // The grid's stride is added to a tile's number before it is compared.
    if (tiles > std::numeric_limits<int>::max() - multiprocessors) kChecks.refuse("too many queries");

    const EncodeTiled encode = encode_tiled();
    CUtensorMap queries = tensor_map(encode, q, Tile::kQueries);
    CUtensorMap keys = tensor_map(encode, k, Tile::kKeys);
    CUtensorMap values = tensor_map(encode, v, Tile::kKeys);
    auto* out = reinterpret_cast<uint16_t*>(call.out);

    FT_CHECK_CUDA(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes));
    const dim3 grid(static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors));
    std::array<void*, 5> parameters{&queries, &keys, &values, &shape, &out};
    FT_CHECK_CUDA(cudaLaunchKernel(kKernel, grid, dim3(Tile::kThreads), parameters.data(), size_t{Tile::kSharedBytes},
                                   reinterpret_cast<cudaStream_t>(call.stream)));
}

}  // namespace flashtalk
