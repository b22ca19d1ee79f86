#include "engine/weights.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "engine/checksum.h"

namespace hrmcore {
namespace {

constexpr std::int64_t alignment = 256;

float from_bf16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// From a tensor's lowest byte to its highest; its last axis has no gaps.
MappedRange range_of(const TensorView& tensor) {
  const std::int64_t size = tensor.dtype == DType::bf16 ? 2 : 4;
  const std::int64_t last_row = tensor.rank == 1 ? 0 : (tensor.shape[0] - 1) * tensor.strides[0];
  const std::int64_t first = last_row < 0 ? last_row : 0, last = last_row < 0 ? 0 : last_row;
  return {tensor.as<std::byte>() + first * size, (last - first + tensor.shape[tensor.rank - 1]) * size};
}

float element(const TensorView& tensor, std::int64_t row, std::int64_t column) {
  const std::int64_t index = tensor.rank == 1 ? column * tensor.strides[0] : row * tensor.strides[0] + column;
  return tensor.dtype == DType::bf16 ? from_bf16(tensor.as<std::uint16_t>()[index])
                                     : tensor.as<float>()[index];
}

// Whether no exponent has all bits set.
template <class Bits>
bool are_finite(const Bits* bits, std::int64_t count, Bits exponent) {
  Bits top = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Bits own = bits[i] & exponent;
    top = own > top ? own : top;
  }
  return top != exponent;
}

bool row_is_finite(const TensorView& tensor, std::int64_t row) {
  const std::int64_t at = row * tensor.strides[0], count = tensor.shape[1];
  return tensor.dtype == DType::bf16
             ? are_finite<std::uint16_t>(tensor.as<std::uint16_t>() + at, count, 0x7f80)
             : are_finite<std::uint32_t>(tensor.as<std::uint32_t>() + at, count, 0x7f800000);
}

}  // namespace

Weights::Weights(const ModelShape& shape, Packing packing) : shape_(shape), packing_(packing) {
  const std::int64_t width = shape.width, attention = shape.attention_width();
  for (Stack stack : {Stack::L, Stack::H}) {
    std::vector<LayerWeights>& layers = stack == Stack::H ? h_layers_ : l_layers_;
    layers.resize(static_cast<std::size_t>(shape.layers(stack)));
    for (std::size_t index = 0; index < layers.size(); ++index) {
      LayerWeights& layer = layers[index];
      const std::string prefix =
          (stack == Stack::H ? "H_module.layers." : "L_module.layers.") + std::to_string(index) + ".";
      place_matrix(prefix + "gqkv_proj.weight", 4 * attention, width, RowOrder::plain, &layer.gqkv, packing);
      place_matrix(prefix + "o_proj.weight", width, attention, RowOrder::plain, &layer.o, packing);
      place_matrix(prefix + "gate_up_proj.weight", 2 * shape.ffn, width, RowOrder::paired, &layer.gate_up,
                   packing);
      place_matrix(prefix + "down_proj.weight", width, shape.ffn, RowOrder::plain, &layer.down, packing);
    }
  }
  const Packing head_packing = packing == Packing::int4 ? Packing::int8 : packing;
  place_matrix("lm_head.weight", shape.vocabulary, width, RowOrder::plain, &head_, head_packing);
  place_plain("embed_tokens.weight", shape.vocabulary, width, packing == Packing::f32 ? 4 : 2);
  place_plain("z_L_init", 1, width, 4);
}

void Weights::place_matrix(const std::string& name, std::int64_t rows, std::int64_t columns, RowOrder order,
                           PackedMatrix* matrix, Packing packing) {
  *matrix = PackedMatrix{packing, packed_rows(rows, order), columns, nullptr};
  places_[name] = Place{rows, columns, bytes_, matrix, order, false};
  bytes_ += (matrix->bytes() + alignment - 1) / alignment * alignment;
}

void Weights::place_plain(const std::string& name, std::int64_t rows, std::int64_t columns,
                          std::int64_t size) {
  places_[name] = Place{rows, columns, bytes_, nullptr, RowOrder::plain, false};
  bytes_ += (rows * columns * size + alignment - 1) / alignment * alignment;
}

void Weights::allocate() {
  memory_ = Memory(bytes_);
  path_.clear();
  attach();
  for (auto& [name, place] : places_) place.filled = false;
}

void Weights::map_file(const std::string& path, std::int64_t offset, std::uint64_t expected) {
  memory_ = Memory::map_file(path, offset, bytes_);
  path_ = path;
  attach();
  const std::uint64_t found = checksum();
  check_unchanged();
  if (found != expected) {
    throw FileError(path +
                    ": damaged, the weights do not match their checksum; convert the checkpoint again");
  }
  for (auto& [name, place] : places_) place.filled = true;
}

