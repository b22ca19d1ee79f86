#include "engine/engine.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <utility>

namespace hrmcore {
namespace {

constexpr std::int64_t most_layers = 1 << 17;
constexpr double addresses = 1ull << 47;  // bytes

const ModelShape& checked(const ModelShape& shape) {
  const std::pair<const char*, std::int64_t> counts[] = {
      {"vocab_size", shape.vocabulary}, {"hidden_size", shape.width},
      {"intermediate_size", shape.ffn}, {"L_layers", shape.l_layers},
      {"H_layers", shape.h_layers},     {"num_heads", shape.heads},
      {"head_dim", shape.head_dim},     {"H_cycles", shape.h_cycles},
      {"L_cycles", shape.l_cycles},     {"max_position_embeddings", shape.positions}};
  for (const auto& [name, value] : counts) {
    if (value < 1 || value > (std::int64_t{1} << 31))
      reject("Engine", name, "at least 1", std::to_string(value));
  }
  if (shape.head_dim > most_head_channels || shape.head_dim % 2 != 0) {
    reject("Engine", "head_dim", "even and at most " + std::to_string(most_head_channels),
           std::to_string(shape.head_dim));
  }
  const std::int64_t layers = shape.l_layers + shape.h_layers;
  if (layers > most_layers || shape.h_cycles > most_layers || shape.l_cycles > most_layers) {
    reject("Engine", "layers and cycles", "at most " + std::to_string(most_layers),
           std::to_string(std::max({layers, shape.h_cycles, shape.l_cycles})));
  }
  // In floating point, where nothing overflows: what follows computes with integers.
  const double width = static_cast<double>(shape.width), heads = static_cast<double>(shape.heads);
  const double attention = heads * static_cast<double>(shape.head_dim);
  const double layer = 5 * width * attention + 3 * width * static_cast<double>(shape.ffn);
  const double weights =
      2 * width * static_cast<double>(shape.vocabulary) + static_cast<double>(layers) * layer;
  const double token = 8 * attention * static_cast<double>(shape.slots());
  if (std::max(4 * weights, token * page_tokens) > addresses) {
    reject("Engine", "the shape", "of a model that a process can address", "one of more than 2^47 bytes");
  }
  return shape;
}

Packing checked_cache(Packing packing) {
  if (packing == Packing::int4) reject("Engine", "kv_dtype", "float32, bfloat16 or int8", "int4");
  return packing;
}

std::vector<float> copied_table(const TensorView& rope, const ModelShape& shape) {
  Check("Engine", "rope", rope)
      .cpu()
      .dtype({DType::f32})
      .rank(2)
      .size(0, shape.positions, "positions")
      .size(1, shape.head_dim, "head_dim")
      .contiguous();
  return {rope.as<float>(), rope.as<float>() + shape.positions * shape.head_dim};
}

std::unique_ptr<const PagedXpos> copied_log_decay(const TensorView& log_decay, const ModelShape& shape) {
  if (log_decay.data == nullptr) return nullptr;
  Check("Engine", "log_decay", log_decay)
      .cpu()
      .dtype({DType::f32})
      .rank(1)
      .size(0, shape.head_dim / 2, "head_dim / 2")
      .contiguous();
  for (std::int64_t c = 0; c < shape.head_dim / 2; ++c) {
    const float rate = log_decay.as<float>()[c];
    if (!(rate >= -0.1f && rate <= 0)) reject("Engine", "log_decay", "in [-0.1, 0]", std::to_string(rate));
  }
  return std::make_unique<const PagedXpos>(log_decay.as<float>(), shape.head_dim, shape.positions);
}

std::int64_t checked_window(std::int64_t window) {
  if (window < 0 || window % page_tokens != 0) {
    reject("Engine", "window", "a multiple of " + std::to_string(page_tokens) + ", or 0 for none",
           std::to_string(window));
  }
  return window;
}

int checked_threads(int threads) {
  if (threads < 1 || threads > 1024)
    reject("Engine", "threads", "between 1 and 1024", std::to_string(threads));
  return threads;
}

std::string named(std::int64_t request) { return "request " + std::to_string(request); }

}  // namespace

Engine::Engine(const ModelShape& shape, Packing weights, Packing cache, int threads,
               std::int64_t cache_tokens, const TensorView& rope, const TensorView& log_decay,
               std::int64_t window)
    : shape_(checked(shape)),
      weights_(shape_, weights),
      cache_(CacheShape{checked_cache(cache), shape_.slots(), shape_.heads, shape_.head_dim},
             cache_tokens / page_tokens),
      rope_(copied_table(rope, shape_)),
      xpos_(copied_log_decay(log_decay, shape_)),
      window_(checked_window(window)),
      pool_(checked_threads(threads)),
      recurrence_(shape_, weights_, cache_.shape(), rope_.data(), xpos_.get(), window_) {
  if (cache_tokens < page_tokens) {
    reject("Engine", "cache_tokens", "at least " + std::to_string(page_tokens), std::to_string(cache_tokens));
  }
}

std::int64_t Engine::open(std::int64_t prefix) {
  if (prefix < 0 || prefix > shape_.positions) {
    reject("open", "prefix_length", "between 0 and the context of " + std::to_string(shape_.positions),
           std::to_string(prefix));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  Request& request = requests_[next_request_];
  request.id = next_request_;
  request.prefix = prefix;
  return next_request_++;
}

void Engine::close(std::int64_t request) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = requests_.find(request);
  if (found == requests_.end() || found->second.closing)
    reject("close", "request", "open", named(request) + ", which is not");
  if (found->second.stepping) {
    found->second.closing = true;
    ++closing_;
  } else {
    release(found->second);
  }
}

void Engine::release(Request& request) noexcept {
  request.pages.erase(request.pages.begin(), request.pages.begin() + request.given_back);
  cache_.release(request.pages);
  requests_.erase(request.id);
}

std::int64_t Engine::open_requests() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<std::int64_t>(requests_.size()) - closing_;
}

