#include "engine/recurrence.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <type_traits>

#include "engine/row_ops.h"
#include "gemm/gemm.h"
#include "gemm/tile_gemm.h"
#include "kv/prefix_attention.h"

namespace hrmcore {
namespace {

constexpr std::int64_t gemm_tokens =
    tile_gemm_rows;  // of a block of outputs that stays in the second-level cache
// Up to here the weights' stream decides, beyond it the arithmetic.
constexpr std::int64_t streaming_tokens = 16;
constexpr std::int64_t streaming_layers = 8;  // of a short step, between two looks at the clock
constexpr std::int64_t chunk_panels = tile_chunk_columns / (panel_rows / 2);  // of gate and up
constexpr auto patience = std::chrono::milliseconds(100);  // asking may cost a wait for Python's lock
constexpr std::int64_t outputs_floats = gemm_tokens * chunk_panels * panel_rows;

std::int64_t round_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }

std::int64_t panels_a_task(std::int64_t rows) { return rows <= streaming_tokens ? 1 : 4; }

std::int64_t rows_a_task(std::int64_t rows) { return rows <= 64 ? 1 : 8; }

// How many tokens of a chunk belong to the prefix.
std::int64_t prefix_tokens(const Chunk& chunk) {
  const std::int64_t left = chunk.prefix > chunk.start ? chunk.prefix - chunk.start : 0;
  return left < chunk.tokens ? left : chunk.tokens;
}

}  // namespace

Recurrence::Recurrence(const ModelShape& shape, const Weights& weights, const CacheShape& cache,
                       const float* rope, const PagedXpos* xpos, std::int64_t window)
    : shape_(shape), weights_(weights), cache_(cache), rope_(rope), xpos_(xpos), window_(window) {
  stride_ = round_up(shape.width, panel_rows);
  gqkv_stride_ = round_up(4 * shape.attention_width(), panel_rows);
  attended_stride_ = round_up(shape.attention_width(), panel_rows);
  hidden_stride_ = round_up(shape.ffn, panel_rows);
  std::int64_t widest = shape.width;
  for (std::int64_t columns : {shape.attention_width(), shape.ffn})
    widest = columns > widest ? columns : widest;
  x_row_bytes_ = groups_of(widest) * activation_bytes(weights.packing());
  const std::int64_t outputs = outputs_floats * std::int64_t{sizeof(float)};
  scratch_bytes_ = round_up(
      std::max({outputs + gemm_scratch_bytes, outputs + tile_scratch_bytes, prefix_scratch_bytes(cache)}),
      256);
  for (std::int64_t visit = 0; visit < shape.h_cycles * (shape.l_cycles + 1); ++visit) {
    const Stack stack = (visit + 1) % (shape.l_cycles + 1) == 0 ? Stack::H : Stack::L;
    const std::int64_t layers = shape.layers(stack);
    for (std::int64_t layer = 0; layer < layers; ++layer)
      visits_.push_back({stack, layer, layer == 0, layer + 1 == layers});
  }
}

void Recurrence::prepare(const std::vector<Chunk>& chunks, bool every_row, bool every_layer, int threads) {
  every_layer_ = every_layer;
  done_ = 0;
  place_rows(chunks, every_row);
  place_tasks();
  make_room(threads);
}

// Attention's, a head and some queries each; the long ones first.
void Recurrence::place_tasks() {
  tasks_.clear();
  for (auto chunk = static_cast<std::int64_t>(chunks_.size()); chunk-- > 0;) {
    const std::int64_t tokens = chunks_[static_cast<std::size_t>(chunk)].tokens;
    const std::int64_t step = attends_in_tiles_ && chunk >= plain_chunks_ ? prefix_queries : query_tile;
    for (std::int64_t head = 0; head < shape_.heads; ++head) {
      for (std::int64_t query = 0; query < tokens; query += step)
        tasks_.push_back({chunk, head, query, std::min(query + step, tokens)});
    }
  }
}

