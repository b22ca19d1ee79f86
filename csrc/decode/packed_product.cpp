#include "decode/packed_product.h"

#include <string>

#include "decode/schedule.h"

namespace hrmcore {
namespace {

constexpr const char* op = "cuda_packed_product";

void check_pieces(const PackedProduct& args, std::int64_t rows) {
  if (args.gated && args.pieces != 1) reject(op, "pieces", "1 of gated rows", std::to_string(args.pieces));
  if (args.pieces < 0 || (args.pieces > 0 && rows % (args.pieces * cuda::tile_rows) != 0)) {
    reject(op, "pieces", "0, or pieces of a multiple of 16 of the " + std::to_string(rows) + " rows",
           std::to_string(args.pieces));
  }
}

}  // namespace

void check(const PackedProduct& args) {
  constexpr std::int64_t most = 1 << 24;
  Check(op, "x", args.x).cpu_or_cuda().dtype({DType::bf16}).rank(2).contiguous();
  const std::int64_t tokens = args.x.shape[0], columns = args.x.shape[1];
  if (columns < 16 || columns > most || columns % 16 != 0)
    reject(op, "x", "of a positive multiple of 16 columns", std::to_string(columns));
  if (tokens > most) reject(op, "x", "of at most 2^24 rows", std::to_string(tokens));
  if (reinterpret_cast<std::uintptr_t>(args.x.data) % 16 != 0)
    reject(op, "x", "aligned to 16 bytes", "a misaligned view");
  Check(op, "out", args.out)
      .cpu_or_cuda()
      .dtype({DType::bf16, DType::f32})
      .rank(2)
      .size(0, tokens, "T")
      .contiguous();
  const std::int64_t rows = args.out.shape[1] * (args.gated ? 2 : 1);
  if (args.out.dtype == DType::bf16 && args.out.shape[1] % 2 != 0)
    reject(op, "out", "of an even number of columns in bfloat16", std::to_string(args.out.shape[1]));
  if (args.out.dtype == DType::f32 && args.gated)
    reject(op, "out", "bfloat16 where rows are gated", "float32");
  if (rows < 1 || rows > most) reject(op, "out", "of 1 to 2^24 columns", std::to_string(args.out.shape[1]));
  check_pieces(args, rows);
  if (args.packing != Packing::int8 && args.packing != Packing::int4)
    reject(op, "dtype", "int8 or int4", "another");
  if (args.processors < 0 || args.processors > 1 << 16)
    reject(op, "processors", "from 0 to 65536", std::to_string(args.processors));
  Check(op, "weights", args.weights).cpu_or_cuda().dtype({DType::u8}).rank(1).contiguous();
  const cuda::MatrixShape shape = cuda::matrix_shape(rows, columns, cuda::item(args.packing), 0);
  const std::int64_t bytes = shape.tiles * shape.tile_bytes;
  if (args.weights.shape[0] != bytes)
    reject(op, "weights", std::to_string(bytes) + " bytes", std::to_string(args.weights.shape[0]));
  if (reinterpret_cast<std::uintptr_t>(args.weights.data) % 16 != 0)
    reject(op, "weights", "aligned to 16 bytes", "a misaligned view");
}

}  // namespace hrmcore
