// Gated prefix attention over packed sequences, online softmax: no (T, T) tensor and no mask tensor.
//
//   Query i of a sequence stands at p = (key length - query length) + i and sees key j iff
//   j < max(prefix, p + 1). With a window W, only if also |floor(p / W) - floor(j / W)| <= 1: its own block
//   of W and the blocks beside it. With log_decay (xPos, arXiv 2212.10554), q . k stands for the sum over
//   channels c of q_c k_c exp(log_decay[c mod d/2] |p - j|), q and k rotated already.
//   forward:   lse_i = log sum_j exp(q_i . k_j / sqrt(d))
//              o_i = sum_j exp(q_i . k_j / sqrt(d) - lse_i) v_j
//              out = sigmoid(gate) * o
//   backward:  P recomputed from lse; with g = sigmoid(gate) and delta_i = sum_d grad_out * out:
//              grad_gate = grad_out * out * (1 - g),  dO = grad_out * g,  dS = P * (dO v^T - delta)
//              grad_v = P^T dO,  grad_q = dS k / sqrt(d),  grad_k = dS^T q / sqrt(d)
//
// T query rows, Tk key rows, H heads, d head_dim (a multiple of 8, at most 256), S sequences. q, k, v, gate
// and out share one dtype, float32 or bfloat16, with unit stride in d and any stride before it; arithmetic in
// float32. Sequence s owns query rows offsets[s]..offsets[s+1] and key rows key_offsets[s]..key_offsets[s+1];
// either may be empty. Source: the mask of HRM-Text, arXiv 2605.20613; online softmax and recomputation,
// arXiv 2205.14135.
//
// With N visible (query, key) pairs: forward 4 N d H FLOPs and N H exponentials, backward 10 N d H and N H.
// Moves at least 3 T H d + 2 Tk H d elements and T H floats forward, 6 T H d + 4 Tk H d elements and T H
// floats backward; keys and values are read again for each block of 32 queries that sees them, from cache for
// as long as a head's keys fit there. Each pair of backward tasks (sequence, head) is independent: one
// sequence with one head runs on one thread.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"

namespace hrmcore {

struct AttentionForward {
  TensorView q;            // (T, H, d)
  TensorView k;            // (Tk, H, d)
  TensorView v;            // (Tk, H, d)
  TensorView gate;         // (T, H, d)
  TensorView offsets;      // (S + 1) int32
  TensorView key_offsets;  // (S + 1) int32
  TensorView prefix;       // (S) int32
  TensorView out;          // (T, H, d), written
  TensorView lse;          // (T, H) float32, written
  TensorView log_decay;    // (d / 2) float32 in [-0.5, 0], or none
  std::int64_t window;     // a multiple of 64; 0 is none
  TensorView tiles;        // (N, 8) int32, from attention_table; bfloat16 on CUDA only
};

struct AttentionBackward {
  TensorView q, k, v, gate, offsets, key_offsets, prefix, out, lse;  // as in the forward
  TensorView grad_out;                                               // (T, H, d)
  TensorView grad_q;                                                 // (T, H, d), written
  TensorView grad_k,
      grad_v;            // (Tk, H, d), written; float32, since the CPU sums in place; on CUDA also q's dtype
  TensorView grad_gate;  // (T, H, d), written
  TensorView log_decay;  // as in the forward
  std::int64_t window;
  // What bfloat16 on CUDA needs besides; None elsewhere.
  TensorView tiles;      // as in the forward
  TensorView ungated;    // (T, H, d): grad_out * sigmoid(gate); may be grad_out itself
  TensorView row_terms;  // (2, H, T) float32: lse / log 2, then delta
  // Where they are given, grad_q and grad_k are those of the rows before ops/rope.h turned them; bfloat16 on CUDA
  // only, keys that lie as queries do. A position outside of the table gives NaNs.
  TensorView table;      // (P, d) float32, as in rope.h
  TensorView positions;  // (T) int32
};

// Tiles of 64 rows, and the lines that a table of them needs for any lengths of S sequences.
constexpr std::int64_t tile_rows = 64, line_ints = 8;
constexpr std::int64_t lines_of_table(std::int64_t rows, std::int64_t sequences) {
  return rows / tile_rows + sequences;
}

// Which 64 rows of which sequence each block takes, those that visit most rows first: a table over queries, then
// one over keys. It depends on the mask alone, so that one serves all calls of a step. CUDA only.
struct AttentionTable {
  TensorView offsets, key_offsets, prefix;  // as in the forward
  std::int64_t query_rows, key_rows;        // T, Tk
  std::int64_t window;
  TensorView tiles;  // (N, 8) int32, written; N is lines_of_table of T and that of Tk together
};

void check(const AttentionForward& args);
void check(const AttentionBackward& args);
void check(const AttentionTable& args);
HRMCORE_DECLARE_KERNEL(attention_forward, AttentionForward)
HRMCORE_DECLARE_KERNEL(attention_backward, AttentionBackward)

}  // namespace hrmcore
