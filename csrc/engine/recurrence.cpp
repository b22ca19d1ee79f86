#include "engine/recurrence.h"

#include <cstddef>
#include <cstring>
#include <type_traits>

#include "engine/product.h"
#include "engine/rows.h"

namespace hrmcore {
namespace {

constexpr std::int64_t product_tokens = 256;  // of a block of outputs that stays in the second-level cache
constexpr std::int64_t streaming_tokens =
    16;  // up to here the weights' stream decides, beyond it the arithmetic
constexpr std::int64_t most_panels = 4;
constexpr std::int64_t scratch_floats =
    product_tokens * most_panels * panel_rows + product_scratch_bytes / std::int64_t{sizeof(float)};

std::int64_t round_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }

std::int64_t panels_a_task(std::int64_t rows) { return rows <= streaming_tokens ? 1 : most_panels; }

std::int64_t rows_a_task(std::int64_t rows) { return rows <= 64 ? 1 : 8; }

}  // namespace

Recurrence::Recurrence(const ModelShape& shape, const Weights& weights, const CacheShape& cache,
                       const float* rope)
    : shape_(shape), weights_(weights), cache_(cache), rope_(rope) {
  stride_ = round_up(shape.width, panel_rows);
  gqkv_stride_ = round_up(4 * shape.attention_width(), panel_rows);
  attended_stride_ = round_up(shape.attention_width(), panel_rows);
  hidden_stride_ = round_up(shape.ffn, panel_rows);
  std::int64_t widest = shape.width;
  for (std::int64_t columns : {shape.attention_width(), shape.ffn})
    widest = columns > widest ? columns : widest;
  x_row_bytes_ = groups_of(widest) * activation_bytes(weights.packing());
}

void Recurrence::prepare(const std::vector<Chunk>& chunks, bool every_row, int threads) {
  chunks_ = chunks;
  tasks_.clear();
  places_.clear();
  ids_.clear();
  rows_.clear();
  firsts_.clear();
  for (const Chunk& chunk : chunks) {
    firsts_.push_back(static_cast<std::int64_t>(ids_.size()));
    for (std::int64_t i = 0; i < chunk.tokens; ++i) {
      const std::int64_t position = chunk.start + i;
      if (every_row || i + 1 == chunk.tokens) rows_.push_back(static_cast<std::int64_t>(ids_.size()));
      ids_.push_back(chunk.ids[i]);
      places_.push_back({const_cast<std::byte*>(chunk.blocks[position / block_tokens]), position});
    }
  }
  for (std::int64_t chunk = 0; chunk < static_cast<std::int64_t>(chunks.size()); ++chunk) {
    const std::int64_t tokens = chunks[static_cast<std::size_t>(chunk)].tokens;
    for (std::int64_t head = 0; head < shape_.heads; ++head) {
      for (std::int64_t query = 0; query < tokens; query += query_tile) {
        tasks_.push_back({chunk, head, query, query + query_tile < tokens ? query + query_tile : tokens});
      }
    }
  }
  tokens_ = static_cast<std::int64_t>(ids_.size());
  const auto rows = static_cast<std::int64_t>(rows_.size());
  if (tokens_ <= room_tokens_ && rows <= room_rows_ && threads <= room_threads_) return;

  // Everything is zeroed: the kernels rely on zeros beyond a row's width.
  std::int64_t offset = 0;
  const auto place = [&offset](std::int64_t bytes) {
    const std::int64_t at = offset;
    offset += round_up(bytes, 256);
    return at;
  };
  const std::int64_t float_bytes = sizeof(float);
  const std::int64_t u = place(tokens_ * stride_ * float_bytes),
                     fast = place(tokens_ * stride_ * float_bytes);
  const std::int64_t slow = place(tokens_ * stride_ * float_bytes),
                     picked = place(rows * stride_ * float_bytes);
  const std::int64_t gqkv = place(tokens_ * gqkv_stride_ * float_bytes);
  const std::int64_t attended = place(tokens_ * attended_stride_ * float_bytes);
  const std::int64_t hidden = place(tokens_ * hidden_stride_ * float_bytes);
  const std::int64_t x = place((tokens_ > rows ? tokens_ : rows) * x_row_bytes_);
  const std::int64_t scratch = place(threads * scratch_floats * float_bytes);
  room_tokens_ = 0;
  memory_ = Memory();  // the old room goes before the new one comes
  memory_ = Memory(offset);
  const auto floats = [this](std::int64_t at) { return reinterpret_cast<float*>(memory_.data() + at); };
  u_ = floats(u);
  fast_ = floats(fast);
  slow_ = floats(slow);
  picked_ = floats(picked);
  gqkv_ = floats(gqkv);
  attended_ = floats(attended);
  hidden_ = floats(hidden);
  x_ = memory_.data() + x;
  scratch_ = floats(scratch);
  room_tokens_ = tokens_;
  room_rows_ = rows;
  room_threads_ = threads;
}

