// libFuzzer on what the C++ core makes of bytes: `make fuzz-native`.
//
// An input is a model's shape, a file of packed weights, and what callers ask: open, step, close, sample. Whatever it
// says, the core answers or throws what its headers name; the sanitizers see everything else. A file whose checksum
// fits is mapped and computed with, however meaningless its numbers are.
#include <fuzzer/FuzzedDataProvider.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "engine/engine.h"
#include "engine/sampler.h"

namespace {

using hrmcore::Engine;
using hrmcore::TensorView;

constexpr std::int64_t most_weights = 1 << 20;  // bytes: a run takes milliseconds

std::string temporary_file() {
  static const std::string path = "/tmp/hrmcore-fuzz-" + std::to_string(getpid());
  static const bool registered = std::atexit([] { unlink(temporary_file().c_str()); }) == 0;
  (void)registered;
  return path;
}

TensorView view(float* data, std::initializer_list<std::int64_t> shape) {
  TensorView v;
  v.data = data;
  v.dtype = hrmcore::DType::f32;
  v.device = hrmcore::Device::cpu;
  v.rank = 0;
  for (const std::int64_t extent : shape) v.shape[v.rank++] = extent;
  std::int64_t stride = 1;
  for (int axis = v.rank - 1; axis >= 0; --axis) {
    v.strides[axis] = stride;
    stride *= v.shape[axis];
  }
  return v;
}

// Mostly small, so that there is a model to compute with; now and then anything.
std::int64_t extent(FuzzedDataProvider& bytes, std::int64_t most) {
  if (bytes.ConsumeIntegralInRange<int>(0, 40) == 40) return bytes.ConsumeIntegral<std::int64_t>();
  return bytes.ConsumeIntegralInRange<std::int64_t>(1, most);
}

hrmcore::ModelShape shape_of(FuzzedDataProvider& bytes) {
  hrmcore::ModelShape shape{};
  shape.vocabulary = extent(bytes, 70);
  shape.width = extent(bytes, 70);
  shape.ffn = extent(bytes, 70);
  shape.l_layers = extent(bytes, 2);
  shape.h_layers = extent(bytes, 2);
  shape.heads = extent(bytes, 3);
  shape.head_dim = extent(bytes, 20);
  shape.h_cycles = extent(bytes, 2);
  shape.l_cycles = extent(bytes, 2);
  shape.positions = bytes.ConsumeIntegralInRange<std::int64_t>(1, 200);
  shape.eps = bytes.ConsumeFloatingPoint<float>();
  shape.embedding_scale = bytes.ConsumeFloatingPoint<float>();
  return shape;
}

std::unique_ptr<Engine> engine_of(FuzzedDataProvider& bytes) {
  using hrmcore::Packing;
  const auto shape = shape_of(bytes);
  const Packing packings[] = {Packing::f32, Packing::bf16, Packing::int8, Packing::int4};
  const Packing weights = bytes.PickValueInArray(packings), cache = bytes.PickValueInArray(packings);
  const bool sane = shape.head_dim > 0 && shape.head_dim <= 256;
  std::vector<float> rope(static_cast<std::size_t>(sane ? shape.positions * shape.head_dim : 1));
  const float angles[] = {0, 1, -1, bytes.ConsumeFloatingPoint<float>(), bytes.ConsumeFloatingPoint<float>()};
  for (std::size_t i = 0; i < rope.size(); ++i) rope[i] = angles[i * 7 % 5];
  std::vector<float> decay(static_cast<std::size_t>(sane ? shape.head_dim / 2 : 1));
  for (float& rate : decay) rate = -0.1f * bytes.ConsumeProbability<float>();
  const bool xpos = sane && shape.head_dim > 1 && bytes.ConsumeBool();
  return std::make_unique<Engine>(
      shape, weights, cache, bytes.ConsumeIntegralInRange<int>(0, 3), extent(bytes, 1000),
      view(rope.data(), {sane ? shape.positions : 1, sane ? shape.head_dim : 1}),
      xpos ? view(decay.data(), {shape.head_dim / 2}) : TensorView{},
      bytes.ConsumeBool() ? 64 : bytes.ConsumeIntegralInRange<std::int64_t>(-1, 2) * 64);
}

// Weights from a file of whatever bytes there are, repeated; damaged, or with the checksum that belongs to them.
void map_weights(Engine& engine, FuzzedDataProvider& bytes) {
  const std::int64_t size = engine.weights().bytes();
  const bool damaged = bytes.ConsumeIntegralInRange<int>(0, 20) == 0;
  const std::int64_t offset =
      bytes.ConsumeBool() ? 4096 : bytes.ConsumeIntegralInRange<std::int64_t>(-1, 5000);
  std::string pattern = bytes.ConsumeRandomLengthString(300);
  if (pattern.empty()) pattern.push_back('\0');
  std::string content;
  while (static_cast<std::int64_t>(content.size()) < size) content += pattern;
  content.resize(static_cast<std::size_t>(size));
  const std::int64_t cut = damaged ? bytes.ConsumeIntegralInRange<std::int64_t>(0, size) : 0;
  {
    std::ofstream file(temporary_file(), std::ios::binary | std::ios::trunc);
    file << std::string(4096, 'x') << content.substr(0, static_cast<std::size_t>(size - cut));
  }
  try {
    engine.weights().map_file(temporary_file(), offset, 0);
  } catch (const hrmcore::FileError&) {  // almost certainly: the checksum is not 0
    if (damaged || offset != 4096) throw;
    engine.weights().map_file(temporary_file(), offset, engine.weights().checksum());
  }
}

void sample(FuzzedDataProvider& bytes, std::vector<float>& logits) {
  for (float& logit : logits) {
    if (bytes.ConsumeIntegralInRange<int>(0, 9) == 0) logit = bytes.ConsumeFloatingPoint<float>();
    if (bytes.ConsumeIntegralInRange<int>(0, 30) == 0) logit = std::numeric_limits<float>::infinity();
  }
  const hrmcore::SamplingOptions options{bytes.ConsumeFloatingPointInRange<double>(0, 4),
                                         bytes.ConsumeIntegralInRange<std::int64_t>(0, 80),
                                         bytes.ConsumeProbability<double>(),
                                         bytes.ConsumeProbability<double>(),
                                         bytes.ConsumeFloatingPointInRange<double>(0.1, 4),
                                         bytes.ConsumeIntegral<std::uint64_t>()};
  const auto vocabulary = static_cast<std::int64_t>(logits.size());
  std::vector<std::int64_t> prompt;
  while (bytes.ConsumeBool()) prompt.push_back(bytes.ConsumeIntegralInRange<std::int64_t>(0, vocabulary - 1));
  hrmcore::Sampler sampler(options, prompt);
  hrmcore::SamplingRoom room(vocabulary);
  const std::int64_t token = sampler.pick(logits.data(), vocabulary, room);
  if (token >= vocabulary) std::abort();
  if (token >= 0) sampler.accept(token);
}

void step(Engine& engine, FuzzedDataProvider& bytes, const std::vector<std::int64_t>& open) {
  std::vector<std::int64_t> requests;
  std::vector<std::vector<std::int64_t>> ids;
  const bool every_row = bytes.ConsumeBool();
  std::int64_t rows = 0;
  do {
    requests.push_back(open.empty() || bytes.ConsumeIntegralInRange<int>(0, 20) == 0
                           ? bytes.ConsumeIntegral<std::int64_t>()
                           : open[bytes.ConsumeIntegralInRange<std::size_t>(0, open.size() - 1)]);
    ids.emplace_back();
    const auto count = bytes.ConsumeIntegralInRange<int>(0, 70);
    for (int i = 0; i < count; ++i) {
      ids.back().push_back(bytes.ConsumeIntegralInRange<std::int64_t>(-1, engine.shape().vocabulary));
    }
    rows += every_row ? count : 1;
  } while (bytes.ConsumeBool() && requests.size() < 5);
  if (rows == 0 || rows * engine.shape().vocabulary > most_weights) return;
  std::vector<float> logits(static_cast<std::size_t>(rows * engine.shape().vocabulary));
  const Engine::Turn turn(engine, {});
  engine.begin(requests, ids, every_row, view(logits.data(), {rows, engine.shape().vocabulary}));
  if (!engine.run()) std::abort();  // nobody wanted it to stop
  engine.commit();
  logits.resize(static_cast<std::size_t>(engine.shape().vocabulary));
  sample(bytes, logits);
}

void use(FuzzedDataProvider& bytes) {
  const auto engine = engine_of(bytes);
  if (engine->weights().bytes() > most_weights) return;
  map_weights(*engine, bytes);
  std::vector<std::int64_t> open;
  for (int turn = 0; turn < 12 && bytes.remaining_bytes() > 0; ++turn) {
    try {
      switch (bytes.ConsumeIntegralInRange<int>(0, 3)) {
        case 0:
          open.push_back(engine->open(bytes.ConsumeIntegralInRange<std::int64_t>(-1, 80)));
          break;
        case 1:
          engine->close(open.empty() ? bytes.ConsumeIntegral<std::int64_t>() : open.back());
          open.pop_back();
          break;
        default:
          step(*engine, bytes, open);
      }
    } catch (const std::invalid_argument&) {
    } catch (const hrmcore::OutOfMemory&) {
    }
  }
  for (const std::int64_t request : open) engine->close(request);
  if (engine->cache_pages_used() != 0) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider bytes(data, size);
  try {
    use(bytes);
  } catch (const std::invalid_argument&) {
  } catch (const hrmcore::FileError&) {
  } catch (const std::bad_alloc&) {
  }
  return 0;
}
