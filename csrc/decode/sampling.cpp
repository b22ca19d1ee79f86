#include "decode/sampling.h"

#include <string>

namespace hrmcore {

void check(const TokenDraw& args) {
  constexpr const char* op = "cuda_draw";
  Check(op, "logits", args.logits).cpu_or_cuda().dtype({DType::f32}).rank(2).contiguous();
  const std::int64_t requests = args.logits.shape[0], vocabulary = args.logits.shape[1];
  if (vocabulary < 1 || vocabulary > most_sampled_vocabulary) {
    reject(op, "the vocabulary", "from 1 to " + std::to_string(most_sampled_vocabulary),
           std::to_string(vocabulary));
  }
  const auto check_row = [&](const char* argument, const TensorView& row) {
    Check(op, argument, row).dtype({DType::i32}).rank(1).size(0, requests, "B").contiguous();
  };
  check_row("fed", args.fed);
  check_row("slots", args.slots);
  check_row("drawn", args.drawn);
  check_row("positions", args.positions);
  Check(op, "options", args.options).dtype({DType::f64}).rank(2).size(1, sampling_options, "4").contiguous();
  const std::int64_t slots = args.options.shape[0];
  if (slots < 1) reject(op, "options", "of at least one slot", "none");
  Check(op, "counts", args.counts)
      .dtype({DType::i64})
      .rank(2)
      .size(0, slots, "S")
      .size(1, sampling_counts, "3")
      .contiguous();
  Check(op, "seen", args.seen)
      .dtype({DType::i32})
      .rank(2)
      .size(0, slots, "S")
      .size(1, (vocabulary + 31) / 32, "ceil(V / 32)")
      .contiguous();
}

}  // namespace hrmcore
