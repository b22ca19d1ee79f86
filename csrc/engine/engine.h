// Requests over one model: each holds its own pages of the KV cache, and a step advances any set of them
// together.
//
// A request's logits have the same bits whatever runs beside it, however its response is cut into chunks, and
// with any number of threads: no kernel's arithmetic for one token depends on the others of a step.
//
// Any thread may open, close and step at any time. Steps take turns; opening and closing never wait for one,
// because Python runs during a step and may come here on the same thread. A request that is in a step when it
// is closed is released when the step ends.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/tensor.h"
#include "engine/recurrence.h"
#include "engine/thread_pool.h"
#include "engine/turns.h"
#include "engine/weights.h"
#include "kv/kv_cache.h"

namespace hrmcore {

class Engine {
 public:
  // rope: (positions, head_dim) float32. log_decay: (head_dim / 2) float32 for xPos, or none. window: of the
  // attention, a multiple of page_tokens, or 0; pages that it has left behind are given back. cache_tokens:
  // what all open requests may hold together, in whole pages each. Throws std::invalid_argument on a shape
  // that no model has.
  Engine(const ModelShape& shape, Packing weights, Packing cache, int threads, std::int64_t cache_tokens,
         const TensorView& rope, const TensorView& log_decay, std::int64_t window);

  const ModelShape& shape() const { return shape_; }
  Weights& weights() { return weights_; }
  const Weights& weights() const { return weights_; }
  std::int64_t cache_pages() const { return cache_.capacity(); }
  std::int64_t cache_pages_used() const;
  int threads() const { return pool_.size(); }
  std::int64_t workspace_bytes() const { return recurrence_.workspace_bytes(); }
  std::int64_t open_requests() const;

  // A new request, whose first `prefix` tokens see each other both ways: they must come in one step, its
  // first.
  std::int64_t open(std::int64_t prefix);
  // Releases its pages, at the end of the step that it may be in. Throws std::invalid_argument when it is not
  // open.
  void close(std::int64_t request);

  // The right to make one step, from when it is taken until the end of its life.
  class Turn {
   public:
    // Waits, without the GIL, as Turns::take does.
    Turn(Engine& engine, const Interrupt& interrupt);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

    bool taken() const { return taken_; }

   private:
    Engine& engine_;
    const bool taken_;
  };

  // A step in three parts, for whoever has the turn. Only the middle one runs without the GIL, and cannot fail.
  // Python runs only in its calls of `interrupt`. begin throws
  // std::invalid_argument on a bad argument, OutOfMemory when the cache or the system has no room,
  // std::runtime_error when the weights are incomplete, FileError when their file changed; then nothing has
  // happened. run returns false, and nothing has happened, when `interrupt` wanted it to stop. commit throws
  // FileError when the weights' file changed meanwhile. logits: (rows, V) float32, the last row of
  // each request, or with every_row all rows in order; or with every_layer (slots, V), the last row of the only
  // request as the head reads it after each layer of each visit, the last of which is the step's own.
  void begin(const std::vector<std::int64_t>& requests, const std::vector<std::vector<std::int64_t>>& ids,
             bool every_row, const TensorView& logits, bool every_layer = false);
  bool run(const Interrupt& interrupt = {}) noexcept;
  void commit();

 private:
  struct Request {
    std::int64_t id = 0;
    std::int64_t prefix = 0;
    std::int64_t length = 0;
    bool stepping = false, closing = false;  // closing: when the step ends
    std::int64_t given_back = 0;             // of its first pages
    std::vector<std::byte*> pages;           // null where given back
  };

  void check_step(const std::vector<std::int64_t>& requests,
                  const std::vector<std::vector<std::int64_t>>& ids, bool every_row, const TensorView& logits,
                  bool every_layer) const;
  void end_turn() noexcept;
  void release(Request& request) noexcept;
  void release_behind(Request& request);
  void reserve(const std::vector<std::int64_t>& requests, const std::vector<std::vector<std::int64_t>>& ids);

  ModelShape shape_;
  Weights weights_;
  KvCache cache_;
  std::vector<float> rope_;
  std::unique_ptr<const PagedXpos> xpos_;  // null: RoPE
  std::int64_t window_;
  ThreadPool pool_;
  Recurrence recurrence_;
  Turns turns_;

  // Of whoever has the turn.
  std::vector<Request*> stepping_;
  std::vector<Chunk> chunks_;
  float* logits_ = nullptr;

  // Of cache_ and the following. Never held where Python can run, nor while the GIL is waited for.
  mutable std::mutex mutex_;
  std::unordered_map<std::int64_t, Request> requests_;
  std::int64_t next_request_ = 0, closing_ = 0;
};

}  // namespace hrmcore
