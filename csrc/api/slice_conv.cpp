#include "api/slice_conv.h"

#include <algorithm>
#include <array>
#include <limits>
#include <string>

#include "api/driver.h"
#include "include/slice_conv.h"

namespace flashtalk {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("slice_conv: " + what); }

void check_positive(const char* name, int value) {
    if (value < 1) refuse(std::string(name) + " is " + std::to_string(value) + "; it must be 1 or more");
}

void check_pointer(const char* name, uintptr_t pointer) {
    if (pointer == 0) refuse(std::string(name) + " is null");
    if (pointer % 16 != 0) refuse(std::string(name) + " is not aligned to 16 bytes");
}

void check(const SliceConvCall& call) {
    check_positive("height", call.height);
    check_positive("width", call.width);
    check_positive("in_channels", call.in_channels);
    check_positive("out_channels", call.out_channels);
    check_positive("kernel_t", call.kernel_t);
    if (call.frames < call.kernel_t) {
        refuse(std::to_string(call.frames) + " frames are fewer than the kernel's " +
               std::to_string(call.kernel_t));
    }
    if (call.spatial != 1 && call.spatial != 3) {
        refuse("the kernel is " + std::to_string(call.spatial) + " pixels wide; it must be 1 or 3");
    }
    if (call.in_channels % kSlab != 0) {
        refuse(std::to_string(call.in_channels) + " input channels are no multiple of " + std::to_string(kSlab));
    }
    if (call.out_channels % kOutputMultiple != 0) {  // so that choose() finds a variant
        refuse(std::to_string(call.out_channels) + " output channels are no multiple of " +
               std::to_string(kOutputMultiple));
    }
    // The epilogue's offsets inside a tile are 32-bit.
    const int64_t row = static_cast<int64_t>(call.width) * call.out_channels;
    if (row * 64 > std::numeric_limits<int>::max()) refuse("a row of the output is too long");
    check_pointer("x", call.x);
    check_pointer("weight", call.weight);
    check_pointer("bias", call.bias);
    if (call.residual != 0) check_pointer("residual", call.residual);
    check_pointer("out", call.out);
}

struct Dtype {
    Element element;
    CUtensorMapDataType in_map;
};

Dtype named_dtype(const std::string& name) {
    if (name == "bfloat16") return {kBf16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16};
    if (name == "float16") return {kFp16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16};
    refuse("dtype is " + name + "; it must be bfloat16 or float16");
}

// A contiguous tensor of 2-byte elements, innermost dimension first, read in boxes of 64-byte rows.
template <size_t kRank>
CUtensorMap tensor_map(
    EncodeTiled encode, CUtensorMapDataType type, uintptr_t data, const std::array<int, kRank>& sizes,
    const std::array<int, kRank>& box) {
    std::array<cuuint64_t, kRank> dims;
    std::array<cuuint64_t, kRank> strides;  // in bytes, of the dimensions after the first; the last is not read
    std::array<cuuint32_t, kRank> box_dims;
    std::array<cuuint32_t, kRank> element_strides;
    cuuint64_t bytes = 2;
    for (size_t i = 0; i < kRank; ++i) {
        dims[i] = static_cast<cuuint64_t>(sizes[i]);
        bytes *= dims[i];
        strides[i] = bytes;
        box_dims[i] = static_cast<cuuint32_t>(box[i]);
        element_strides[i] = 1;
    }
    CUtensorMap map;
    check_driver(
        encode(&map, type, kRank, reinterpret_cast<void*>(data), dims.data(), strides.data(), box_dims.data(),
               element_strides.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_64B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),  // zeros
        "cuTensorMapEncodeTiled");
    return map;
}

}  // namespace

void slice_conv(const SliceConvCall& call) {
    check(call);
    const Dtype dtype = named_dtype(call.dtype);
    FT_CHECK_CUDA(cudaSetDevice(call.device));

    const SliceConvShape shape{call.frames - call.kernel_t + 1, call.height, call.width, call.in_channels,
                               call.out_channels, call.kernel_t};
    const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, call.device);
    const SliceConvVariant& variant = *choose(kSliceConvVariants, shape, call.spatial, multiprocessors);
    const int64_t tiles = tile_count(shape, variant.n, variant.rows);
    // The grid's stride is added to a tile's number before it is compared.
    if (tiles > std::numeric_limits<int>::max() - multiprocessors) refuse("too many output pixels");

    const EncodeTiled encode = encode_tiled();
    CUtensorMap x = tensor_map<4>(
        encode, dtype.in_map, call.x, {call.in_channels, call.width, call.height, call.frames},
        {kSlab, kPatchWidth, variant.box_rows, 1});
    CUtensorMap weight = tensor_map<5>(
        encode, dtype.in_map, call.weight,
        {call.in_channels, call.spatial, call.spatial, call.kernel_t, call.out_channels},
        {kSlab, 1, 1, 1, variant.n});
    SliceConvArgs args{shape, reinterpret_cast<const void*>(call.bias),
                       reinterpret_cast<const void*>(call.residual), reinterpret_cast<void*>(call.out)};

    launch<3>(variant.kernels[dtype.element], static_cast<int>(std::min<int64_t>(tiles, multiprocessors)), kThreads,
              variant.shared_bytes, {&x, &weight, &args}, call.stream);
}

}  // namespace flashtalk
