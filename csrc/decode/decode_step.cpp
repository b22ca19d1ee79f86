#include "decode/decode_step.h"

#include <string>

#include "decode/int8_page.h"
#include "decode/schedule.h"

namespace hrmcore {
namespace {

constexpr const char* op = "cuda_step";

void check_range(const char* argument, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value >= least && value <= most) return;
  reject(op, argument, "from " + std::to_string(least) + " to " + std::to_string(most),
         std::to_string(value));
}

void check_multiple(const char* argument, std::int64_t value, std::int64_t of) {
  if (value > 0 && value % of == 0) return;
  reject(op, argument, "a positive multiple of " + std::to_string(of), std::to_string(value));
}

cuda::DecodeParams shape_of(std::int64_t width, std::int64_t ffn, std::int64_t heads, std::int64_t head_dim) {
  cuda::DecodeParams params{};
  params.width = static_cast<int>(width);
  params.ffn = static_cast<int>(ffn);
  params.heads = static_cast<int>(heads);
  params.head_dim = static_cast<int>(head_dim);
  return params;
}

std::int64_t weight_bytes(const DecodeStep& args, std::int64_t vocabulary) {
  cuda::DecodeParams params = shape_of(args.z_init.shape[0], args.ffn, args.heads(), args.rope.shape[1]);
  params.item = cuda::item(args.packing);
  params.head_item = cuda::item(cuda::head_packing(args.packing));
  params.vocabulary = static_cast<int>(vocabulary);
  params.schedule.l_layers = static_cast<int>(args.l_layers);
  return params.place_weights(nullptr, args.h_layers);
}

void check_shape(std::int64_t width, std::int64_t ffn, std::int64_t heads, std::int64_t head_dim) {
  if (head_dim != 16 && head_dim != 32 && head_dim != 64 && head_dim != 128) {
    reject(op, "head_dim", "16, 32, 64 or 128", std::to_string(head_dim));
  }
  check_multiple("the width", width, 16);
  check_multiple("ffn", ffn, 16);
  check_range("the width", width, 16, 1 << 20);
  check_range("ffn", ffn, 16, 1 << 20);
  check_range("heads", heads, 1, 1 << 10);
}

void check_bytes(const char* argument, const TensorView& bytes, std::int64_t least) {
  Check(op, argument, bytes).cpu_or_cuda().dtype({DType::u8}).rank(1).contiguous();
  if (bytes.shape[0] < least) {
    reject(op, argument, "at least " + std::to_string(least) + " bytes", std::to_string(bytes.shape[0]));
  }
  if (reinterpret_cast<std::uintptr_t>(bytes.data) % 16 != 0) {
    reject(op, argument, "aligned to 16 bytes", "a misaligned view");
  }
}

// Of either kind; the head_dim is that of the angles.
void check_cache(const TensorView& kv, std::int64_t head_dim) {
  if (kv.dtype == DType::u8) {
    const std::int64_t bytes = Int8Page{static_cast<int>(head_dim)}.bytes();
    Check(op, "kv", kv).rank(4).size(3, bytes, "bytes of a page in int8").contiguous();
    if (kv.shape[1] < 1) reject(op, "kv", "of at least one page", "none");
    check_range("the cache's pages of all slots and heads", kv.shape[0] * kv.shape[1] * kv.shape[2], 1,
                INT32_MAX);
    if (reinterpret_cast<std::uintptr_t>(kv.data) % 16 != 0)
      reject(op, "kv", "aligned to 16 bytes", "a misaligned view");
  } else {
    Check(op, "kv", kv).dtype({DType::bf16, DType::u8}).rank(5).size(1, 2, "keys and values").contiguous();
    Check(op, "kv", kv).size(4, head_dim, "d");
    check_multiple("the cache's tokens", kv.shape[2], cuda::page_tokens);
  }
}

}  // namespace

std::int64_t decode_workspace_bytes(std::int64_t width, std::int64_t ffn, std::int64_t heads,
                                    std::int64_t head_dim) {
  return shape_of(width, ffn, heads, head_dim).place_workspace(nullptr);
}

void check(const DecodeRoom& args) {
  check_shape(args.width, args.ffn, args.heads, args.head_dim);
  check_range("the table's length", args.table_length, 1, 1 << 20);
  if (args.window != 0) check_multiple("window", args.window, cuda::page_tokens);
  check_range("blocks", args.blocks, 0, 1 << 16);
  if (args.packing == Packing::f32) reject(op, "dtype", "bfloat16, int8 or int4", "float32");
}

void check(const DecodeStep& args) {
  Check(op, "tokens", args.tokens).cpu_or_cuda().dtype({DType::i32}).rank(1).contiguous();
  const std::int64_t requests = args.tokens.shape[0];
  check_range("the number of tokens", requests, 1, max_batch);
  Check(op, "positions", args.positions).dtype({DType::i32}).rank(1).size(0, requests, "B").contiguous();
  Check(op, "tables", args.tables).dtype({DType::i32}).rank(2).size(0, requests, "B").contiguous();
  Check(op, "z_init", args.z_init).dtype({DType::f32}).rank(1).contiguous();
  Check(op, "embedding", args.embedding)
      .dtype({DType::bf16})
      .rank(2)
      .size(1, args.z_init.shape[0], "D")
      .contiguous();
  Check(op, "rope", args.rope).dtype({DType::f32}).rank(2).contiguous();
  const std::int64_t vocabulary = args.embedding.shape[0], head_dim = args.rope.shape[1];
  check_cache(args.kv, head_dim);
  if (args.log_decay.given()) {
    Check(op, "log_decay", args.log_decay)
        .dtype({DType::f32})
        .rank(1)
        .size(0, head_dim / 2, "d / 2")
        .contiguous();
  }
  Check(op, "logits", args.logits)
      .dtype({DType::f32})
      .rank(2)
      .size(0, requests, "B")
      .size(1, vocabulary, "V")
      .contiguous();
  check_shape(args.z_init.shape[0], args.ffn, args.heads(), head_dim);
  check_range("the vocabulary", vocabulary, 1, 1 << 24);
  check_range("L_layers", args.l_layers, 1, 1 << 10);
  check_range("H_layers", args.h_layers, 0, 1 << 10);
  check_range("h_cycles", args.h_cycles, 1, 1 << 10);
  check_range("l_cycles", args.l_cycles, 1, 1 << 10);
  check_range("blocks", args.blocks, 0, 1 << 16);
  check_range("the table's length", args.tables.shape[1], 1, 1 << 20);
  check_range("the table of rotations", args.rope.shape[0], 1, 1 << 26);
  if (args.window != 0) check_multiple("window", args.window, cuda::page_tokens);
  const std::int64_t h_layers = args.h_layers > 0 ? args.h_layers : args.l_layers;
  Check(op, "kv", args.kv).size(0, args.h_cycles * (args.l_cycles * args.l_layers + h_layers), "slots");
  if (args.packing == Packing::f32) reject(op, "dtype", "bfloat16, int8 or int4", "float32");
  check_bytes("weights", args.weights, weight_bytes(args, vocabulary));
  check_bytes("workspace", args.workspace,
              decode_workspace_bytes(args.z_init.shape[0], args.ffn, args.heads(), head_dim));
}

}  // namespace hrmcore