std::int64_t Engine::cache_pages_used() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return cache_.used();
}

Engine::Turn::Turn(Engine& engine, const Interrupt& interrupt)
    : engine_(engine), taken_(engine.turns_.take(interrupt)) {}

Engine::Turn::~Turn() {
  if (taken_) engine_.end_turn();
}

void Engine::end_turn() noexcept {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Request* request : stepping_) {
      request->stepping = false;
      if (request->closing) release(*request);
    }
    stepping_.clear();
    closing_ = 0;
  }
  turns_.pass();
}

void Engine::check_step(const std::vector<std::int64_t>& requests,
                        const std::vector<std::vector<std::int64_t>>& ids, bool every_row,
                        const TensorView& logits, bool every_layer) const {
  const char* op = "step";
  if (requests.empty()) reject(op, "requests", "at least one request", "none");
  if (requests.size() != ids.size()) {
    reject(op, "ids", "one list for each of the " + std::to_string(requests.size()) + " requests",
           std::to_string(ids.size()));
  }
  std::int64_t rows = 0;
  std::set<std::int64_t> seen;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const auto found = requests_.find(requests[i]);
    if (found == requests_.end()) reject(op, "requests", "open", named(requests[i]) + ", which is not");
    if (!seen.insert(requests[i]).second)
      reject(op, "requests", "different from each other", named(requests[i]) + " twice");
    const Request& request = found->second;
    const auto added = static_cast<std::int64_t>(ids[i].size());
    if (added < 1) reject(op, "ids", "at least one token for each request", "none for " + named(requests[i]));
    if (request.length == 0 && added < request.prefix) {
      reject(op, "ids", "all " + std::to_string(request.prefix) + " tokens of the prefix in the first step",
             std::to_string(added) + " for " + named(requests[i]));
    }
    if (request.length + added > shape_.positions) {
      reject(op, "ids", "within the context of " + std::to_string(shape_.positions) + " tokens",
             std::to_string(request.length + added) + " for " + named(requests[i]));
    }
    for (std::int64_t id : ids[i]) {
      if (id < 0 || id >= shape_.vocabulary) {
        reject(op, "ids", "in [0, " + std::to_string(shape_.vocabulary) + ")", std::to_string(id));
      }
    }
    rows += every_row ? added : 1;
  }
  if (every_layer && (requests.size() != 1 || every_row))
    reject(op, "every_layer", "of one request, without every_row", "more");
  if (every_layer) rows = shape_.slots();
  Check(op, "logits", logits)
      .cpu()
      .dtype({DType::f32})
      .rank(2)
      .size(0, rows, "rows")
      .size(1, shape_.vocabulary, "V")
      .contiguous();
}

