// The host side of cross-attention to text and image: check -> tensor maps -> launch.
#pragma once

#include <cstdint>

namespace flashtalk {

extern const int kCrossFewestImageKeys, kCrossMostImageKeys;  // that the kernel takes
extern const int kCrossTextKeys;                              // visible ones that it takes

// Device pointers to contiguous bf16 tensors [batch, rows, heads, 128], aligned to 16 bytes.
//   out[b, i, h] = sum over t of softmax_t(q . text_k[b, t, h] / sqrt(128) + text_bias[b, t]) text_v[b, t, h]
//                + sum over j of softmax_j(q . image_k[b, j, h] / sqrt(128)) image_v[b, j, h]
// A bias of -inf hides a text key; nothing behind the last visible one matters, whatever its value.  A batch with
// more than kCrossTextKeys up to there is left alone: its part of `out` is not written.
struct CrossAttentionCall {
    uintptr_t q, text_k, text_v, image_k, image_v;
    uintptr_t text_bias;  // float32 [text] or [batch, text]; 0: none, and then `text` is kCrossTextKeys at most
    uintptr_t out;        // as q; overlaps none of the others
    int batch, length, text, image, heads;
    bool shared_bias;  // [text]
    int device;
    uintptr_t stream;
};

// Enqueues the attention.  std::invalid_argument for sizes or pointers the kernel does not take;
// std::runtime_error, naming the call and the value, for an error of CUDA.  May be captured in a graph.
void cross_attention(const CrossAttentionCall& call);

}  // namespace flashtalk
