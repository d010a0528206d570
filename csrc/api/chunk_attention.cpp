#include "api/chunk_attention.h"

#include <algorithm>
#include <limits>
#include <string>

#include "api/driver.h"
#include "include/chunk_attention.h"

namespace flashtalk {
namespace {

using namespace attention;
using Strides = std::array<int64_t, 3>;

constexpr int kAlignment = 16;  // bytes: of pointers and strides
constexpr int64_t kMaxStrideBytes = int64_t{1} << 40;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("chunk_attention: " + what); }

void check_positive(const char* name, int value) {
    if (value < 1) refuse(std::string(name) + " is " + std::to_string(value) + "; it must be 1 or more");
}

void check_pointer(const char* name, uintptr_t pointer) {
    if (pointer == 0) refuse(std::string(name) + " is null");
    if (pointer % kAlignment != 0) refuse(std::string(name) + " is not aligned to 16 bytes");
}

// A dimension of size 1 may have any stride: it is never taken.
void check_strides(const char* name, const Strides& strides, const std::array<int, 3>& sizes) {
    for (size_t i = 0; i < 3; ++i) {
        const int64_t bytes = strides[i] * 2;
        if (sizes[i] > 1 && (bytes < kAlignment || bytes % kAlignment != 0 || bytes >= kMaxStrideBytes)) {
            refuse("stride " + std::to_string(strides[i]) + " of " + name + " is no positive multiple of 8");
        }
    }
}

const Variant& choose(int tile_keys) {
    for (const Variant& variant : kVariantTable) {
        if (tile_keys == 0 || tile_keys == variant.keys) return variant;
    }
    refuse("there is no tile of " + std::to_string(tile_keys) + " keys");
}

// [batch, rows, heads, 128], read in boxes of 64 columns of `box_rows` rows of one head, which lie in shared
// memory as rows of 128 bytes.  What is past the end is zeros.
CUtensorMap tensor_map(
    EncodeTiled encode, uintptr_t data, const std::array<int, 3>& sizes, const Strides& strides, int box_rows) {
    const auto size = [&](size_t i) { return static_cast<cuuint64_t>(sizes[i]); };
    const auto stride = [&](size_t i) { return static_cast<cuuint64_t>(sizes[i] > 1 ? strides[i] * 2 : kAlignment); };
    const std::array<cuuint64_t, 4> dims{kDim, size(2), size(1), size(0)};
    const std::array<cuuint64_t, 3> pitches{stride(2), stride(1), stride(0)};
    const std::array<cuuint32_t, 4> box{kHalf, 1, static_cast<cuuint32_t>(box_rows), 1};
    const std::array<cuuint32_t, 4> steps{1, 1, 1, 1};
    CUtensorMap map;
    check_driver(
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, reinterpret_cast<void*>(data), dims.data(), pitches.data(),
               box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),  // zeros
        "cuTensorMapEncodeTiled");
    return map;
}

}  // namespace

void chunk_attention(const ChunkAttentionCall& call) {
    check_positive("batch", call.batch);
    check_positive("length", call.length);
    check_positive("keys", call.keys);
    check_positive("heads", call.heads);
    const std::array<int, 3> queries{call.batch, call.length, call.heads}, keys{call.batch, call.keys, call.heads};
    check_pointer("q", call.q);
    check_pointer("k", call.k);
    check_pointer("v", call.v);
    check_pointer("out", call.out);
    check_strides("q", call.q_strides, queries);
    check_strides("k", call.k_strides, keys);
    check_strides("v", call.v_strides, keys);
    const Variant& variant = choose(call.tile_keys);
    // Rows are rounded up to tiles, in 32 bits.
    if (std::max(call.length, call.keys) > std::numeric_limits<int>::max() / 2) refuse("too many rows");
    FT_CHECK_CUDA(cudaSetDevice(call.device));

    Shape shape{call.batch, call.heads, call.length, call.keys};
    const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, call.device);
    const int64_t tiles = tile_count(shape);
    // The grid's stride is added to a tile's number before it is compared.
    if (tiles > std::numeric_limits<int>::max() - multiprocessors) refuse("too many queries");

    const EncodeTiled encode = encode_tiled();
    CUtensorMap q = tensor_map(encode, call.q, queries, call.q_strides, kQueries);
    CUtensorMap k = tensor_map(encode, call.k, keys, call.k_strides, variant.keys);
    CUtensorMap v = tensor_map(encode, call.v, keys, call.v_strides, variant.keys);
    auto* out = reinterpret_cast<uint16_t*>(call.out);

    FT_CHECK_CUDA(cudaFuncSetAttribute(
        variant.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, variant.shared_bytes));
    const dim3 grid(static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors));
    std::array<void*, 5> parameters{&q, &k, &v, &shape, &out};
    FT_CHECK_CUDA(cudaLaunchKernel(variant.kernel, grid, dim3(kThreads), parameters.data(),
                                   static_cast<size_t>(variant.shared_bytes),
                                   reinterpret_cast<cudaStream_t>(call.stream)));
}

}  // namespace flashtalk
