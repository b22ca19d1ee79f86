#include "engine/engine.h"

#include <algorithm>
#include <cstring>
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

Engine::Request& Engine::add_request() {
  Request& request = requests_[next_request_];
  request.id = next_request_++;
  return request;
}

std::int64_t Engine::open(std::int64_t prefix) {
  if (prefix < 0 || prefix > shape_.positions) {
    reject("open", "prefix_length", "between 0 and the context of " + std::to_string(shape_.positions),
           std::to_string(prefix));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  Request& request = add_request();
  request.prefix = prefix;
  return request.id;
}

void Engine::close(std::int64_t request) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = requests_.find(request);
  if (found == requests_.end() || found->second.closing)
    reject("close", "request", "open", named(request) + ", which is not");
  if (found->second.stepping) {
    found->second.closing = true;
    ++not_open_;
  } else {
    release(found->second);
  }
}

void Engine::release(Request& request) noexcept {
  not_open_ -= request.kept || request.closing ? 1 : 0;
  request.pages.erase(request.pages.begin(), request.pages.begin() + request.given_back);
  cache_.release(request.pages);
  requests_.erase(request.id);
}

Engine::Request& Engine::find_idle(const char* op, std::int64_t request) {
  const auto found = requests_.find(request);
  if (found == requests_.end() || found->second.closing || found->second.kept)
    reject(op, "request", "open", named(request) + ", which is not");
  if (found->second.stepping) reject(op, "request", "in no step", named(request) + ", which is in one");
  return found->second;
}

// Another request with the same pages.
Engine::Request& Engine::share(const Request& request) {
  const std::vector<std::byte*> pages(request.pages.begin() + request.given_back, request.pages.end());
  std::vector<std::byte*> all = request.pages;
  Request& other = add_request();  // the others stay where they are
  try {
    cache_.share(pages);
  } catch (...) {
    requests_.erase(other.id);
    throw;
  }
  other.prefix = request.prefix;
  other.length = other.kept_length = request.length;
  other.given_back = request.given_back;
  other.pages = std::move(all);
  return other;
}

std::int64_t Engine::keep(std::int64_t request) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Request& from = find_idle("keep", request);
  if (from.length == 0)
    reject("keep", "request", "one that holds tokens", named(request) + ", which is empty");
  Request& kept = share(from);
  from.kept_length = from.length;
  kept.kept = true;
  ++not_open_;
  return kept.id;
}

// Whoever appends to the last page of what was kept does so in a step: meanwhile nobody does.
std::int64_t Engine::fork(std::int64_t kept) {
  Request* request = nullptr;
  std::vector<std::byte*> fresh;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = requests_.find(kept);
    if (found == requests_.end() || !found->second.kept)
      reject("fork", "kept", "kept", named(kept) + ", which is not");
    const bool copies = found->second.length % page_tokens != 0;
    try {
      if (copies) cache_.reserve(fresh, page_tokens);
      request = &share(found->second);
    } catch (const CacheFull&) {
      throw no_room();
    } catch (...) {
      cache_.release(fresh);
      throw;
    }
    request->kept_length = request->length - request->length % page_tokens;
    request->stepping = copies;
  }
  if (fresh.empty()) return request->id;
  const std::int64_t id = request->id;
  std::memcpy(fresh[0], request->pages.back(), static_cast<std::size_t>(cache_.shape().page_bytes()));
  const std::lock_guard<std::mutex> lock(mutex_);
  std::swap(fresh[0], request->pages.back());
  cache_.release(fresh);
  request->stepping = false;
  if (request->closing) release(*request);
  return id;
}

void Engine::rewind(std::int64_t request, std::int64_t length) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Request& from = find_idle("rewind", request);
  const std::int64_t least = std::max(from.prefix, from.kept_length);
  if (length < least || length > from.length) {
    reject("rewind", "length", "between " + std::to_string(least) + " and " + std::to_string(from.length),
           std::to_string(length));
  }
  if (from.given_back > pages_behind(length))
    reject("rewind", "length", "within what the window still holds", std::to_string(length));
  from.length = length;
}

std::int64_t Engine::open_requests() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<std::int64_t>(requests_.size()) - not_open_;
}

std::int64_t Engine::workspace_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return recurrence_.workspace_bytes() + (spare_ ? spare_->workspace_bytes() : 0);
}

std::int64_t Engine::cache_pages_used() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return cache_.used();
}

Engine::Turn::Turn(Engine& engine, const Interrupt& interrupt)
    : engine_(engine), taken_(engine.turns_.take(interrupt)) {}

Engine::Turn::~Turn() {
  if (taken_) engine_.turns_.pass();
}

void Engine::check_step(const std::vector<std::int64_t>& requests,
                        const std::vector<std::vector<std::int64_t>>& ids, bool every_row,
                        bool every_layer) const {
  const char* op = "step";
  if (requests.empty()) reject(op, "requests", "at least one request", "none");
  if (requests.size() != ids.size()) {
    reject(op, "ids", "one list for each of the " + std::to_string(requests.size()) + " requests",
           std::to_string(ids.size()));
  }
  std::set<std::int64_t> seen;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const auto found = requests_.find(requests[i]);
    if (found == requests_.end() || found->second.closing || found->second.kept)
      reject(op, "requests", "open", named(requests[i]) + ", which is not");
    if (!seen.insert(requests[i]).second)
      reject(op, "requests", "different from each other", named(requests[i]) + " twice");
    const Request& request = found->second;
    if (request.stepping) reject(op, "requests", "in no step", named(requests[i]) + ", which is in one");
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
  }
  if (every_layer && (requests.size() != 1 || every_row))
    reject(op, "every_layer", "of one request, without every_row", "more");
}

