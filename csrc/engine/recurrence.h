// The whole recurrence over the tokens of one step, in one job of the pool or several, one after another:
//
//   zH = scale * embed[ids], zL = z_L_init
//   H_cycles times: L_cycles times zL = L(zL + zH); then zH = H(zH + zL)
//   logits = head zH, of the rows asked for
//
//   A stack runs its blocks on u, then takes rms(u). A block:
//     [g|q|k|v] = Wgqkv rms(u),   u += Wo (sigmoid(g) attention(q, k, v))
//     [a|b] = Wgate_up rms(u),    u += Wdown (silu(a) b)
//
// Reads every layer's weights once a visit. Source: arXiv 2605.20613.
//
// The tokens of a prefix meet bfloat16, int8 and int4 weights in tiles where the instruction set has a kernel for them
// (tile_gemm.h) and the prefix is long enough to gain, and on AMX each other, too (prefix_attention.h). All others
// take packed_gemm and attend: which of the two depends on a token's position and its own prefix alone, and so do its
// bits.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "core/memory.h"
#include "engine/prefetch_trial.h"
#include "engine/thread_pool.h"
#include "engine/turns.h"
#include "engine/weights.h"
#include "gemm/row_tiles.h"
#include "kv/paged_attention.h"

namespace hrmcore {

// The tokens that one request adds.
struct Chunk {
  const std::int64_t* ids;
  std::int64_t tokens;
  std::int64_t start, prefix;
  const std::byte* const* pages;  // with room for start + tokens
};

class Recurrence {
 public:
  // xpos: null for RoPE. window: 0 for none.
  Recurrence(const ModelShape& shape, const Weights& weights, const CacheShape& cache, const float* rope,
             const PagedXpos* xpos, std::int64_t window);

  // Makes room for a step; the only part that can throw (std::bad_alloc).
  void prepare(const std::vector<Chunk>& chunks, bool every_row, bool every_layer, int threads);
  // Runs the next `most` of its halves(): attention or feed-forward of one layer and visit, each the same work
  // for the same tokens. A step that pauses goes on where it was, with the same bits. logits: the last row of
  // each chunk, or every row, [rows][V], written by the last run; with every_layer the last row of the only chunk
  // after each layer of each visit, [slots][V], what the head reads from rms(u) there. Asks `interrupt` twice a
  // layer and visit, in a step of few tokens every eighth layer, though not more often than every tenth of a
  // second.
  enum class Ended : std::uint8_t { done, paused, stopped };
  Ended run(ThreadPool& pool, float* logits, std::int64_t most, const Interrupt& interrupt) noexcept;
  std::int64_t halves() const { return 2 * static_cast<std::int64_t>(visits_.size()); }
  std::int64_t halves_done() const { return done_; }
  std::int64_t tokens() const { return tokens_; }

  std::int64_t workspace_bytes() const { return memory_.size(); }

 private:
  struct Task {
    std::int64_t chunk, head, query_begin, query_end;
  };
  struct LayerVisit {  // one slot of the cache
    Stack stack;
    std::int64_t layer;
    bool first, last;  // of the stack's layers
  };
  struct Operand {  // the activations of a GEMM: of the plain rows, then of those in tiles
    const std::byte* data;
    std::int64_t row_bytes, rows;
    TileRows tiles;
    std::int64_t tile_rows;
  };

  void place_rows(const std::vector<Chunk>& chunks, bool every_row);
  void place_tasks();
  void place_part(const Chunk& chunk, std::int64_t begin, std::int64_t end);
  void make_room(int threads);

  void work(Worker& worker);
  void embed(Worker& worker);
  bool attention_half(Worker& worker, std::int64_t slot);
  bool feed_forward_half(Worker& worker, std::int64_t slot);
  const LayerWeights& layer_of(std::int64_t slot) const;
  void pick_layer(const Worker& worker, std::int64_t slot);
  std::int64_t head_rows() const;
  void ask(const Worker& worker);
  void attention(Worker& worker, std::int64_t slot);
  void attend_task(Worker& worker, const Task& task, std::int64_t slot);
  Operand normalise(Worker& worker, const float* x, const float* add, float* sum);
  void normalise_state(Worker& worker, float* state);
  Operand plain_operand(Worker& worker, const float* x, std::int64_t stride, std::int64_t columns,
                        std::int64_t rows, Packing packing);
  Operand attended_operand(Worker& worker);
  Operand hidden_operand(Worker& worker);
  void add_tiles(Operand& y, std::byte* data, std::int64_t columns) const;
  TileRows tile_rows_of(std::byte* data, std::int64_t rows, std::int64_t columns) const;
  void gqkv_gemm(Worker& worker, const PackedMatrix& weights, const Operand& x);
  void add_gemm(Worker& worker, const PackedMatrix& weights, const Operand& x);
  void swiglu_gemm(Worker& worker, const PackedMatrix& weights, const Operand& x);
  void head(Worker& worker);
  template <class Plain, class Tiles>
  void parallel_rows(Worker& worker, const Plain& plain, const Tiles& tiles);
  template <class Finish, class FinishTiles>
  void multiply(Worker& worker, const PackedMatrix& weights, const Operand& x, const Finish& finish,
                const FinishTiles& finish_tiles, std::int64_t panels_together = 0);
  PrefetchHint prefetch_hint(const PackedMatrix& weights) const;
  float* scratch(const Worker& worker) const;

  const ModelShape shape_;
  const Weights& weights_;
  const CacheShape cache_;
  const float* rope_;
  const PagedXpos* xpos_;
  const std::int64_t window_;
  bool attends_in_tiles_ = false;  // the tokens of a prefix
  std::int64_t stride_, gqkv_stride_, attended_stride_, hidden_stride_, x_row_bytes_, scratch_bytes_;

  std::vector<LayerVisit> visits_;  // by slot
  std::int64_t done_ = 0, until_ = 0;

  // Or parts of them: the rows of prefixes come last where they go in tiles.
  std::vector<Chunk> chunks_;
  std::vector<Task> tasks_;
  std::vector<TokenPlace> places_;
  std::vector<std::int64_t> ids_, rows_, firsts_, row_of_token_;
  bool every_layer_ = false;
  float* logits_ = nullptr;

  PrefetchTrial trial_;
  bool asks_ahead_ = true;
  Interrupt interrupt_;
  std::chrono::steady_clock::time_point asked_;
  std::atomic<bool> stopped_{false};

  Memory memory_;
  std::int64_t tokens_ = 0, plain_rows_ = 0, plain_chunks_ = 0, room_tokens_ = 0, room_tile_rows_ = 0,
               room_rows_ = 0;
  int room_threads_ = 0;
  float *u_ = nullptr, *z_l_ = nullptr, *z_h_ = nullptr, *gqkv_ = nullptr, *attended_ = nullptr,
        *hidden_ = nullptr, *picked_ = nullptr, *scratch_ = nullptr;
  std::byte *x_ = nullptr, *tiles_ = nullptr, *hidden_tiles_ = nullptr;
};

}  // namespace hrmcore
