#include "gemm/gemm.h"

#include "gemm/dots.h"
#include "gemm/gemm_chunk.h"
#include "gemm/i8mm_pairs.h"
#include "gemm/lanes.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

// A tile is `vectors` vectors of a panel's 64 rows by up to so many tokens: as many sums as the registers
// hold, of integers at least.
#if defined(HRMCORE_ISA_vnni)
constexpr int vectors = 4, float_tokens = 6, byte_tokens = 4, nibble_tokens = 4;
#elif defined(HRMCORE_ISA_avx512)
constexpr int vectors = 4, float_tokens = 6, byte_tokens = 2, nibble_tokens = 4;
#elif defined(HRMCORE_ISA_avxvnni)
constexpr int vectors = 2, float_tokens = 6, byte_tokens = 4, nibble_tokens = 4;
#elif defined(HRMCORE_ISA_avx2)
constexpr int vectors = 2, float_tokens = 6, byte_tokens = 2, nibble_tokens = 4;
#elif defined(HRMCORE_ARM64)
constexpr int vectors = 4, float_tokens = 6, byte_tokens = 3, nibble_tokens = 3;
#else
constexpr int vectors = 2, float_tokens = 4, byte_tokens = 2, nibble_tokens = 4;
#endif
// A group's sums stay in registers from one cell to the next where its cells are unrolled; Arm's do so by
// themselves, and unrolled they would not fit.
#if defined(HRMCORE_ARM64)
#define HRMCORE_UNROLL_CELLS
#else
#define HRMCORE_UNROLL_CELLS _Pragma("GCC unroll 8")
#endif
// From here on, unpacking a chunk once beats doing it in every tile.
constexpr std::int64_t expand_from_tokens = lanes == 16 ? 64 : 13;

// What a slab's cells hold. `nibbles` unpacks to `bytes_of_nibbles`, which keeps the nibbles' offset of 8.
enum class Cells : std::uint8_t { floats, halves, bytes, nibbles, bytes_of_nibbles };

constexpr bool is_float(Cells cells) { return cells == Cells::floats || cells == Cells::halves; }
// Tiles of few tokens have more rows where registers are narrow: on Arm for enough independent chains of sums, on x86 so
// that one or two meet a panel in one piece. In tiles of 16 rows they would come by for every fourth line of memory,
// which no prefetching of the processor's own follows; what the registers then do not hold stays in the nearest cache.
constexpr int vectors_of([[maybe_unused]] Cells cells, [[maybe_unused]] std::int64_t tokens) {
#if defined(HRMCORE_ARM64)
  return tokens <= (is_float(cells) ? 2 : 1) ? 2 * vectors : vectors;
#elif defined(HRMCORE_AVX512)
  return vectors;
#else
  return tokens <= 2 ? 4 * vectors : vectors;
#endif
}
constexpr int slabs_of(Cells cells) {
  return cells == Cells::floats ? 32 : cells == Cells::halves ? 16 : cells == Cells::nibbles ? 4 : 8;
}
constexpr std::int64_t bytes_of(Cells cells) {
  return slabs_of(cells) * slab_bytes + (is_float(cells) ? 0 : scale_bytes);
}

// What a tile asks for while it multiplies. Of n tiles, tile i fetches the slabs i, i + n, ... of the chunk
// behind this one from memory, into the second-level cache: asked for the first level, they would wait in its
// few line fill buffers, and in a burst of them what is needed now would, too. The first tile then fetches
// its own slabs from there a little ahead.
struct Ahead {
  std::int64_t distance;  // to the chunk behind this one, bytes; 0: fetch nothing
  std::int64_t skip, step;
  bool first;
};

constexpr std::int64_t near_bytes = 1024;

HRMCORE_INLINE void fetch(const std::byte* from, std::int64_t bytes, Ahead& ahead) {
  if (ahead.distance == 0) return;
  if (ahead.first) {
    for (std::int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + near_bytes + line, 0, 3);
  }
  if (ahead.skip-- > 0) return;
  ahead.skip = ahead.step - 1;
  for (std::int64_t line = 0; line < bytes; line += 64)
    __builtin_prefetch(from + ahead.distance + line, 0, 2);
}

