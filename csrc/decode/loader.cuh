// What a decode step reads from memory, weights, keys and values, streams through a ring of each warp's own, in
// the order of the schedule and ahead of it. A warp loads for itself, a stage at a time; the ring runs on over
// the end of a phase, since neither weights nor the keys of earlier tokens depend on one.
#pragma once

#include <cstddef>

#include "core/cuda.cuh"
#include "decode/int8_page.cuh"
#include "decode/schedule.h"

namespace hrmcore::cuda {

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / 32); }
__device__ __forceinline__ int clamped(int value, int count) { return max(0, min(value, count - 1)); }

// Shared memory begins with what a launch reads once, and the sums of squares of each warp's columns. After it
// lie, where SharedLayout says: angles (B, d) of up to 8 requests, xPos's decay (d / 2), the block's list of pages,
// partial sums of tiles (or what the attention exchanges), activations, rings.
struct RequestState {
  std::int64_t slot_mapping[max_batch];         // the cache's row of the new token
  int position[max_batch];                      // of the new token
  int first_page[max_batch], pages[max_batch];  // of the keys that it sees
  int kv_splits[max_batch];                     // into which these are cut
  alignas(16) float squares[decode_warps * max_batch];
  int page_entries[1];  // of the block's list of pages
};
struct SharedLayout {
  int angles, log_decay, pages, partials, activations, rings;  // offsets in bytes
  int tiles_together;                                          // for which there are partial sums
  int held_columns;  // of a warp's share, whose activations have room
};
constexpr int request_state_bytes = (static_cast<int>(sizeof(RequestState)) + 127) / 128 * 128;
constexpr int tile_partials = decode_warps * tile_rows * product_columns;  // float32, of 8 requests

#define HRMCORE_REQUEST_STATE(T, member) shared_array<T>(offsetof(RequestState, member))

template <Packing packing>
constexpr int stage_pieces = stage_weights<packing> / 16;

// A page that this block attends to: where its rows begin in the cache, whose they are, and how many of them are
// earlier than the new token. Listed once a launch, in the order in which every layer takes them.
struct alignas(16) PageEntry {
  enum Marks { task_begins = 1, split_ends = 2, task_ends = 4, task_has_own_row = 8 };
  int row, request, head, earlier, split, marks;
};
static_assert(sizeof(PageEntry) == 32);

// A page of a request's table.
template <class P>
__device__ __forceinline__ int page_of(const P& params, int request, int number) {
  return clamped(load_one(params.tables + request * params.table_length + number), params.cache_pages);
}

// The pages that one task of the attention reads: a head's of a request, all or those of one split.
struct AttentionTask {
  int request, head, first_split, last_split, page, end;

  __device__ __forceinline__ bool any() const { return first_split < last_split; }
};

// Where a split of a request's pages begins.
__device__ __forceinline__ int split_begin(int request, int split) {
  const int first = HRMCORE_REQUEST_STATE(int, first_page)[request],
            pages = HRMCORE_REQUEST_STATE(int, pages)[request],
            count = HRMCORE_REQUEST_STATE(int, kv_splits)[request];
  return first + static_cast<int>(static_cast<unsigned>(pages * split) / static_cast<unsigned>(count));
}

template <class P>
__device__ __forceinline__ int attention_tasks(const P& params) {
  return params.batch * params.heads * (params.splits_apart ? max_kv_splits : 1);
}

// The split is a task's slowest index: there are fewer of them than tasks have room for.
template <class P>
__device__ __forceinline__ AttentionTask attention_task(const P& params, int number) {
  const unsigned rows = static_cast<unsigned>(params.batch * params.heads);
  const unsigned split = static_cast<unsigned>(number) / rows,
                 row = static_cast<unsigned>(number) - split * rows;
  AttentionTask task{};
  task.request = static_cast<int>(row / static_cast<unsigned>(params.heads));
  task.head = static_cast<int>(row) - task.request * params.heads;
  const int count = HRMCORE_REQUEST_STATE(int, kv_splits)[task.request];
  task.first_split = params.splits_apart ? static_cast<int>(split) : 0;
  task.last_split = params.splits_apart ? min(task.first_split + 1, count) : count;
  if (task.any()) {
    task.page = split_begin(task.request, task.first_split);
    task.end = split_begin(task.request, task.last_split);
  }
  return task;
}

// Keys (which = 0) or values (1) of a slot: (tokens, attention width).
template <class P>
__device__ __forceinline__ bf16* cache_of(const P& params, int slot, int which) {
  const std::int64_t rows = static_cast<std::int64_t>(params.cache_pages) * page_tokens;
  return static_cast<bf16*>(params.kv) + (2 * slot + which) * rows * params.attention_width();
}

