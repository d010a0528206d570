#include "api/quantized_attention.h"

#include "api/self_attention_call.h"
#include "include/quantized_attention.h"

namespace flashtalk {
namespace {

using namespace attention;

constexpr Checks kChecks{"quantized_attention"};

// Bytes, contiguous, `sizes` and `box` from the innermost dimension on; what is past the end is read as zeros.
CUtensorMap byte_map(
    EncodeTiled encode, uintptr_t data, const std::array<int, 4>& sizes, const std::array<cuuint32_t, 4>& box,
    CUtensorMapSwizzle swizzle) {
    std::array<cuuint64_t, 4> dims;
    std::array<cuuint64_t, 3> pitches;
    cuuint64_t pitch = 1;
    for (size_t i = 0; i < 4; ++i) {
        dims[i] = static_cast<cuuint64_t>(sizes[i]);
        pitch *= dims[i];
        if (i < 3) pitches[i] = pitch;
    }
    const std::array<cuuint32_t, 4> steps{1, 1, 1, 1};
    CUtensorMap map;
    check_driver(
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 4, reinterpret_cast<void*>(data), dims.data(), pitches.data(),
               box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),  // zeros
        "cuTensorMapEncodeTiled");
    return map;
}

}  // namespace

const int kQuantizedTileKeys = quantized::Tile::kKeys;

void quantized_attention(const QuantizedAttentionCall& call) {
    kChecks.positive("batch", call.batch);
    kChecks.positive("length", call.length);
    kChecks.positive("keys", call.keys);
    kChecks.positive("heads", call.heads);
    kChecks.pointer("q", call.q);
    kChecks.pointer("k", call.k);
    kChecks.pointer("v", call.v);
    kChecks.pointer("q_scale", call.q_scale);
    kChecks.pointer("k_scale", call.k_scale);
    kChecks.pointer("v_scale", call.v_scale);
    kChecks.pointer("v_mean", call.v_mean);
    kChecks.pointer("out", call.out);
    check_rows(kChecks, call.length, call.keys);
    FT_CHECK_CUDA(cudaSetDevice(call.device));

    Shape shape{call.batch, call.heads, call.length, call.keys};
    const int blocks = block_count(kChecks, shape, quantized::Tile::kQueries, call.device);
    const EncodeTiled encode = encode_tiled();
    const int padded = ceil_div(call.keys, quantized::kMmaK) * quantized::kMmaK;
    CUtensorMap queries = byte_map(
        encode, call.q, {kDim, call.heads, call.length, call.batch}, {kDim, 1, quantized::Tile::kQueries, 1},
        CU_TENSOR_MAP_SWIZZLE_128B);
    CUtensorMap keys = byte_map(
        encode, call.k, {kDim, call.heads, call.keys, call.batch}, {kDim, 1, quantized::Tile::kKeys, 1},
        CU_TENSOR_MAP_SWIZZLE_128B);
    CUtensorMap values = byte_map(
        encode, call.v, {padded, kDim, call.heads, call.batch}, {quantized::kMmaK, kDim, 1, 1},
        CU_TENSOR_MAP_SWIZZLE_32B);
    quantized::Scales scales{
        reinterpret_cast<const float*>(call.q_scale), reinterpret_cast<const float*>(call.k_scale),
        reinterpret_cast<const float*>(call.v_scale), reinterpret_cast<const float*>(call.v_mean)};
    auto* out = reinterpret_cast<uint16_t*>(call.out);
    launch<6>(quantized::kKernel, blocks, quantized::Tile::kThreads, quantized::Tile::kSharedBytes,
              {&queries, &keys, &values, &shape, &scales, &out}, call.stream);
}

}  // namespace flashtalk
