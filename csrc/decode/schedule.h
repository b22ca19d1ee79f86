// What both sides of a step know, the host that launches it and the kernels: the sequence of its phases, and
// where weights and activations lie.
#pragma once

#include <cstddef>
#include <cstdint>

#include <type_traits>

#include "core/tensor.h"
#include "decode/decode_step.h"
#include "gemm/weight_layout.h"

namespace hrmcore::cuda {

constexpr int tile_rows = 16;
constexpr int max_kv_splits = 4;  // of a request's keys, at most
constexpr int page_tokens = 64;
constexpr std::int64_t bf16_bytes = 2;

// An item of a tile: what one 16-byte piece for each lane holds, and the scales (bfloat16) of its 16 rows.
template <Packing packing>
struct ItemOf;
template <>
struct ItemOf<Packing::bf16> {
  static constexpr int columns = 16, groups = 0;
};
template <>
struct ItemOf<Packing::int8> {
  static constexpr int columns = 32, groups = 1;
};
template <>
struct ItemOf<Packing::int4> {
  static constexpr int columns = 64, groups = 2;
};
constexpr int fragment_bytes = 512, group_scale_bytes = 32;
template <Packing packing>
constexpr int item_bytes = fragment_bytes + ItemOf<packing>::groups * group_scale_bytes;

struct Item {
  int columns, bytes;
};
template <Packing packing>
constexpr Item item_of = {ItemOf<packing>::columns, item_bytes<packing>};

// The head of int4 weights is int8, as the CPU engine's.
HRMCORE_HOST_DEVICE constexpr Packing head_packing(Packing packing) {
  return packing == Packing::int4 ? Packing::int8 : packing;
}

inline Item item(Packing packing) {
  return packing == Packing::int4   ? item_of<Packing::int4>
         : packing == Packing::int8 ? item_of<Packing::int8>
                                    : item_of<Packing::bf16>;
}

enum class Phase : std::uint8_t { gqkv, attention, o, gate_up, down, head };

struct SchedulePoint {
  int visit, layer, slot;
  Phase phase;
};

// The order of a step's phases: five a layer, the layers of a visit, the visits, the head.
struct Schedule {
  int l_layers, h_layers, h_cycles, l_cycles;

  HRMCORE_HOST_DEVICE bool is_h(int visit) const { return visit % (l_cycles + 1) == l_cycles; }
  HRMCORE_HOST_DEVICE int layers(int visit) const { return is_h(visit) ? h_layers : l_layers; }
  HRMCORE_HOST_DEVICE int visits() const { return h_cycles * (l_cycles + 1); }

  HRMCORE_HOST_DEVICE int slots() const { return h_cycles * (l_cycles * l_layers + h_layers); }
  HRMCORE_HOST_DEVICE int phases() const { return 5 * slots() + 1; }
  HRMCORE_HOST_DEVICE SchedulePoint after(SchedulePoint at) const {
    if (at.phase != Phase::down) {
      at.phase = static_cast<Phase>(static_cast<int>(at.phase) + 1);
      return at;
    }
    at.phase = Phase::gqkv;
    ++at.slot;
    if (++at.layer == layers(at.visit)) {
      at.layer = 0;
      if (++at.visit == visits()) at.phase = Phase::head;
    }
    return at;
  }
};

struct Matrix {
  const std::byte* data;
  int tiles, items;
};

// The parameters of every kernel of a step: its schedule, shapes, and where everything lies.
struct DecodeParams {
  int batch, width, ffn, heads, head_dim, vocabulary;
  Schedule schedule;
  int window, table_length, cache_pages, rotations;
  Item item, head_item;
  float eps, embedding_scale;
  const std::int32_t *tokens, *positions, *tables;
  const void* embedding;
  const float *z_init, *rope, *log_decay;
  void* kv;
  const std::byte *l_weights, *h_weights, *head_weights;
  float *logits, *streams[2], *states[2], *gate, *q, *split_lse;
  void *x, *split_out, *hidden;
  std::uint32_t* barrier;

  // Places what a step keeps between its phases, for 8 requests, from `base` on; returns its bytes. A null
  // base only counts.
  std::int64_t place_workspace(std::byte* base) {
    std::int64_t used = 0;
    const auto place = [&](auto*& at, std::int64_t count, std::int64_t element) {
      at = reinterpret_cast<std::remove_reference_t<decltype(at)>>(base == nullptr ? nullptr : base + used);
      used += (count * element + 255) / 256 * 256;
    };
    const std::int64_t row = max_batch * width, heads_row = max_batch * attention_width();
    place(barrier, 1, sizeof(std::uint32_t));
    for (float*& stream : streams) place(stream, row, sizeof(float));
    for (float*& state : states) place(state, row, sizeof(float));
    place(gate, heads_row, sizeof(float));
    place(q, heads_row, sizeof(float));
    place(split_lse, max_batch * max_kv_splits * heads, sizeof(float));
    place(x, row, bf16_bytes);
    place(split_out, max_kv_splits * heads_row, bf16_bytes);
    place(hidden, max_batch * ffn, bf16_bytes);
    return used;
  }

  HRMCORE_HOST_DEVICE int attention_width() const { return heads * head_dim; }

  HRMCORE_HOST_DEVICE Matrix matrix(const std::byte* data, int rows, int depth) const {
    return {data, (rows + tile_rows - 1) / tile_rows, (depth + item.columns - 1) / item.columns};
  }
  HRMCORE_HOST_DEVICE Matrix head_matrix() const {
    return {head_weights, (vocabulary + tile_rows - 1) / tile_rows,
            (width + head_item.columns - 1) / head_item.columns};
  }
  HRMCORE_HOST_DEVICE std::int64_t bytes(const Matrix& m) const {
    return static_cast<std::int64_t>(m.tiles) * m.items * item.bytes;
  }

  // What a phase of a layer multiplies with; for the attention, the GEMM after it.
  HRMCORE_HOST_DEVICE Matrix matrix(const SchedulePoint& at) const {
    const std::byte* layer = (schedule.is_h(at.visit) ? h_weights : l_weights) + at.layer * layer_bytes();
    const Matrix gqkv = matrix(layer, 4 * attention_width(), width);
    if (at.phase == Phase::gqkv) return gqkv;
    const Matrix o = matrix(gqkv.data + bytes(gqkv), width, attention_width());
    if (at.phase == Phase::attention || at.phase == Phase::o) return o;
    const Matrix gate_up = matrix(o.data + bytes(o), 2 * ffn, width);
    if (at.phase == Phase::gate_up) return gate_up;
    return matrix(gate_up.data + bytes(gate_up), width, ffn);
  }
  HRMCORE_HOST_DEVICE std::int64_t layer_bytes() const {
    return bytes(matrix(nullptr, 4 * attention_width(), width)) +
           bytes(matrix(nullptr, width, attention_width())) + bytes(matrix(nullptr, 2 * ffn, width)) +
           bytes(matrix(nullptr, width, ffn));
  }
};

}  // namespace hrmcore::cuda
