// The host side of eight-bit attention: check -> tensor maps -> launch.
#pragma once

#include <cstdint>

namespace flashtalk {

// Device pointers, each to a contiguous tensor aligned to 16 bytes.
//   out[b, i, h] = v_mean[b, h] + sum over j of softmax_j(q[b, i, h] . k[b, j, h] / sqrt(128)) v[b, j, h]
// where q, k and v are their integers or float8 times their scales.  Nothing past `length` queries is written;
// past `keys` keys the values must be zeros.
struct QuantizedAttentionCall {
    uintptr_t q;        // int8 [batch, length, heads, 128]
    uintptr_t k;        // int8 [batch, keys, heads, 128]
    uintptr_t v;        // e4m3 [batch, heads, 128, keys padded to 32], each 32 keys in the order of position_key()
    uintptr_t q_scale;  // float [batch, heads, length]
    uintptr_t k_scale;  // float [batch, heads, tiles of kQuantizedTileKeys keys]
    uintptr_t v_scale;  // float [batch, heads]
    uintptr_t v_mean;   // float [batch, heads, 128]
    uintptr_t out;      // bf16 [batch, length, heads, 128]; overlaps none of the others
    int batch, length, keys, heads;
    int device;
    uintptr_t stream;
};

extern const int kQuantizedTileKeys;  // keys that share a scale

// Enqueues the attention.  std::invalid_argument for sizes or pointers the kernel does not take;
// std::runtime_error, naming the call and the value, for an error of CUDA.  May be captured in a graph.
void quantized_attention(const QuantizedAttentionCall& call);

}  // namespace flashtalk