void Recurrence::run(Team& team, float* logits) noexcept {
  logits_ = logits;
  team.run([](void* self, Worker& worker) { static_cast<Recurrence*>(self)->work(worker); }, this);
}

void Recurrence::work(Worker& worker) {
  embed(worker);
  const std::int64_t round = shape_.l_cycles + 1, visits = shape_.h_cycles * round;
  const auto is_slow = [&](std::int64_t index) { return index % round == shape_.l_cycles; };
  for (std::int64_t index = 0; index < visits; ++index) {
    const bool last = index + 1 == visits;
    visit(worker, is_slow(index), index,
          last ? weights_.head() : weights_.stack(is_slow(index + 1)).front().gqkv);
  }
  head(worker);
}

void Recurrence::embed(Worker& worker) {
  worker.share(tokens_, [this](std::int64_t token) {
    weights_.embed(ids_[static_cast<std::size_t>(token)], shape_.embedding_scale, slow_ + token * stride_);
    std::memcpy(fast_ + token * stride_, weights_.z_init(),
                static_cast<std::size_t>(shape_.width) * sizeof(float));
  });
}

void Recurrence::visit(Worker& worker, bool slow, std::int64_t visit, const PackedMatrix& next) {
  const std::vector<LayerWeights>& layers = weights_.stack(slow);
  const Packing packing = weights_.packing();
  const std::int64_t normed_bytes = groups_of(shape_.width) * activation_bytes(packing);
  float* state = slow ? slow_ : fast_;
  const auto add_to_u = [this](const float* block, std::int64_t stride, std::int64_t panel,
                               std::int64_t panels, std::int64_t token, std::int64_t tokens) {
    float* u = u_ + token * stride_ + panel * panel_rows;
    add_rows(AddRows{u, block, tokens, panels * panel_rows, stride_, stride});
  };
  for (std::int64_t layer = 0; layer < shape_.layers; ++layer) {
    const LayerWeights& w = layers[static_cast<std::size_t>(layer)];
    if (layer == 0) {
      normalise(worker, state, slow ? fast_ : slow_, u_, x_, normed_bytes, packing);
    } else {
      normalise(worker, u_, nullptr, nullptr, x_, normed_bytes, packing);
    }
    worker.expect(upcoming(w.o));
    multiply(worker, w.gqkv, {x_, normed_bytes}, tokens_, nullptr);
    attention(worker, visit * shape_.layers + layer);
    const Operand attended =
        operand(worker, attended_, attended_stride_, shape_.attention_width(), tokens_, packing);
    worker.expect(upcoming(w.gate_up));
    multiply(worker, w.o, attended, tokens_, add_to_u);
    normalise(worker, u_, nullptr, nullptr, x_, normed_bytes, packing);
    worker.expect(upcoming(w.down));
    multiply(worker, w.gate_up, {x_, normed_bytes}, tokens_,
             [this](const float* block, std::int64_t stride, std::int64_t panel, std::int64_t panels,
                    std::int64_t token, std::int64_t tokens) {
               float* out = hidden_ + token * hidden_stride_ + panel * panel_rows / 2;
               swiglu_rows(SwigluRows{block, out, tokens, panels, stride, hidden_stride_});
             });
    const Operand hidden = operand(worker, hidden_, hidden_stride_, shape_.ffn, tokens_, packing);
    worker.expect(
        upcoming(layer + 1 < shape_.layers ? layers[static_cast<std::size_t>(layer) + 1].gqkv : next));
    multiply(worker, w.down, hidden, tokens_, add_to_u);
  }
  normalise(worker, u_, nullptr, nullptr, reinterpret_cast<std::byte*>(state),
            stride_ * std::int64_t{sizeof(float)}, Packing::f32);
}

void Recurrence::attention(Worker& worker, std::int64_t slot) {
  const std::int64_t step = rows_a_task(tokens_);
  worker.share((tokens_ + step - 1) / step, [&](std::int64_t task) {
    const std::int64_t begin = task * step, end = begin + step < tokens_ ? begin + step : tokens_;
    append_tokens(AppendTokens{cache_, slot, places_.data(), gqkv_, gqkv_stride_, begin, end, rope_});
  });
  worker.share(static_cast<std::int64_t>(tasks_.size()), [&](std::int64_t index) {
    const Task& task = tasks_[static_cast<std::size_t>(index)];
    const Chunk& chunk = chunks_[static_cast<std::size_t>(task.chunk)];
    const std::int64_t first = firsts_[static_cast<std::size_t>(task.chunk)];
    attend(Attend{cache_, slot, task.head, chunk.blocks, chunk.start, chunk.prefix, task.query_begin,
                  task.query_end, gqkv_ + first * gqkv_stride_, gqkv_stride_,
                  attended_ + first * attended_stride_, attended_stride_});
  });
}

