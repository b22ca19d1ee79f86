// Requests over one model: each holds its own pages of the KV cache, and a step advances any set of them
// together.
//
// A request's logits have the same bits whatever runs beside it, however its response is cut into chunks, and
// with any number of threads: no kernel's arithmetic for one token depends on the others of a step.
//
// Any thread may open, close and step at any time. Steps take turns; opening and closing never wait for one,
// because Python runs during a step and may come here on the same thread. A request that is in a step when it
// is closed is released when the step ends.
//
// A long step may be made in slices, one a turn, with the steps of others between them: its bits do not change.
// A request may be kept as it is and forked later, as often as one likes; the forks share its pages.
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
  std::int64_t workspace_bytes() const;  // of the steps that are not under way
  std::int64_t open_requests() const;

  // A new request, whose first `prefix` tokens see each other both ways: they must come in one step, its
  // first.
  std::int64_t open(std::int64_t prefix);
  // Releases its pages, at the end of the step that it may be in. Throws std::invalid_argument when it is not
  // open.
  void close(std::int64_t request);
  // What the request holds now, under a number of its own, to be forked and closed but never stepped; it does
  // not count as open. Costs nothing: the pages are shared, the last one too, to which the request appends.
  // Throws std::invalid_argument when the request is not open, is empty or is in a step.
  std::int64_t keep(std::int64_t request);
  // A new request that holds what was kept, as if it had made the same steps itself. For whoever has the turn.
  // Copies a page where the last one is not full. Throws std::invalid_argument when nothing is kept under this
  // number, OutOfMemory when there is no room.
  std::int64_t fork(std::int64_t kept);
  // Takes back the last tokens, so that `length` are left. Throws std::invalid_argument when the request is not
  // open or in a step, when that would reach into its prefix or into what was kept of it, or when the window
  // has given back what the next token sees.
  void rewind(std::int64_t request, std::int64_t length);

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

  // Tokens that some requests add together. Only run works, without the GIL, and cannot fail; Python runs only
  // in its calls of `interrupt`. The requests are in the step until it is destroyed; one that is not committed
  // by then has not happened.
  class Step;

 private:
  struct Request {
    std::int64_t id = 0;
    std::int64_t prefix = 0;
    std::int64_t length = 0, kept_length = 0;  // kept_length: of it
    bool kept = false;
    bool stepping = false, closing = false;  // closing: when the step ends
    std::int64_t given_back = 0;             // of its first pages
    std::vector<std::byte*> pages;           // null where given back
  };

  void check_step(const std::vector<std::int64_t>& requests,
                  const std::vector<std::vector<std::int64_t>>& ids, bool every_row, bool every_layer) const;
  Request& find_idle(const char* op, std::int64_t request);
  Request& add_request();
  Request& share(const Request& request);
  OutOfMemory no_room() const;
  std::int64_t pages_behind(std::int64_t length) const;
  std::unique_ptr<Recurrence> spare_recurrence();
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

  // Of cache_ and the following. Never held where Python can run, nor while the GIL is waited for.
  mutable std::mutex mutex_;
  std::unordered_map<std::int64_t, Request> requests_;
  std::int64_t next_request_ = 0, not_open_ = 0;  // not open: kept, or closing
  std::unique_ptr<Recurrence> spare_;             // the working memory of a sliced step that has ended
};

class Engine::Step {
 public:
  // Throws std::invalid_argument on a bad argument, OutOfMemory when the cache or the system has no room,
  // std::runtime_error when the weights are incomplete, FileError when their file changed. `sliced`: with
  // working memory of its own, for any thread; otherwise for whoever has the turn as long as it lives.
  Step(Engine& engine, const std::vector<std::int64_t>& requests,
       const std::vector<std::vector<std::int64_t>>& ids, bool every_row, bool every_layer, bool sliced);
  ~Step();
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  // Throws std::invalid_argument unless run may write to these logits: (rows, V) float32, the last row of each
  // request, or with every_row all rows in order, or with every_layer (slots, V), the last row of the only
  // request as the head reads it after each layer of each visit, the last of which is the step's own; or when
  // the step has ended. Throws FileError when the weights' file changed.
  void check(const TensorView& logits) const;
  // For whoever has the turn: as much of the step as is the work of a step of `tokens` tokens, rounded down to
  // halves of a layer and visit, and one at least. Writes the logits when it is done. A step that `interrupt`
  // wanted to stop cannot go on.
  Recurrence::Ended run(const TensorView& logits, std::int64_t tokens, const Interrupt& interrupt) noexcept;
  // Once it is done. Throws FileError when the weights' file changed meanwhile.
  void commit();

  Engine& engine() const { return engine_; }
  std::int64_t tokens() const { return recurrence_.tokens(); }
  std::int64_t halves() const { return recurrence_.halves(); }
  std::int64_t halves_done() const { return recurrence_.halves_done(); }

 private:
  void leave() noexcept;

  Engine& engine_;
  std::unique_ptr<Recurrence> own_;
  Recurrence& recurrence_;
  std::int64_t rows_ = 0;
  bool stopped_ = false;
  std::vector<Request*> requests_;
  std::vector<Chunk> chunks_;
};

}  // namespace hrmcore