OutOfMemory Engine::no_room() const {
  const std::int64_t all = cache_.capacity(), free = all - cache_.used();
  return OutOfMemory("the KV cache has no room for this step: " + std::to_string(free) + " of its " +
                     std::to_string(all) + " pages of " + std::to_string(page_tokens) +
                     " tokens are free; close requests or load with more");
}

void Engine::reserve(const std::vector<std::int64_t>& requests,
                     const std::vector<std::vector<std::int64_t>>& ids) {
  std::vector<std::size_t> held;
  for (std::int64_t id : requests) held.push_back(requests_.at(id).pages.size());
  const auto give_back = [&] {
    for (std::size_t i = 0; i < requests.size(); ++i)
      cache_.release(requests_.at(requests[i]).pages, held[i]);
  };
  try {
    for (std::size_t i = 0; i < requests.size(); ++i) {
      Request& request = requests_.at(requests[i]);
      cache_.reserve(request.pages, request.length + static_cast<std::int64_t>(ids[i].size()));
    }
  } catch (const CacheFull&) {
    give_back();
    throw no_room();
  } catch (const std::bad_alloc&) {
    give_back();
    throw;
  }
}

Engine::Step::Step(Engine& engine, const std::vector<std::int64_t>& requests,
                   const std::vector<std::vector<std::int64_t>>& ids, bool every_row, bool every_layer,
                   bool sliced)
    : engine_(engine),
      own_(sliced ? engine.spare_recurrence() : nullptr),
      recurrence_(sliced ? *own_ : engine.recurrence_) {
  engine.weights_.check_complete();
  engine.weights_.check_unchanged();
  requests_.reserve(requests.size());
  chunks_.reserve(requests.size());
  {
    const std::lock_guard<std::mutex> lock(engine.mutex_);
    engine.check_step(requests, ids, every_row, every_layer);
    engine.reserve(requests, ids);
    for (std::size_t i = 0; i < requests.size(); ++i) {
      Request& request = engine.requests_.at(requests[i]);
      request.stepping = true;
      requests_.push_back(&request);
      chunks_.push_back({ids[i].data(), static_cast<std::int64_t>(ids[i].size()), request.length,
                         request.prefix, request.pages.data()});
      rows_ += every_row ? chunks_.back().tokens : 1;
    }
  }
  if (every_layer) rows_ = engine.shape_.slots();
  try {
    recurrence_.prepare(chunks_, every_row, every_layer, engine.pool_.size());
  } catch (...) {
    leave();
    throw;
  }
}

Engine::Step::~Step() { leave(); }

void Engine::Step::leave() noexcept {
  const std::lock_guard<std::mutex> lock(engine_.mutex_);
  for (Request* request : requests_) {
    request->stepping = false;
    const std::int64_t held = (request->length + page_tokens - 1) / page_tokens;
    engine_.cache_.release(request->pages, static_cast<std::size_t>(held));
    if (request->closing) engine_.release(*request);
  }
  requests_.clear();
  if (own_) engine_.spare_ = std::move(own_);
}

void Engine::Step::check(const TensorView& logits) const {
  const char* op = "step";
  if (stopped_ || halves_done() == halves()) reject(op, "step", "one that has not ended", "one that has");
  Check(op, "logits", logits)
      .cpu()
      .dtype({DType::f32})
      .rank(2)
      .size(0, rows_, "rows")
      .size(1, engine_.shape_.vocabulary, "V")
      .contiguous();
  engine_.weights_.check_unchanged();
}

Recurrence::Ended Engine::Step::run(const TensorView& logits, std::int64_t tokens,
                                    const Interrupt& interrupt) noexcept {
  const MappedReading reading;
  const std::int64_t most =
      tokens < recurrence_.tokens() ? tokens * halves() / recurrence_.tokens() : halves();
  const Recurrence::Ended ended =
      recurrence_.run(engine_.pool_, logits.as<float>(), most > 0 ? most : 1, interrupt);
  stopped_ = ended == Recurrence::Ended::stopped;
  return ended;
}

void Engine::Step::commit() {
  engine_.weights_.check_unchanged();
  const std::lock_guard<std::mutex> lock(engine_.mutex_);
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    requests_[i]->length += chunks_[i].tokens;
    engine_.release_behind(*requests_[i]);
  }
}

std::unique_ptr<Recurrence> Engine::spare_recurrence() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (spare_) return std::move(spare_);
  }
  return std::make_unique<Recurrence>(shape_, weights_, cache_.shape(), rope_.data(), xpos_.get(), window_);
}

// How many of its first pages no token sees that comes after `length` others.
std::int64_t Engine::pages_behind(std::int64_t length) const {
  return window_ == 0 || length < 2 * window_ ? 0 : (length / window_ - 1) * window_ / page_tokens;
}

// Gives back the pages that no later token sees.
void Engine::release_behind(Request& request) {
  const std::int64_t seen = pages_behind(request.length);
  std::vector<std::byte*> behind;
  while (request.given_back < seen)
    behind.push_back(std::exchange(request.pages[request.given_back++], nullptr));
  cache_.release(behind);
}

}  // namespace hrmcore
