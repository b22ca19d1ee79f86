#include "engine/row_ops.h"

#include "gemm/quantise.h"

namespace hrmcore::HRMCORE_ISA {

void normalise_rows(const NormaliseRows& args) noexcept {
  for (std::int64_t row = args.row_begin; row < args.row_end; ++row) {
    const auto [x, scale] = normalised_row(args, row);
    std::byte* y = args.y + row * args.y_row_bytes;
    for (std::int64_t group = 0; group < groups_of(args.width); ++group) {
      vfloat values[group_vectors];
      for (int v = 0; v < group_vectors; ++v) values[v] = load(x + group * group_columns + v * lanes) * scale;
      if (is_quantised(args.packing)) {
        quantise_group(values, reinterpret_cast<QuantGroup*>(y) + group);
      } else {
        for (int v = 0; v < group_vectors; ++v) {
          store(reinterpret_cast<float*>(y) + group * group_columns + v * lanes, values[v]);
        }
      }
    }
  }
}

void quantise_rows(const QuantiseRows& args) noexcept {
  for (std::int64_t row = args.row_begin; row < args.row_end; ++row) {
    auto* out = reinterpret_cast<QuantGroup*>(args.y) + row * args.groups;
    for (std::int64_t group = 0; group < args.groups; ++group) {
      const float* x = args.x + row * args.stride + group * group_columns;
      vfloat values[group_vectors];
      for (int v = 0; v < group_vectors; ++v) values[v] = load(x + v * lanes);
      quantise_group(values, out + group);
    }
  }
}

void add_rows(const AddRows& args) noexcept {
  for (std::int64_t row = 0; row < args.rows; ++row) {
    float* x = args.x + row * args.x_stride;
    for (std::int64_t c = 0; c < args.columns; c += lanes)
      store(x + c, load(x + c) + load(args.y + row * args.y_stride + c));
  }
}

void swiglu_rows(const SwigluRows& args) noexcept {
  constexpr std::int64_t half = panel_rows / 2;
  for (std::int64_t row = 0; row < args.rows; ++row) {
    for (std::int64_t panel = 0; panel < args.panels; ++panel) {
      const float* gate = args.gate_up + row * args.gate_up_stride + panel * panel_rows;
      float* out = args.out + row * args.out_stride + panel * half;
      for (std::int64_t c = 0; c < half; c += lanes) {
        const vfloat g = load(gate + c);
        store(out + c, g * sigmoid(g) * load(gate + half + c));
      }
    }
  }
}

}  // namespace hrmcore::HRMCORE_ISA