void Recurrence::place_rows(const std::vector<Chunk>& chunks, bool every_row) {
  const std::int64_t shortest = shortest_tiled_prefix(current_isa(), weights_.packing());
  const bool pairs = current_isa() == Isa::amx || current_isa() == Isa::bf16;
  attends_in_tiles_ = pairs && shortest != no_tiles && cache_.packing != Packing::f32;
  chunks_.clear();
  places_.clear();
  ids_.clear();
  rows_.clear();
  firsts_.clear();
  std::int64_t tokens = 0;
  for (const Chunk& chunk : chunks) tokens += chunk.tokens;
  row_of_token_.assign(static_cast<std::size_t>(tokens), 0);
  for (const bool prefixes : {false, true}) {
    if (prefixes) {
      plain_rows_ = static_cast<std::int64_t>(ids_.size());
      plain_chunks_ = static_cast<std::int64_t>(chunks_.size());
    }
    std::int64_t first = 0;
    for (const Chunk& chunk : chunks) {
      const std::int64_t border = chunk.prefix >= shortest ? prefix_tokens(chunk) : 0;
      const std::int64_t begin = prefixes ? 0 : border, end = prefixes ? border : chunk.tokens;
      for (std::int64_t i = begin; i < end; ++i) {
        row_of_token_[static_cast<std::size_t>(first + i)] =
            static_cast<std::int64_t>(ids_.size()) + i - begin;
      }
      if (begin < end) place_part(chunk, begin, end);
      first += chunk.tokens;
    }
  }
  tokens_ = tokens;
  std::int64_t end = 0;
  for (const Chunk& chunk : chunks) {
    end += chunk.tokens;
    for (std::int64_t token = every_row ? end - chunk.tokens : end - 1; token < end; ++token) {
      rows_.push_back(row_of_token_[static_cast<std::size_t>(token)]);
    }
  }
}

// Tokens [begin, end) of a chunk become the next rows.
void Recurrence::place_part(const Chunk& chunk, std::int64_t begin, std::int64_t end) {
  firsts_.push_back(static_cast<std::int64_t>(ids_.size()));
  chunks_.push_back({chunk.ids + begin, end - begin, chunk.start + begin, chunk.prefix, chunk.pages});
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t position = chunk.start + i;
    ids_.push_back(chunk.ids[i]);
    places_.push_back({const_cast<std::byte*>(chunk.pages[position / page_tokens]), position});
  }
}

std::int64_t Recurrence::head_rows() const {
  return every_layer_ ? shape_.slots() : static_cast<std::int64_t>(rows_.size());
}

void Recurrence::make_room(int threads) {
  if (tokens_ <= room_tokens_ && tokens_ - plain_rows_ <= room_tile_rows_ && head_rows() <= room_rows_ &&
      threads <= room_threads_)
    return;

  // Nothing shrinks: prefills (many tokens, few rows) and steps (the other way round) take turns in a server.
  const std::int64_t tokens = std::max(tokens_, room_tokens_), rows = std::max(head_rows(), room_rows_);
  const std::int64_t tile_rows = std::max(tokens_ - plain_rows_, room_tile_rows_);
  threads = std::max(threads, room_threads_);

  // Everything is zeroed: the kernels rely on zeros beyond a row's width.
  std::int64_t offset = 0;
  const auto place = [&offset](std::int64_t bytes) {
    const std::int64_t at = offset;
    offset += round_up(bytes, 256);
    return at;
  };
  const std::int64_t float_bytes = sizeof(float);
  const std::int64_t u = place(tokens * stride_ * float_bytes), z_l = place(tokens * stride_ * float_bytes);
  const std::int64_t z_h = place(tokens * stride_ * float_bytes),
                     picked = place(rows * stride_ * float_bytes);
  const std::int64_t gqkv = place(tokens * gqkv_stride_ * float_bytes);
  const std::int64_t attended = place(tokens * attended_stride_ * float_bytes);
  const std::int64_t hidden = place(tokens * hidden_stride_ * float_bytes);
  const std::int64_t x = place((tokens > rows ? tokens : rows) * x_row_bytes_);
  const std::int64_t narrow = stride_ > attended_stride_ ? stride_ : attended_stride_;
  const std::int64_t tiles = place(tile_rows_of(nullptr, tile_rows, narrow).bytes());
  const std::int64_t hidden_tiles = place(tile_rows_of(nullptr, tile_rows, shape_.ffn).bytes());
  const std::int64_t scratch = place(threads * scratch_bytes_);
  room_tokens_ = room_tile_rows_ = room_rows_ = 0;
  memory_ = Memory();  // the old room goes before the new one comes
  memory_ = Memory(offset);
  const auto floats = [this](std::int64_t at) { return reinterpret_cast<float*>(memory_.data() + at); };
  u_ = floats(u);
  z_l_ = floats(z_l);
  z_h_ = floats(z_h);
  picked_ = floats(picked);
  gqkv_ = floats(gqkv);
  attended_ = floats(attended);
  hidden_ = floats(hidden);
  x_ = memory_.data() + x;
  tiles_ = memory_.data() + tiles;
  hidden_tiles_ = memory_.data() + hidden_tiles;
  scratch_ = floats(scratch);
  room_tokens_ = tokens;
  room_tile_rows_ = tile_rows;
  room_rows_ = rows;
  room_threads_ = threads;
}

