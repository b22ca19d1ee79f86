// A model's shape, and its weights in one packed arena whose layout follows from shape and packing alone.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/memory.h"
#include "core/tensor.h"
#include "gemm/pack.h"
#include "gemm/weight_layout.h"

namespace hrmcore {

// The two stacks of blocks that the recurrence visits in turn.
enum class Stack : std::uint8_t { L, H };

struct ModelShape {
  std::int64_t vocabulary, width, ffn, l_layers, h_layers, heads, head_dim, h_cycles, l_cycles, positions;
  float eps, embedding_scale;

  std::int64_t attention_width() const { return heads * head_dim; }
  std::int64_t layers(Stack stack) const { return stack == Stack::H ? h_layers : l_layers; }
  std::int64_t slots() const { return h_cycles * (l_cycles * l_layers + h_layers); }
};

struct LayerWeights {
  PackedMatrix gqkv, o, gate_up, down;
};

// The order in memory: L's layers, H's layers, head, embedding, z_L_init; each from a multiple of 256 bytes
// on. The embedding is float32 beside float32 weights and bfloat16 otherwise; the head of int4 weights is
// int8.
class Weights {
 public:
  Weights(const ModelShape& shape, Packing packing);

  std::int64_t bytes() const { return bytes_; }
  Packing packing() const { return packing_; }

  // Memory of its own, to be filled by set() with every tensor; or the arena in a file.
  void allocate();
  // Throws FileError when it is missing, too short or not what `checksum` says.
  void map_file(const std::string& path, std::int64_t offset, std::uint64_t checksum);

  // `name` as in HRM.state_dict(). Throws std::invalid_argument on an unknown name, a wrong shape or
  // dtype, and a value that is not finite.
  void set(const std::string& name, const TensorView& tensor);
  // What set() kept of a tensor, as float32.
  void get(const std::string& name, const TensorView& out) const;
  // Throws std::runtime_error naming a tensor that is not there yet, FileError when the file has changed.
  void check_complete() const;
  void check_unchanged() const;

  const std::vector<LayerWeights>& layers(Stack stack) const {
    return stack == Stack::H ? h_layers_ : l_layers_;
  }
  const PackedMatrix& head() const { return head_; }
  void embed(std::int64_t id, float scale, float* row) const;  // row[D]
  const float* z_init() const;
  const std::byte* data() const { return memory_.data(); }
  std::uint64_t checksum() const;

 private:
  struct Place {
    std::int64_t rows, columns, offset;
    PackedMatrix* matrix;  // null for the embedding and z_L_init, which are plain
    RowOrder order;
    bool filled;
  };

  void place_matrix(const std::string& name, std::int64_t rows, std::int64_t columns, RowOrder order,
                    PackedMatrix* matrix, Packing packing);
  void place_plain(const std::string& name, std::int64_t rows, std::int64_t columns, std::int64_t element);
  const Place& find(const char* op, const std::string& name) const;
  void attach();

  ModelShape shape_;
  Packing packing_;
  std::int64_t bytes_ = 0;
  Memory memory_;
  std::string path_;
  std::vector<LayerWeights> l_layers_, h_layers_;
  PackedMatrix head_;
  std::map<std::string, Place> places_;
};

}  // namespace hrmcore
