// What both sides of a decode step know, the host that launches it and the kernels: the order of its phases,
// how a matrix is shared out, and where weights and activations lie.
#pragma once

#include <cstddef>
#include <cstdint>

#include <type_traits>

#include "core/tensor.h"
#include "decode/decode_step.h"
#include "decode/int8_page.h"
#include "gemm/weight_layout.h"

namespace hrmcore::cuda {

constexpr int decode_warps = 8, decode_threads = 32 * decode_warps;
constexpr int tile_rows = 16;
constexpr int max_kv_splits = 8;  // of a request's keys, at most
constexpr int page_tokens = 64;
constexpr int product_columns = 8;  // requests of one product of the tensor cores
constexpr int partial_slots = 4;    // a tile's sums of 8 requests each, between two barriers of the block
constexpr std::int64_t bf16_bytes = 2;

constexpr int max_of(int a, int b) { return a > b ? a : b; }

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

// What a warp loads and consumes at once: items of weights, or its 8 rows of a page of keys or values. A stage is a
// wait, and room in the ring: of 1,536 columns an int8 or int4 stage is all of a warp's share of a tile.
template <Packing packing>
constexpr int stage_items = packing == Packing::int8   ? 6
                            : packing == Packing::int4 ? 3
                                                       : 4;
constexpr int page_rows_of_warp = page_tokens / decode_warps;
template <Packing packing>
constexpr int stage_weights = stage_items<packing> * item_bytes<packing>;  // bytes
constexpr int page_stage = page_rows_of_warp * 128 * 2;                    // of head_dim 128
constexpr int int8_page_stage = page_rows_of_warp * (2 * 128 + Int8Page::scale_bytes);
template <Packing packing, class P>
constexpr int stage_bytes = max_of(stage_weights<packing>, P::int8_cache ? int8_page_stage : page_stage);

struct Item {
  int columns, bytes, of_stage;
};
template <Packing packing>
constexpr Item item_of = {ItemOf<packing>::columns, item_bytes<packing>, stage_items<packing>};

// The head of int4 weights is int8, as the CPU engine's.
HRMCORE_HOST_DEVICE constexpr Packing head_packing(Packing packing) {
  return packing == Packing::int4 ? Packing::int8 : packing;
}

inline Item item(Packing packing) {
  return packing == Packing::int4   ? item_of<Packing::int4>
         : packing == Packing::int8 ? item_of<Packing::int8>
                                    : item_of<Packing::bf16>;
}

enum class Phase : int { gqkv, attention, o, gate_up, down, head };
constexpr int phase_count = 6;

struct SchedulePoint {
  int visit, l, layer, slot;  // l: which of its H cycle's visits; after those of L comes H's
  Phase phase;
};

// The order of a step's phases: five a layer, the layers of a visit, the visits, the head.
struct Schedule {
  int l_layers, h_layers, h_cycles, l_cycles;

  HRMCORE_HOST_DEVICE bool is_h(const SchedulePoint& at) const { return at.l == l_cycles; }
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
    if (++at.layer == (is_h(at) ? h_layers : l_layers)) {
      at.layer = 0;
      at.l = is_h(at) ? 0 : at.l + 1;
      if (++at.visit == visits()) at.phase = Phase::head;
    }
    return at;
  }
};

// A matrix as a step walks through it. The tiles of all matrices are dealt to the blocks in one sequence, so
// that every block gets its share of the bytes; a warp owns `warp_items` neighbouring items of each tile.
struct MatrixShape {
  int tiles, sixteens, items, warp_items;  // sixteens: of its columns
  int stages;                              // of a warp, a tile
  std::int64_t tile_bytes, offset;         // in the layer
};

inline MatrixShape matrix_shape(std::int64_t rows, std::int64_t depth, Item item, std::int64_t offset) {
  MatrixShape shape{};
  shape.tiles = static_cast<int>((rows + tile_rows - 1) / tile_rows);
  shape.sixteens = static_cast<int>(depth / 16);
  shape.items = static_cast<int>((depth + item.columns - 1) / item.columns);
  shape.warp_items = (shape.items + decode_warps - 1) / decode_warps;
  shape.stages = (shape.warp_items + item.of_stage - 1) / item.of_stage;
  shape.tile_bytes = static_cast<std::int64_t>(shape.items) * item.bytes;
  shape.offset = offset;
  return shape;
}

// The parameters of every kernel of a step: its schedule, shapes, and where everything lies.
//
// Activations lie in the order in which the tensor cores take them: of each 16 columns, each request's 16 in
// turn, (D / 16, rows, 16). A kernel has a row for each of its requests; one whose activations stream has 8, 16
// or 32, as many as it takes requests, and what lies in those of no request is nobody's.
struct DecodeParams {
  static constexpr int column_groups = 1;   // of 8 requests, that one read of a weight is multiplied with
  static constexpr bool streaming = false;  // activations come straight to registers, beside the products
  static constexpr bool any_shape = true;
  static constexpr bool int8_cache = false;
  static constexpr int page_stages = 2;  // of a ring: keys, then values
  static constexpr bool single = false;  // one request alone