void Weights::attach() {
  for (auto& [name, place] : places_) {
    if (place.matrix != nullptr) place.matrix->data = memory_.data() + place.offset;
  }
}

const Weights::Place& Weights::find(const char* op, const std::string& name) const {
  const auto found = places_.find(name);
  if (found == places_.end()) reject(op, "name", "a tensor of the model", "'" + name + "'");
  return found->second;
}

void Weights::set(const std::string& name, const TensorView& tensor) {
  const Place& place = find("set", name);
  const bool vector = name == "z_L_init";
  const Check check("set", name.c_str(), tensor);
  check.cpu().dtype({DType::f32, DType::bf16}).rank(vector ? 1 : 2).last_contiguous();
  if (!vector) check.size(0, place.rows, "rows");
  check.size(vector ? 0 : 1, place.columns, "columns");
  if (memory_.mapped() || memory_.data() == nullptr)
    throw std::runtime_error("set: the weights have no memory of their own");
  places_[name].filled = false;
  std::byte* to = memory_.data() + place.offset;
  const MappedRange source = range_of(tensor);
  const MappedReading reading;
  std::atomic<bool> finite{true};
  if (place.matrix != nullptr) {
    pack_rows(PackRows{tensor, place.order, *place.matrix, to, finite});
  } else {
    const bool wide = vector || packing_ == Packing::f32;
    const bool same = tensor.dtype == (wide ? DType::f32 : DType::bf16) && !vector;
    for (std::int64_t row = 0; row < place.rows; ++row) {
      if (same) {
        if (!row_is_finite(tensor, row)) finite = false;
        const std::int64_t size = wide ? 4 : 2;
        std::memcpy(to + row * place.columns * size, tensor.as<std::byte>() + row * tensor.strides[0] * size,
                    static_cast<std::size_t>(place.columns * size));
        continue;
      }
      for (std::int64_t column = 0; column < place.columns; ++column) {
        const float value = element(tensor, row, column);
        if (!std::isfinite(value)) finite = false;
        const std::int64_t index = row * place.columns + column;
        if (wide) {
          reinterpret_cast<float*>(to)[index] = value;
        } else {
          reinterpret_cast<std::uint16_t*>(to)[index] = to_bf16(value);
        }
      }
    }
  }
  if (source.lost()) throw FileError(name + ": its file was cut short while it was read");
  if (!finite) throw std::invalid_argument("'" + name + "' has a value that is NaN or infinite");
  places_[name].filled = true;
}

void Weights::get(const std::string& name, const TensorView& out) const {
  const Place& place = find("get", name);
  Check("get", "out", out)
      .cpu()
      .dtype({DType::f32})
      .rank(2)
      .size(0, place.rows, "rows")
      .size(1, place.columns, "columns")
      .contiguous();
  const MappedReading reading;
  if (place.matrix != nullptr) {
    unpack_rows(UnpackRows{*place.matrix, place.order, out});
    return;
  }
  const std::byte* from = memory_.data() + place.offset;
  const bool wide = name == "z_L_init" || packing_ == Packing::f32;
  for (std::int64_t index = 0; index < place.rows * place.columns; ++index) {
    out.as<float>()[index] = wide ? reinterpret_cast<const float*>(from)[index]
                                  : from_bf16(reinterpret_cast<const std::uint16_t*>(from)[index]);
  }
}

void Weights::check_complete() const {
  for (const auto& [name, place] : places_) {
    if (!place.filled) throw std::runtime_error("the engine has no weights for " + name);
  }
}

void Weights::check_unchanged() const {
  if (!memory_.unchanged()) {
    throw FileError(path_ + ": the file changed while it was in use; load the model again");
  }
}

void Weights::embed(std::int64_t id, float scale, float* row) const {
  const Place& place = places_.at("embed_tokens.weight");
  const std::byte* from = memory_.data() + place.offset;
  for (std::int64_t column = 0; column < shape_.width; ++column) {
    const std::int64_t index = id * shape_.width + column;
    row[column] =
        scale * (packing_ == Packing::f32 ? reinterpret_cast<const float*>(from)[index]
                                          : from_bf16(reinterpret_cast<const std::uint16_t*>(from)[index]));
  }
}

std::uint64_t Weights::checksum() const {
  std::vector<std::uint64_t> blocks(static_cast<std::size_t>((bytes_ + checksum_block - 1) / checksum_block));
  const MappedReading reading;
  checksum_blocks(Checksum{memory_.data(), bytes_, blocks.data()});
  std::uint64_t folded = 0;
  for (std::uint64_t block : blocks) folded = (folded ^ block) * 0x9e3779b97f4a7c15ull;
  return folded;
}

const float* Weights::z_init() const {
  return reinterpret_cast<const float*>(memory_.data() + places_.at("z_L_init").offset);
}

}  // namespace hrmcore