Recurrence::Ended Recurrence::run(ThreadPool& pool, float* logits, std::int64_t most,
                                  const Interrupt& interrupt) noexcept {
  logits_ = logits;
  interrupt_ = interrupt;
  const auto began = asked_ = std::chrono::steady_clock::now();
  stopped_.store(false, std::memory_order_relaxed);
  until_ = most < halves() - done_ ? done_ + most : halves();
  const bool streams_all = tokens_ <= streaming_tokens && done_ == 0 && until_ == halves();
  asks_ahead_ = !streams_all || trial_.begin(tokens_);
  pool.run([](void* self, Worker& worker) { static_cast<Recurrence*>(self)->work(worker); }, this);
  if (stopped_.load(std::memory_order_relaxed)) return Ended::stopped;
  if (streams_all) trial_.end(std::chrono::steady_clock::now() - began);
  done_ = until_;
  return done_ == halves() ? Ended::done : Ended::paused;
}

void Recurrence::work(Worker& worker) {
  if (done_ == 0) embed(worker);
  for (std::int64_t half = done_; half < until_; ++half) {
    if (half % 2 == 0 ? !attention_half(worker, half / 2) : !feed_forward_half(worker, half / 2)) return;
  }
  if (until_ == halves()) head(worker);
}

void Recurrence::embed(Worker& worker) {
  worker.parallel_for(tokens_, [this](std::int64_t token) {
    weights_.embed(ids_[static_cast<std::size_t>(token)], shape_.embedding_scale, z_h_ + token * stride_);
    std::memcpy(z_l_ + token * stride_, weights_.z_init(),
                static_cast<std::size_t>(shape_.width) * sizeof(float));
  });
}

const LayerWeights& Recurrence::layer_of(std::int64_t slot) const {
  const LayerVisit& visit = visits_[static_cast<std::size_t>(slot)];
  return weights_.layers(visit.stack)[static_cast<std::size_t>(visit.layer)];
}

// False when the step is to stop, which all threads see alike: one of them asks before a phase, all look
// after it, and whoever looks has done so before the next question, which is several phases away.
bool Recurrence::attention_half(Worker& worker, std::int64_t slot) {
  const LayerVisit& visit = visits_[static_cast<std::size_t>(slot)];
  const LayerWeights& w = layer_of(slot);
  if (tokens_ > streaming_tokens || visit.layer % streaming_layers == 0) ask(worker);
  const float *state = visit.stack == Stack::H ? z_h_ : z_l_, *other = visit.stack == Stack::H ? z_l_ : z_h_;
  const Operand input =
      visit.first ? normalise(worker, state, other, u_) : normalise(worker, u_, nullptr, nullptr);
  if (stopped_.load(std::memory_order_relaxed)) return false;
  worker.hint(prefetch_hint(w.o));
  gqkv_gemm(worker, w.gqkv, input);
  attention(worker, slot);
  const Operand attended = attended_operand(worker);
  worker.hint(prefetch_hint(w.gate_up));
  add_gemm(worker, w.o, attended);
  return true;
}

bool Recurrence::feed_forward_half(Worker& worker, std::int64_t slot) {
  const LayerVisit& visit = visits_[static_cast<std::size_t>(slot)];
  const LayerWeights& w = layer_of(slot);
  if (tokens_ > streaming_tokens) ask(worker);
  const Operand middle = normalise(worker, u_, nullptr, nullptr);
  if (stopped_.load(std::memory_order_relaxed)) return false;
  worker.hint(prefetch_hint(w.down));
  swiglu_gemm(worker, w.gate_up, middle);
  const Operand hidden = hidden_operand(worker);
  worker.hint(prefetch_hint(2 * (slot + 1) < halves() ? layer_of(slot + 1).gqkv : weights_.head()));
  add_gemm(worker, w.down, hidden);
  if (every_layer_) pick_layer(worker, slot);
  if (visit.last) normalise_state(worker, visit.stack == Stack::H ? z_h_ : z_l_);
  return true;
}