// The first tile of this block when as many blocks as `dealt` have had a tile more than it.
__device__ __forceinline__ int first_tile(int dealt) {
  const int tile = static_cast<int>(blockIdx.x) - dealt;
  return tile < 0 ? tile + static_cast<int>(gridDim.x) : tile;
}

// A warp's stages, in the order in which it consumes them. `stages - 1` of them are on their way at any time.
//
//   wait()    the offset in shared memory of the next stage, which has landed for the whole warp
//   refill()  once the warp's lanes have read it: the next one to load, into the place of the stage before
template <Packing packing, int stages, class P>
class Loader {
  static constexpr int stage_size = stage_bytes<packing, P>;

 public:
  // The stages of `phases` phases from `first` on, whose first tile for this block is `tile`.
  __device__ __forceinline__ Loader(const P& params, const SharedLayout& layout, SchedulePoint first,
                                    int phases, int tile)
      : params_(params),
        layout_(layout),
        ring_(layout.rings + warp_id() * stages * stage_size),
        slot_(ring_),
        at_(first),
        phases_left_(phases),
        tile_(tile) {
#pragma unroll 1
    for (int stage = 0; stage < stages - 1; ++stage) load(ring_ + stage * stage_size);
  }

  __device__ __forceinline__ int wait() const {
    wait_for_copies<stages - 2>();
    __syncwarp();  // other lanes' copies, and other lanes have read the stage before
    return slot_;
  }
  __device__ __forceinline__ void refill() {
    constexpr int last = (stages - 1) * stage_size;
    load(slot_ == ring_ ? ring_ + last : slot_ - stage_size);
    slot_ = slot_ == ring_ + last ? ring_ : slot_ + stage_size;
  }

 private:
  // Copies of a stage of items for this lane, and where they begin from `next_` on: an instruction reaches 2 KB either
  // way.
  static constexpr int copies = (stage_pieces<packing> + 31) / 32, from_next = copies > 4 ? -2048 : 0;

  __device__ __forceinline__ void load(int slot) {
    if (pieces_left_ < stage_pieces<packing>) {
      if (stages_left_ == 0) enter_run();
      if (pieces_left_ < stage_pieces<packing>) {
        load_rest(slot);
        commit_copies();
        return;
      }
    }
    std::uint8_t* const place = place_of_lane(slot);
#pragma unroll
    for (int i = 0; i < copies; ++i) {
      if (32 * (i + 1) <= stage_pieces<packing>) {
        copy_async(place + 512 * i, next_ + (512 * i + from_next), 16);
      } else {
        copy_async_if(lane_id() < stage_pieces<packing> - 32 * i, place + 512 * i,
                      next_ + (512 * i + from_next));
      }
    }
    next_ += stage_weights<packing>;
    pieces_left_ -= stage_pieces<packing>;
    --stages_left_;
    commit_copies();
  }

  __device__ __forceinline__ static std::uint8_t* place_of_lane(int slot) {
    return shared_array<std::uint8_t>(static_cast<std::size_t>(slot + 16 * lane_id())).data;
  }

  // What is no whole stage of items: those that are left of a tile, rows of a page, or nothing.
  __device__ __forceinline__ void load_rest(int slot) {
    if (stages_left_ == 0) return;
    --stages_left_;
    if (tiles_ == 0) {
      if constexpr (P::int8_cache) {
        load_int8_page(slot);
      } else {
        load_page(slot);
      }
      return;
    }
    const int pieces = pieces_left_ - lane_id();  // this lane takes each 32nd of them
#pragma unroll
    for (int i = 0; i < copies; ++i) {
      copy_async_if(32 * i < pieces, place_of_lane(slot) + 512 * i, next_ + (512 * i + from_next));
    }
    next_ += stage_weights<packing>;
    pieces_left_ -= stage_pieces<packing>;
  }