  Schedule schedule;
  int batch, width, ffn, heads, head_dim, head_shift, vocabulary;  // head_dim = 1 << head_shift
  std::uint32_t inverse_batch;  // 2^32 over the batch, rounded up: divides what is far below 2^29
  int window, table_length, cache_pages, rotations;
  bool splits_apart;  // each split of the keys in a block of its own, rather than all of a head's in one
  Item item, head_item;
  MatrixShape shapes[phase_count];  // by phase; attention has none
  std::int64_t layer_bytes;
  float eps, inverse_width, embedding_scale, query_scale;  // query_scale: 1 / (sqrt(d) log 2)
  const std::int32_t *tokens, *positions, *tables;
  const void* embedding;
  const float *z_init, *rope, *log_decay;
  void* kv;
  const std::byte *l_weights, *h_weights, *head_weights;
  float *logits, *streams[2], *states[2], *squares, *gate, *split_lse, *fresh;
  void *x, *q, *attended, *hidden;  // q: of each two channels the first halves of their sums, then the second
  // fresh: the new tokens' keys, then values, for an int8 cache
  std::uint32_t* barrier;

  // Places what a step keeps between its phases, for max_batch requests, from `base` on; returns its bytes. A null
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
    place(squares, row / tile_rows, sizeof(float));
    place(gate, heads_row, sizeof(float));
    place(q, 2 * heads_row, bf16_bytes);
    place(fresh, 2 * heads_row, sizeof(float));
    place(split_lse, max_batch * max_kv_splits * heads, sizeof(float));
    place(x, row, bf16_bytes);
    place(attended, max_kv_splits * heads_row, bf16_bytes);
    place(hidden, max_batch * ffn, bf16_bytes);
    return used;
  }

  // Cuts the weights' bytes into matrices; returns how many there are of them.
  std::int64_t place_weights(const std::byte* base, std::int64_t own_layers_of_h) {
    std::int64_t used = 0;
    const auto place = [&](Phase phase, std::int64_t outputs, std::int64_t depth) {
      MatrixShape& shape = shapes[static_cast<int>(phase)] = matrix_shape(outputs, depth, item, used);
      used += shape.tiles * shape.tile_bytes;
    };
    place(Phase::gqkv, 4 * attention_width(), width);
    place(Phase::o, width, attention_width());
    place(Phase::gate_up, 2 * ffn, width);
    place(Phase::down, width, ffn);
    layer_bytes = used;
    const std::int64_t h_begins = own_layers_of_h > 0 ? schedule.l_layers * layer_bytes : 0,
                       head_begins = (schedule.l_layers + own_layers_of_h) * layer_bytes;
    l_weights = base;
    h_weights = base == nullptr ? nullptr : base + h_begins;
    head_weights = base == nullptr ? nullptr : base + head_begins;
    MatrixShape& head = shapes[static_cast<int>(Phase::head)] = matrix_shape(vocabulary, width, head_item, 0);
    return head_begins + head.tiles * head.tile_bytes;
  }

  HRMCORE_HOST_DEVICE int attention_width() const { return heads * head_dim; }
  HRMCORE_HOST_DEVICE int rows() const { return batch; }  // of activations
  HRMCORE_HOST_DEVICE const MatrixShape& shape(Phase phase) const { return shapes[static_cast<int>(phase)]; }
};

// The same where head_dim is 128 and positions are RoPE: constants, so that a kernel has no code for other shapes.
struct PlainParams : DecodeParams {
  static constexpr int head_dim = 128, head_shift = 7;
  static constexpr const float* log_decay = nullptr;
  static constexpr bool any_shape = false;

  HRMCORE_HOST_DEVICE int attention_width() const { return heads * head_dim; }
};

// And of one request alone, whose number every index is then free of.
struct SingleParams : PlainParams {
  static constexpr bool single = true;
  static constexpr int batch = 1;

  HRMCORE_HOST_DEVICE static constexpr int rows() { return 1; }
};

// Any of these over an int8 cache, whose pages are those of int8_page.h.
template <class Base>
struct Int8Cache : Base {
  static constexpr bool int8_cache = true;
  static constexpr int page_stages = 1;  // keys, values and their scales

  HRMCORE_HOST_DEVICE Int8Page page() const { return {this->head_dim}; }
  // Where a page of a head begins.
  HRMCORE_HOST_DEVICE std::byte* page_at(int slot, int page_number, int head) const {
    const std::int64_t number =
        (slot * this->cache_pages + page_number) * this->heads + head;  // fits 32 bits
    return static_cast<std::byte*>(this->kv) + number * page().bytes();
  }
};

// Any of these but the single one for up to 8 times `groups` requests, whose activations stream: those of all columns
// need no room in shared memory, so that rings are deeper.
template <class Base, int groups>
struct StreamingParams : Base {
  static constexpr int column_groups = groups;
  static constexpr bool streaming = true;

  HRMCORE_HOST_DEVICE static constexpr int rows() { return groups * product_columns; }
};

}  // namespace hrmcore::cuda