// One thread alone: u_ is next written, and picked_ next read, after phases that end when it has joined in.
void Recurrence::pick_layer(const Worker& worker, std::int64_t slot) {
  if (worker.rank() != 0) return;
  auto* picked = reinterpret_cast<std::byte*>(picked_ + slot * stride_);
  normalise_rows(NormaliseRows{u_ + rows_.back() * stride_, nullptr, nullptr, picked, Packing::f32,
                               shape_.width, stride_, stride_ * std::int64_t{sizeof(float)}, 0, 1,
                               shape_.eps});
}

void Recurrence::ask(const Worker& worker) {
  if (worker.rank() != 0 || interrupt_.wanted == nullptr) return;
  const auto now = std::chrono::steady_clock::now();
  if (now - asked_ < patience) return;
  asked_ = now;
  if (interrupt_.wanted(interrupt_.context)) stopped_.store(true, std::memory_order_relaxed);
}

void Recurrence::attention(Worker& worker, std::int64_t slot) {
  const std::int64_t step = rows_a_task(tokens_);
  worker.parallel_for((tokens_ + step - 1) / step, [&](std::int64_t task) {
    const std::int64_t begin = task * step, end = begin + step < tokens_ ? begin + step : tokens_;
    append_tokens(AppendTokens{cache_, xpos_, slot, places_.data(), gqkv_, gqkv_stride_, begin, end, rope_});
  });
  worker.parallel_for(static_cast<std::int64_t>(tasks_.size()), [&](std::int64_t index) {
    attend_task(worker, tasks_[static_cast<std::size_t>(index)], slot);
  });
}

void Recurrence::attend_task(Worker& worker, const Task& task, std::int64_t slot) {
  const Chunk& chunk = chunks_[static_cast<std::size_t>(task.chunk)];
  const std::int64_t first = firsts_[static_cast<std::size_t>(task.chunk)];
  const float* gqkv = gqkv_ + first * gqkv_stride_;
  float* out = attended_ + first * attended_stride_;
  if (attends_in_tiles_ && task.chunk >= plain_chunks_) {  // a whole prefix, which begins at position 0
    attend_prefix(AttendPrefix{cache_, xpos_, window_, slot, task.head, chunk.pages, chunk.prefix,
                               task.query_begin, task.query_end, gqkv, gqkv_stride_, out, attended_stride_,
                               reinterpret_cast<std::byte*>(scratch(worker))});
    return;
  }
  attend(Attend{cache_, xpos_, window_, slot, task.head, chunk.pages, chunk.start, chunk.prefix,
                task.query_begin, task.query_end, gqkv, gqkv_stride_, out, attended_stride_});
}

// plain(begin, end) over pieces of the plain rows, tiles(begin, end) over pieces of those in tiles,
// counted from the first of them.
template <class Plain, class Tiles>
void Recurrence::parallel_rows(Worker& worker, const Plain& plain, const Tiles& tiles) {
  const std::int64_t step = rows_a_task(tokens_), tile_rows = tokens_ - plain_rows_;
  const std::int64_t plain_tasks = (plain_rows_ + step - 1) / step;
  worker.parallel_for(plain_tasks + (tile_rows + step - 1) / step, [&](std::int64_t task) {
    const bool is_plain = task < plain_tasks;
    const std::int64_t rows = is_plain ? plain_rows_ : tile_rows;
    const std::int64_t begin = (is_plain ? task : task - plain_tasks) * step;
    const std::int64_t end = begin + step < rows ? begin + step : rows;
    is_plain ? plain(begin, end) : tiles(begin, end);
  });
}

Recurrence::Operand Recurrence::normalise(Worker& worker, const float* x, const float* add, float* sum) {
  const Packing packing = weights_.packing();
  Operand y{x_, groups_of(shape_.width) * activation_bytes(packing), plain_rows_, {}, 0};
  add_tiles(y, tiles_, shape_.width);
  parallel_rows(
      worker,
      [&](std::int64_t begin, std::int64_t end) {
        normalise_rows(NormaliseRows{x, add, sum, x_, packing, shape_.width, stride_, y.row_bytes, begin, end,
                                     shape_.eps});
      },
      [&](std::int64_t begin, std::int64_t end) {
        const std::int64_t skipped = plain_rows_ * stride_;
        normalise_tiles(NormaliseTiles{x + skipped, add == nullptr ? nullptr : add + skipped,
                                       sum == nullptr ? nullptr : sum + skipped, shape_.width, stride_,
                                       y.tiles, begin, end, shape_.eps});
      });
  return y;
}