  // Of an int8 cache, keys, values and scales at once: 16-byte pieces, each row's in other places (Int8Stage).
  __device__ __forceinline__ void load_int8_page(int slot) {
    const PageEntry entry = shared_array<PageEntry>(static_cast<std::size_t>(layout_.pages))[entry_++];
    const Int8Page page = params_.page();
    const Int8Stage stage{slot, params_.head_dim, params_.head_shift - 4};
    const int first = page_rows_of_warp * warp_id(), earlier = entry.earlier - first, lane = lane_id();
    const int piece = lane & ((1 << stage.shift) - 1),
              page_number = static_cast<int>(static_cast<unsigned>(entry.row) / page_tokens);
    const std::byte* from = params_.page_at(slot_of_cache_, page_number, entry.head);
    const std::byte* rows = from + first * page.head_dim + 16 * lane;
    const auto copy = [](int to, const std::byte* source, bool filled) {
      copy_async(shared_array<std::byte>(static_cast<std::size_t>(to)).data, source, filled ? 16 : 0);
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int inner = (lane >> stage.shift) + i * (32 >> stage.shift);
      if (inner >= page_rows_of_warp) break;
      copy(stage.keys(inner, piece), rows + 512 * i, inner < earlier);
      copy(stage.values(inner, piece), rows + 512 * i + page.values(), inner < earlier);
    }
    if (lane < page_rows_of_warp) {
      copy(stage.scales(lane), from + page.scales() + Int8Page::scale_bytes * (first + lane), lane < earlier);
    }
  }

  // This warp's 8 rows of a page, first of keys and then of values; zeros from the new token on.
  __device__ __forceinline__ void load_page(int slot) {
    const PageEntry entry = shared_array<PageEntry>(static_cast<std::size_t>(layout_.pages))[entry_ / 2];
    const int shift = params_.head_shift - 3;  // 16-byte pieces of a row; a lane's are all of one column
    const int width = params_.attention_width(), first = page_rows_of_warp * warp_id();
    const int column = lane_id() & ((1 << shift) - 1), turn = 32 >> shift;
    int inner = lane_id() >> shift;
    const bf16* row = cache_of(params_, slot_of_cache_, entry_ % 2) +
                      (static_cast<std::int64_t>(entry.row) + first + inner) * width +
                      entry.head * params_.head_dim + 8 * column;
    std::uint8_t* const place = place_of_lane(slot);
#pragma unroll
    for (int i = 0; i < page_rows_of_warp * 128 * 2 / 512; ++i) {
      if (inner >= page_rows_of_warp) break;
      copy_async(place + 512 * i, row, first + inner < entry.earlier ? 16 : 0);
      row += turn * width;
      inner += turn;
    }
    ++entry_;
  }

  // After the end of a run of stages, a tile's or all pages': the block's next tile, or the next phase that has some.
  __device__ __forceinline__ void enter_run() {
    if (tiles_ > 0) {
      tile_ += static_cast<int>(gridDim.x);
      if (tile_ < tiles_) {
        next_ += to_next_tile_;
        stages_left_ = stages_of_tile_;
        pieces_left_ = pieces_of_tile_;
        return;
      }
      tile_ -= tiles_;
    }
    tiles_ = 0;
    while (stages_left_ == 0 && phases_left_ > 0) enter_phase();
  }

  // Begins a phase, or passes it where it has nothing for this block.
  __device__ __forceinline__ void enter_phase() {
    const SchedulePoint at = at_;
    at_ = params_.schedule.after(at_);
    --phases_left_;
    if (at.phase == Phase::attention) {
      entry_ = 0;
      slot_of_cache_ = at.slot;
      stages_left_ = P::page_stages * HRMCORE_REQUEST_STATE(int, page_entries)[0];
      return;
    }
    const MatrixShape& shape = params_.shape(at.phase);
    if (tile_ >= shape.tiles) {
      tile_ -= shape.tiles;
      return;
    }
    const std::byte* base = params_.head_weights;
    if (at.phase != Phase::head) {
      base = (params_.schedule.is_h(at) ? params_.h_weights : params_.l_weights) +
             at.layer * params_.layer_bytes + shape.offset;
    }
    const int first_item = warp_id() * shape.warp_items;
    next_ = base + tile_ * shape.tile_bytes + first_item * item_bytes<packing> + 16 * lane_id() - from_next;
    to_next_tile_ = static_cast<int>(gridDim.x) * shape.tile_bytes - shape.stages * stage_weights<packing>;
    pieces_left_ = pieces_of_tile_ =
        min(shape.warp_items, shape.items - first_item) * (item_bytes<packing> / 16);
    stages_left_ = stages_of_tile_ = shape.stages;
    tiles_ = shape.tiles;
  }

  const P& params_;
  const SharedLayout& layout_;
  int ring_, slot_;
  SchedulePoint at_;
  int phases_left_;
  int tile_, tiles_ = 0;  // the block's tile of a matrix, and how many that has; 0 among pages
  int stages_left_ = 0, stages_of_tile_ = 0, pieces_left_ = 0, pieces_of_tile_ = 0;  // pieces of 16 bytes
  int entry_ = 0, slot_of_cache_ = 0;
  const std::byte* next_ = nullptr;
  std::int64_t to_next_tile_ = 0;
};

}  // namespace hrmcore::cuda