// A function each, which cmake/check_neon.py finds.
template <Cells cells, int tokens>
[[gnu::noinline]] void float_tile(const GemmChunk& c, const std::byte* w, const std::byte* x, float* out,
                                  Ahead ahead) {
  constexpr int columns = group_columns / slabs_of(cells);  // in a cell
  constexpr int wide = vectors_of(cells, tokens);
  vfloat sums[tokens][wide] = {};
  const std::byte* whole = c.weights;
  for (std::int64_t group = 0; group < c.groups; ++group) {
    for (int slab = 0; slab < slabs_of(cells); ++slab, w += slab_bytes, whole += slab_bytes) {
      fetch(whole, slab_bytes, ahead);
#pragma GCC unroll 2
      for (int column = 0; column < columns; ++column) {
        vfloat weight[wide];
#pragma GCC unroll 8
        for (int v = 0; v < wide; ++v) {
          const vint cell = load_bits(w + v * lanes * 4);
          weight[v] = cells == Cells::floats ? (vfloat)cell : column == 0 ? low_half(cell) : high_half(cell);
        }
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
          const float* row = reinterpret_cast<const float*>(x + t * c.x_row_bytes) + group * group_columns;
          const vfloat value = splat(row[columns * slab + column]);
#pragma GCC unroll 8
          for (int v = 0; v < wide; ++v) sums[t][v] = fma(weight[v], value, sums[t][v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < wide; ++v) {
      float* p = out + t * c.out_stride + v * lanes;
      store(p, c.accumulate ? load(p) + sums[t][v] : sums[t][v]);
    }
  }
}

template <Cells cells, int tokens>
[[gnu::noinline]] void int_tile(const GemmChunk& c, const std::byte* w, const std::byte* x, float* out,
                                Ahead ahead) {
  constexpr int slabs = slabs_of(cells),
                parts = cells == Cells::nibbles ? 2 : 1;           // of a cell, four columns each
  constexpr bool flips = cells == Cells::bytes && signed_weights;  // w + 128 becomes w
  constexpr std::int32_t offset = flips ? 0 : cells == Cells::bytes ? 128 : 8;
  constexpr int wide = vectors_of(cells, tokens);
  static_assert(slabs * parts == most_cells);
  vfloat sums[tokens][wide];
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < wide; ++v) {
      sums[t][v] = c.accumulate ? load(out + t * c.out_stride + v * lanes) : vfloat{};
    }
  }
  // Scales close a group and take 2 bytes a row, where a slab takes 4.
  const std::byte* scales = c.weights + slabs_of(cells) * slab_bytes + (w - c.weights) / 2;
  const std::byte* whole = c.weights;
  for (std::int64_t group = 0; group < c.groups; ++group) {
    const QuantGroup* row[tokens];
    const auto start = [&](int t)
                           __attribute__((always_inline)) { return splat_bits(-offset * row[t]->sum); };
    Dots<cells != Cells::bytes> dots[tokens][wide];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      row[t] = reinterpret_cast<const QuantGroup*>(x + t * c.x_row_bytes) + group;
#pragma GCC unroll 8
      for (int v = 0; v < wide; ++v) dots[t][v].begin(start(t));
    }
    HRMCORE_UNROLL_CELLS
    for (int slab = 0; slab < slabs; ++slab) {
      fetch(whole + slab * slab_bytes, slab_bytes, ahead);
#pragma GCC unroll 2
      for (int part = 0; part < parts; ++part) {
        vint weight[wide];
#pragma GCC unroll 8
        for (int v = 0; v < wide; ++v) {
          const vint cell = load_bits(w + slab * slab_bytes + v * lanes * 4);
          weight[v] = cells != Cells::nibbles ? cell : part == 0 ? low_nibbles(cell) : high_nibbles(cell);
          if constexpr (flips) weight[v] ^= splat_bits(static_cast<std::int32_t>(0x80808080));
        }
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
          const vint value = splat_bits(load_cell(row[t]->q + 4 * (slab * parts + part)));
#pragma GCC unroll 8
          for (int v = 0; v < wide; ++v) dots[t][v].add(weight[v], value);
        }
      }
    }
    fetch(whole + slabs * slab_bytes, scale_bytes, ahead);
    whole += bytes_of(cells);
#pragma GCC unroll 8
    for (int v = 0; v < wide; ++v) {
      const vfloat scale = load(reinterpret_cast<const bf16*>(scales) + v * lanes);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        sums[t][v] = fma(to_float(dots[t][v].sum(start(t))), scale * row[t]->scale, sums[t][v]);
      }
    }
    w += bytes_of(cells);
    scales += bytes_of(cells);
  }
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < wide; ++v) store(out + t * c.out_stride + v * lanes, sums[t][v]);
  }
}

template <Cells cells, int limit>
HRMCORE_INLINE void tile(std::int64_t tokens, const GemmChunk& c, const std::byte* w, const std::byte* x,
                         float* out, const Ahead& ahead) {
  if (tokens < limit) {
    if constexpr (limit > 1) tile<cells, limit - 1>(tokens, c, w, x, out, ahead);
  } else if constexpr (is_float(cells)) {
    float_tile<cells, limit>(c, w, x, out, ahead);
  } else {
    int_tile<cells, limit>(c, w, x, out, ahead);
  }
}