// A stack's result: its last norm, in float32.
void Recurrence::normalise_state(Worker& worker, float* state) {
  const std::int64_t step = rows_a_task(tokens_);
  worker.parallel_for((tokens_ + step - 1) / step, [&](std::int64_t task) {
    const std::int64_t begin = task * step, end = begin + step < tokens_ ? begin + step : tokens_;
    normalise_rows(NormaliseRows{u_, nullptr, nullptr, reinterpret_cast<std::byte*>(state), Packing::f32,
                                 shape_.width, stride_, stride_ * std::int64_t{sizeof(float)}, begin, end,
                                 shape_.eps});
  });
}

// Float32 rows as a GEMM wants them; those in tiles are not among them.
Recurrence::Operand Recurrence::plain_operand(Worker& worker, const float* x, std::int64_t stride,
                                              std::int64_t columns, std::int64_t rows, Packing packing) {
  if (!is_quantised(packing))
    return {reinterpret_cast<const std::byte*>(x), stride * std::int64_t{sizeof(float)}, rows, {}, 0};
  const std::int64_t groups = groups_of(columns), step = rows_a_task(rows);
  if (rows > 0) {
    worker.parallel_for((rows + step - 1) / step, [&](std::int64_t task) {
      const std::int64_t begin = task * step, end = begin + step < rows ? begin + step : rows;
      quantise_rows(QuantiseRows{x, x_, groups, stride, begin, end});
    });
  }
  return {x_, groups * activation_bytes(packing), rows, {}, 0};
}

Recurrence::Operand Recurrence::attended_operand(Worker& worker) {
  const std::int64_t columns = shape_.attention_width();
  Operand y = plain_operand(worker, attended_, attended_stride_, columns, plain_rows_, weights_.packing());
  add_tiles(y, tiles_, columns);
  if (y.tile_rows > 0) {
    const std::int64_t step = rows_a_task(y.tile_rows);
    worker.parallel_for((y.tile_rows + step - 1) / step, [&](std::int64_t task) {
      const std::int64_t begin = task * step, end = begin + step < y.tile_rows ? begin + step : y.tile_rows;
      round_tiles(
          RoundTiles{attended_ + plain_rows_ * attended_stride_, attended_stride_, y.tiles, begin, end});
    });
  }
  return y;
}

Recurrence::Operand Recurrence::hidden_operand(Worker& worker) {
  Operand y = plain_operand(worker, hidden_, hidden_stride_, shape_.ffn, plain_rows_, weights_.packing());
  add_tiles(y, hidden_tiles_, shape_.ffn);
  return y;
}

void Recurrence::add_tiles(Operand& y, std::byte* data, std::int64_t columns) const {
  y.tile_rows = tokens_ - plain_rows_;
  y.tiles = tile_rows_of(data, y.tile_rows, columns);
}

TileRows Recurrence::tile_rows_of(std::byte* data, std::int64_t rows, std::int64_t columns) const {
  const Packing packing = is_quantised(weights_.packing()) ? Packing::int8 : Packing::bf16;
  return {data, packing, bands_of(rows), columns};
}

void Recurrence::gqkv_gemm(Worker& worker, const PackedMatrix& weights, const Operand& x) {
  multiply(worker, weights, x, nullptr, [this](UnloadTiles sums, std::int64_t panel, std::int64_t row) {
    sums.out = gqkv_ + (plain_rows_ + row) * gqkv_stride_ + panel * panel_rows;
    sums.out_stride = gqkv_stride_;
    unload_tiles(sums);
  });
}

// u += weights x
void Recurrence::add_gemm(Worker& worker, const PackedMatrix& weights, const Operand& x) {
  multiply(
      worker, weights, x,
      [this](const float* block, std::int64_t stride, std::int64_t panel, std::int64_t panels,
             std::int64_t token, std::int64_t tokens) {
        float* u = u_ + token * stride_ + panel * panel_rows;
        add_rows(AddRows{u, block, tokens, panels * panel_rows, stride_, stride});
      },
      [this](UnloadTiles sums, std::int64_t panel, std::int64_t row) {
        sums.out = u_ + (plain_rows_ + row) * stride_ + panel * panel_rows;
        sums.out_stride = stride_;
        sums.add = true;
        unload_tiles(sums);
      });
}