void Engine::reserve(const std::vector<std::int64_t>& requests,
                     const std::vector<std::vector<std::int64_t>>& ids) {
  std::vector<std::size_t> held;
  for (std::int64_t id : requests) held.push_back(requests_.at(id).pages.size());
  const auto give_back = [&] {
    for (std::size_t i = 0; i < requests.size(); ++i) {
      std::vector<std::byte*>& pages = requests_.at(requests[i]).pages;
      std::vector<std::byte*> extra(pages.begin() + static_cast<std::ptrdiff_t>(held[i]), pages.end());
      pages.resize(held[i]);
      cache_.release(extra);
    }
  };
  try {
    for (std::size_t i = 0; i < requests.size(); ++i) {
      Request& request = requests_.at(requests[i]);
      cache_.reserve(request.pages, request.length + static_cast<std::int64_t>(ids[i].size()));
    }
  } catch (const CacheFull&) {
    give_back();
    const std::int64_t all = cache_.capacity(), free = all - cache_.used();
    throw OutOfMemory("the KV cache has no room for this step: " + std::to_string(free) + " of its " +
                      std::to_string(all) + " pages of " + std::to_string(page_tokens) +
                      " tokens are free; close requests or load with more");
  } catch (const std::bad_alloc&) {
    give_back();
    throw;
  }
}

void Engine::begin(const std::vector<std::int64_t>& requests,
                   const std::vector<std::vector<std::int64_t>>& ids, bool every_row,
                   const TensorView& logits, bool every_layer) {
  weights_.check_complete();
  weights_.check_unchanged();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    check_step(requests, ids, every_row, logits, every_layer);
    reserve(requests, ids);
    stepping_.reserve(requests.size());
    chunks_.clear();
    chunks_.reserve(requests.size());
    for (std::size_t i = 0; i < requests.size(); ++i) {
      Request& request = requests_.at(requests[i]);
      request.stepping = true;
      stepping_.push_back(&request);
      chunks_.push_back({ids[i].data(), static_cast<std::int64_t>(ids[i].size()), request.length,
                         request.prefix, request.pages.data()});
    }
  }
  recurrence_.prepare(chunks_, every_row, every_layer, pool_.size());
  logits_ = logits.as<float>();
}

bool Engine::run(const Interrupt& interrupt) noexcept {
  const MappedReading reading;
  return recurrence_.run(pool_, logits_, interrupt);
}

void Engine::commit() {
  weights_.check_unchanged();
  const std::lock_guard<std::mutex> lock(mutex_);
  for (std::size_t i = 0; i < stepping_.size(); ++i) {
    stepping_[i]->length += chunks_[i].tokens;
    release_behind(*stepping_[i]);
  }
}

// Gives back the pages that no later token sees.
void Engine::release_behind(Request& request) {
  if (window_ == 0 || request.length < 2 * window_) return;
  const std::int64_t seen = (request.length / window_ - 1) * window_ / page_tokens;
  std::vector<std::byte*> behind;
  while (request.given_back < seen)
    behind.push_back(std::exchange(request.pages[request.given_back++], nullptr));
  cache_.release(behind);
}

}  // namespace hrmcore