void Recurrence::normalise(Worker& worker, const float* x, const float* add, float* sum, std::byte* y,
                           std::int64_t y_row_bytes, Packing packing) {
  const std::int64_t step = rows_a_task(tokens_);
  worker.share((tokens_ + step - 1) / step, [&](std::int64_t task) {
    const std::int64_t begin = task * step, end = begin + step < tokens_ ? begin + step : tokens_;
    normalise_rows(
        NormaliseRows{x, add, sum, y, packing, shape_.width, stride_, y_row_bytes, begin, end, shape_.eps});
  });
}

Recurrence::Operand Recurrence::operand(Worker& worker, const float* x, std::int64_t stride,
                                        std::int64_t columns, std::int64_t rows, Packing packing) {
  if (!is_quantised(packing))
    return {reinterpret_cast<const std::byte*>(x), stride * std::int64_t{sizeof(float)}};
  const std::int64_t groups = groups_of(columns), step = rows_a_task(rows);
  worker.share((rows + step - 1) / step, [&](std::int64_t task) {
    const std::int64_t begin = task * step, end = begin + step < rows ? begin + step : rows;
    quantise_rows(QuantiseRows{x, x_, groups, stride, begin, end});
  });
  return {x_, groups * activation_bytes(packing)};
}

void Recurrence::head(Worker& worker) {
  const auto rows = static_cast<std::int64_t>(rows_.size());
  worker.share(rows, [this](std::int64_t row) {
    const float* from = slow_ + rows_[static_cast<std::size_t>(row)] * stride_;
    std::memcpy(picked_ + row * stride_, from, static_cast<std::size_t>(stride_) * sizeof(float));
  });
  const Operand x = operand(worker, picked_, stride_, shape_.width, rows, weights_.head().packing);
  multiply(worker, weights_.head(), x, rows,
           [this](const float* block, std::int64_t stride, std::int64_t panel, std::int64_t panels,
                  std::int64_t row, std::int64_t count) {
             const std::int64_t column = panel * panel_rows, left = shape_.vocabulary - column;
             const std::int64_t columns = left < panels * panel_rows ? left : panels * panel_rows;
             for (std::int64_t r = 0; r < count; ++r) {
               std::memcpy(logits_ + (row + r) * shape_.vocabulary + column, block + r * stride,
                           static_cast<std::size_t>(columns) * sizeof(float));
             }
           });
}

// `finish(block, stride, first panel, panels, first row, rows)` gets each block of outputs; without one
// (nullptr) they go to gqkv_.
template <class Finish>
void Recurrence::multiply(Worker& worker, const PackedMatrix& weights, const Operand& x, std::int64_t rows,
                          const Finish& finish) {
  const std::int64_t step = panels_a_task(rows), panels = weights.panels();
  worker.share((panels + step - 1) / step, [&](std::int64_t task) {
    const std::int64_t begin = task * step, end = begin + step < panels ? begin + step : panels;
    float* room = scratch(worker);
    auto* expanded = reinterpret_cast<std::byte*>(room + product_tokens * most_panels * panel_rows);
    for (std::int64_t row = 0; row < rows; row += product_tokens) {
      const std::int64_t count = rows - row < product_tokens ? rows - row : product_tokens;
      PackedProduct product{weights,     begin, end,  x.data + row * x.row_bytes,
                            x.row_bytes, count, room, (end - begin) * panel_rows,
                            expanded};
      if constexpr (std::is_same_v<Finish, std::nullptr_t>) {
        product.out = gqkv_ + row * gqkv_stride_ + begin * panel_rows;
        product.out_stride = gqkv_stride_;
        packed_product(product);
      } else {
        packed_product(product);
        finish(room, product.out_stride, begin, end - begin, row, count);
      }
    }
  });
}

Upcoming Recurrence::upcoming(const PackedMatrix& weights) const {
  if (tokens_ > streaming_tokens) return {};
  return {weights.data, weights.panel_bytes(), weights.panels()};
}

float* Recurrence::scratch(const Worker& worker) const { return scratch_ + worker.rank() * scratch_floats; }

}  // namespace hrmcore
