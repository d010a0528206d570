// The host side of attention: check -> tensor maps -> launch.
#pragma once

#include <array>
#include <cstdint>

namespace flashtalk {

// Device pointers to bf16 tensors of heads of 128 columns; the columns are contiguous, and pointers and
// strides are multiples of 16 bytes.  Strides in elements: of the batch, of a row, of a head.
//   out[b, i, h] = sum over j of softmax_j(q[b, i, h] . k[b, j, h] / sqrt(128)) v[b, j, h]
// Nothing past `length` queries or `keys` keys is read or written.
struct ChunkAttentionCall {
    uintptr_t q, k, v;  // [batch, length or keys, heads, 128]
    uintptr_t out;      // [batch, length, heads, 128], contiguous; overlaps none of the others
    std::array<int64_t, 3> q_strides, k_strides, v_strides;
    int batch, length, keys, heads;
    int device;
    uintptr_t stream;
};

// Enqueues the attention.  std::invalid_argument for sizes, strides or pointers the kernel does not take;
// std::runtime_error, naming the call and the value, for an error of CUDA.  May be captured in a graph.
void chunk_attention(const ChunkAttentionCall& call);

}  // namespace flashtalk
