#include "api/cross_attention.h"

#include <algorithm>
#include <array>
#include <limits>
#include <string>

#include "api/attention_call.h"
#include "include/cross_attention.h"

namespace flashtalk {
namespace {

using namespace attention;
using namespace attention::cross;

constexpr Checks kChecks{"cross_attention"};

struct Maps {  // the kernel's parameter
    std::array<CUtensorMap, kMaps> map;
};

}  // namespace

const int kCrossFewestImageKeys = kImage, kCrossMostImageKeys = kImage + kTail;
const int kCrossTextKeys = kText;

void cross_attention(const CrossAttentionCall& call) {
    kChecks.positive("batch", call.batch);
    kChecks.positive("length", call.length);
    kChecks.positive("text", call.text);
    kChecks.positive("heads", call.heads);
    if (call.image < kCrossFewestImageKeys || call.image > kCrossMostImageKeys) {
        kChecks.refuse("image is " + std::to_string(call.image) + "; it must be " +
                       std::to_string(kCrossFewestImageKeys) + " to " + std::to_string(kCrossMostImageKeys));
    }
    if (call.text_bias == 0 && call.text > kCrossTextKeys) {
        kChecks.refuse("text is " + std::to_string(call.text) + " without a bias; it must be " +
                       std::to_string(kCrossTextKeys) + " or less");
    }
    kChecks.pointer("q", call.q);
    kChecks.pointer("text_k", call.text_k);
    kChecks.pointer("text_v", call.text_v);
    kChecks.pointer("image_k", call.image_k);
    kChecks.pointer("image_v", call.image_v);
    kChecks.pointer("out", call.out);
    if (std::max(call.length, call.text) > std::numeric_limits<int>::max() / 2) kChecks.refuse("too many rows");
    if (call.heads > std::numeric_limits<int>::max() / kDim) kChecks.refuse("too many heads");
    Shape shape{call.batch, call.heads, call.length, call.text, call.image, call.shared_bias ? 0 : call.text};
    const int64_t tiles = tile_count(shape);
    // Tiles are counted beyond the last one, in 32 bits.
    if (tiles > std::numeric_limits<int>::max() / 2) kChecks.refuse("too many queries");
    FT_CHECK_CUDA(cudaSetDevice(call.device));

    const EncodeTiled encode = encode_tiled();
    const auto of = [&](uintptr_t data, int rows, int box_rows) {
        return tensor_map(encode, Operand::contiguous(data, call.batch, rows, call.heads), box_rows);
    };
    Maps maps;
    maps.map[kQueryMap] = of(call.q, call.length, kMmaRows);
    maps.map[kImageKeys] = of(call.image_k, call.image, kImage);
    maps.map[kImageValues] = of(call.image_v, call.image, kImage);
    maps.map[kTailKeys] = of(call.image_k, call.image, kTail);
    maps.map[kTailValues] = of(call.image_v, call.image, kTail);
    maps.map[kTextKeys] = of(call.text_k, call.text, kText);
    maps.map[kTextValues] = of(call.text_v, call.text, kText);
    const auto* bias = reinterpret_cast<const float*>(call.text_bias);
    auto* out = reinterpret_cast<uint16_t*>(call.out);

    const int64_t multiprocessors = attribute(cudaDevAttrMultiProcessorCount, call.device);
    launch<4>(kKernel, static_cast<int>(std::min(tiles, multiprocessors)), kThreads, kSharedBytes,
              {&maps, &shape, &bias, &out}, call.stream);
}

}  // namespace flashtalk
