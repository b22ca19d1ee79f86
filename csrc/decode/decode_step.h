// One token for each of up to 32 requests on CUDA: the whole recurrence (recurrence.h) for the tokens, over a
// cache of keys and values that a prefill has begun.
//
//   reads   every layer's weights once a visit and the head once, for all requests together, and each
//           request's keys and values once; activations (a few KB a request and phase) once in every block
//   phases  five a layer: [g|q|k|v] = W rms(u), rotate, append to the cache; attention, a request's keys cut
//           into up to 4 splits; join the splits, u += Wo; silu(a) b of [a|b] = W rms(u); u += Wdown.
//           A grid barrier after each: 5 a layer and visit.
//   forms   `persistent`: one cooperative launch a token, a block a multiprocessor; otherwise a launch a
//           phase, made for a CUDA graph. Both call the same functions and give the same bits.
//
// Weights lie in the order in which the lanes of a warp take them to the tensor cores (hrmcore/fragments.py):
// a tile is 16 rows, an item the tile's next 16, 32 or 64 columns. A block owns whole tiles, its 8 warps
// share their items, and the sum of the warps is taken in order: bits depend neither on the grid nor on the
// batch.
//
// A product of the tensor cores has 8 requests for its columns. There are kernels for up to 8, 16 and 32 requests:
// the wider ones multiply what they have read and expanded of a weight with 2 or 4 groups of 8 requests.
#pragma once

#include <cstdint>

#include "core/tensor.h"
#include "gemm/weight_layout.h"

namespace hrmcore {

constexpr int max_batch = 32;  // requests of one step

struct DecodeStep {
  TensorView tokens;     // (B) int32, each in [0, V)
  TensorView positions;  // (B) int32: how many tokens the request's cache holds
  TensorView tables;     // (B, C) int32: the request's pages of 64 tokens in the cache, in order
  TensorView kv;         // (slots, 2, tokens, H, d) bfloat16, or (slots, pages, H, bytes) of int8_page.h in
                         // uint8; the token's keys and values are written
  TensorView embedding;  // (V, D) bfloat16
  TensorView z_init;     // (D) float32
  TensorView rope;       // (P, d) float32
  TensorView log_decay;  // (d / 2) float32 for xPos, or none
  TensorView weights;    // bytes: L's layers, H's layers (if any), head; in a layer gqkv, o, gate_up, down
  TensorView logits;     // (B, V) float32, written
  TensorView workspace;  // decode_workspace_bytes() bytes, zero before the first step
  std::int64_t ffn, l_layers, h_layers;  // h_layers 0: one stack for both
  std::int64_t h_cycles, l_cycles;
  double eps, embedding_scale;
  std::int64_t window;  // of the attention, a multiple of 64, or 0
  Packing packing;      // bf16, int8 or int4
  bool persistent;
  std::int64_t blocks;  // 0: one for each multiprocessor

  bool int8_cache() const { return kv.dtype == DType::u8; }
  std::int64_t heads() const { return kv.shape[int8_cache() ? 2 : 3]; }
  std::int64_t cache_pages() const { return int8_cache() ? kv.shape[1] : kv.shape[2] / 64; }
};

// What decides of how many requests a step has room for, on the device in use: its shared memory holds their
// activations, angles and lists of pages.
struct DecodeRoom {
  std::int64_t width, ffn, heads, head_dim;
  bool xpos, int8_cache;
  std::int64_t window, table_length;
  Packing packing;
  std::int64_t blocks;
  std::int64_t* most;  // written: from 0 to max_batch
};

void check(const DecodeRoom& args);

std::int64_t decode_workspace_bytes(std::int64_t width, std::int64_t ffn, std::int64_t heads,
                                    std::int64_t head_dim);

// Throws std::invalid_argument. Values that lie on the device are not read: tokens, positions and pages out
// of range are taken to be the nearest in range.
void check(const DecodeStep& args);

}  // namespace hrmcore