void Recurrence::swiglu_gemm(Worker& worker, const PackedMatrix& weights, const Operand& x) {
  multiply(
      worker, weights, x,
      [this](const float* block, std::int64_t stride, std::int64_t panel, std::int64_t panels,
             std::int64_t token, std::int64_t tokens) {
        float* out = hidden_ + token * hidden_stride_ + panel * panel_rows / 2;
        swiglu_rows(SwigluRows{block, out, tokens, panels, stride, hidden_stride_});
      },
      [&](const UnloadTiles& sums, std::int64_t panel, std::int64_t row) {
        const TileRows hidden = tile_rows_of(hidden_tiles_, x.tile_rows, shape_.ffn);
        swiglu_tiles(SwigluTiles{sums.sums, sums.panels, sums.rows, hidden, row, panel / chunk_panels});
      },
      x.tile_rows > 0 ? chunk_panels : 0);
}

void Recurrence::head(Worker& worker) {
  const std::int64_t rows = head_rows();
  worker.parallel_for(every_layer_ ? 0 : rows, [this](std::int64_t row) {
    const float* from = z_h_ + rows_[static_cast<std::size_t>(row)] * stride_;
    std::memcpy(picked_ + row * stride_, from, static_cast<std::size_t>(stride_) * sizeof(float));
  });
  const Operand x = plain_operand(worker, picked_, stride_, shape_.width, rows, weights_.head().packing);
  multiply(
      worker, weights_.head(), x,
      [this](const float* block, std::int64_t stride, std::int64_t panel, std::int64_t panels,
             std::int64_t row, std::int64_t count) {
        const std::int64_t column = panel * panel_rows, left = shape_.vocabulary - column;
        const std::int64_t columns = left < panels * panel_rows ? left : panels * panel_rows;
        for (std::int64_t r = 0; r < count; ++r) {
          std::memcpy(logits_ + (row + r) * shape_.vocabulary + column, block + r * stride,
                      static_cast<std::size_t>(columns) * sizeof(float));
        }
      },
      nullptr);
}

// `finish(block, stride, first panel, panels, first row, rows)` gets each block of outputs of the plain rows;
// without one (nullptr) they go to gqkv_. `finish_tiles(sums, first panel, first row)` gets those in tiles.
// `panels_together`: those that must come to it in one piece, from a multiple of them on.
template <class Finish, class FinishTiles>
void Recurrence::multiply(Worker& worker, const PackedMatrix& weights, const Operand& x, const Finish& finish,
                          const FinishTiles& finish_tiles, std::int64_t panels_together) {
  const std::int64_t rows = x.rows + x.tile_rows, panels = weights.panels();
  const std::int64_t step = panels_together > 0 ? panels_together : panels_a_task(rows);
  worker.parallel_for((panels + step - 1) / step, [&](std::int64_t task) {
    const std::int64_t begin = task * step, end = begin + step < panels ? begin + step : panels;
    float* room = scratch(worker);
    auto* expanded = reinterpret_cast<std::byte*>(room + outputs_floats);
    for (std::int64_t row = 0; row < x.rows; row += gemm_tokens) {
      const std::int64_t count = x.rows - row < gemm_tokens ? x.rows - row : gemm_tokens;
      PackedGemm gemm{weights,     begin,      end,  x.data + row * x.row_bytes,
                      x.row_bytes, count,      room, (end - begin) * panel_rows,
                      expanded,    asks_ahead_};
      if constexpr (std::is_same_v<Finish, std::nullptr_t>) {
        gemm.out = gqkv_ + row * gqkv_stride_ + begin * panel_rows;
        gemm.out_stride = gqkv_stride_;
        packed_gemm(gemm);
      } else {
        packed_gemm(gemm);
        finish(room, gemm.out_stride, begin, end - begin, row, count);
      }
    }
    if constexpr (!std::is_same_v<FinishTiles, std::nullptr_t>) {
      for (std::int64_t row = 0; row < x.tile_rows; row += gemm_tokens) {
        const std::int64_t count = x.tile_rows - row < gemm_tokens ? x.tile_rows - row : gemm_tokens;
        const TileGemm gemm{weights, begin, end, x.tiles, row / band_rows, count, room, expanded};
        x.tiles.packing == Packing::int8 ? tile_gemm_int8(gemm) : tile_gemm_bf16(gemm);
        finish_tiles(UnloadTiles{room, end - begin, count, nullptr, 0, false}, begin, row);
      }
    }
  });
}

PrefetchHint Recurrence::prefetch_hint(const PackedMatrix& weights) const {
  if (tokens_ > streaming_tokens) return {};
  return {weights.data, weights.panel_bytes(), weights.panels()};
}

float* Recurrence::scratch(const Worker& worker) const {
  return scratch_ + worker.rank() * scratch_bytes_ / std::int64_t{sizeof(float)};
}

}  // namespace hrmcore