template <Cells cells>
void multiply_cells(const GemmChunk& c) {
  constexpr int most = is_float(cells) ? float_tokens : cells == Cells::bytes ? byte_tokens : nibble_tokens;
  const auto rows_of = [](std::int64_t tokens) { return vectors_of(cells, tokens) * lanes; };
  const std::int64_t rest = c.tokens % most;
  const std::int64_t tiles =
      c.tokens / most * (panel_rows / rows_of(most)) + (rest > 0 ? panel_rows / rows_of(rest) : 0);
  Ahead ahead{c.streams ? c.groups * bytes_of(cells) : 0, 0, tiles, true};
  for (std::int64_t token = 0; token < c.tokens; token += most) {
    const std::byte* x = c.x + token * c.x_row_bytes;
    const std::int64_t tokens = c.tokens - token < most ? c.tokens - token : most;
    for (std::int64_t row = 0; row < panel_rows; row += rows_of(tokens)) {
      float* out = c.out + token * c.out_stride + row;
      tile<cells, most>(tokens, c, c.weights + 4 * row, x, out, ahead);
      ahead.first = false;
      ++ahead.skip;
    }
  }
}

// bf16 to f32, int4 to bytes; exact.
void expand(Packing packing, const std::byte* from, std::int64_t groups, std::byte* to) {
  const bool halves = packing == Packing::bf16;
  for (std::int64_t group = 0; group < groups; ++group) {
    for (int slab = 0; slab < slabs_of(halves ? Cells::halves : Cells::nibbles); ++slab) {
      for (int cell = 0; cell < panel_rows; cell += lanes) {
        const vint v = load_bits(from + 4 * cell);
        const vint first = halves ? (vint)low_half(v) : low_nibbles(v);
        const vint second = halves ? (vint)high_half(v) : high_nibbles(v);
        __builtin_memcpy(to + 4 * cell, &first, sizeof(first));
        __builtin_memcpy(to + slab_bytes + 4 * cell, &second, sizeof(second));
      }
      from += slab_bytes;
      to += 2 * slab_bytes;
    }
    if (!halves) {
      __builtin_memcpy(to, from, scale_bytes);
      from += scale_bytes;
      to += scale_bytes;
    }
  }
}

}  // namespace

void multiply_chunk(Packing packing, const GemmChunk& chunk) noexcept {
  switch (packing) {
    case Packing::f32:
      return multiply_cells<Cells::floats>(chunk);
    case Packing::bf16:
      return multiply_cells<Cells::halves>(chunk);
    case Packing::int8:
      return multiply_cells<Cells::bytes>(chunk);
    case Packing::int4:
      return multiply_cells<Cells::nibbles>(chunk);
  }
}

void packed_gemm(const PackedGemm& args) noexcept {
  const PackedMatrix& w = args.weights;
  const bool expands =
      (w.packing == Packing::bf16 || w.packing == Packing::int4) && args.tokens >= expand_from_tokens;
  const std::int64_t weight_bytes = group_bytes(w.packing), x_bytes = activation_bytes(w.packing);
  for (std::int64_t group = 0; group < w.groups(); group += chunk_groups) {
    const std::int64_t groups = w.groups() - group < chunk_groups ? w.groups() - group : chunk_groups;
    for (std::int64_t panel = args.panel_begin; panel < args.panel_end; ++panel) {
      const std::byte* weights = w.data + panel * w.panel_bytes() + group * weight_bytes;
      float* out = args.out + (panel - args.panel_begin) * panel_rows;
      GemmChunk chunk{weights,          groups,      args.x + group * x_bytes,
                      args.x_row_bytes, args.tokens, out,
                      args.out_stride,  group > 0,   !expands && args.asks_ahead};
#if defined(HRMCORE_ISA_i8mm)
      if (is_quantised(w.packing) && args.tokens >= pairs_from_tokens) {
        multiply_pairs(w.packing, chunk, args.scratch);
        continue;
      }
#endif
      if (!expands) {
        multiply_chunk(w.packing, chunk);
        continue;
      }
      expand(w.packing, weights, groups, args.scratch);
      chunk.weights = args.scratch;
      if (w.packing == Packing::bf16) {
        multiply_cells<Cells::floats>(chunk);
      } else {
        multiply_cells<Cells::bytes_of_nibbles>(chunk);
      }
    }
  }
}

}  // namespace hrmcore::HRMCORE_ISA
