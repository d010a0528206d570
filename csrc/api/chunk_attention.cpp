#include "api/chunk_attention.h"

#include <string>

#include "api/self_attention_call.h"
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
    check_rows(kChecks, call.length, call.keys);
    FT_CHECK_CUDA(cudaSetDevice(call.device));

    Shape shape{call.batch, call.heads, call.length, call.keys};
    const int blocks = block_count(kChecks, shape, Tile::kQueries, call.device);
    const EncodeTiled encode = encode_tiled();
    CUtensorMap queries = tensor_map(encode, q, Tile::kQueries);
    CUtensorMap keys = tensor_map(encode, k, Tile::kKeys);
    CUtensorMap values = tensor_map(encode, v, Tile::kKeys);
    auto* out = reinterpret_cast<uint16_t*>(call.out);
    launch<5>(kKernel, blocks, Tile::kThreads, Tile::kSharedBytes, {&queries, &keys, &values, &shape, &out},
              call.stream);
}

}  // namespace flashtalk
