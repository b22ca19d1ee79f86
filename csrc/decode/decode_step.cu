#include "decode/decode_step.h"

#include "core/cuda.cuh"
#include "decode/phases.cuh"

namespace hrmcore::cuda {
namespace {

struct Call {
  Step step;
  Place first;
  int phases;  // 1, or all of them in a cooperative launch
  int ring_offset;
};

// The next product's first weights are on their way before the barrier that it waits for, and before that of
// the attention.
template <Packing packing, int stages>
__global__ void __launch_bounds__(step_threads, 1) run(Call call) {
  const Step& step = call.step;
  WeightStream<packing, stages> stream(call.ring_offset);
  WeightStream<head_packing(packing), stages> head(call.ring_offset);
  Place at = call.first;
  load_places(step);
  if (at.phase == Phase::head) {
    head.begin(step.head_matrix());
  } else if (at.phase != Phase::attention) {
    stream.begin(step.matrix(at));
  }
  for (int left = call.phases; at.phase != Phase::head;) {
    run_phase(step, stream, at);
    if (--left == 0) return;
    const bool product = at.phase != Phase::attention;
    at = step.after(at);
    if (at.phase == Phase::head) {
      head.begin(step.head_matrix());
    } else if (product) {
      stream.begin(step.matrix(at));
    }
    grid_barrier(step.barrier);
  }
  run_head(step, head);
}

// What the attention exchanges: of each group of lanes, d outputs, the highest score and the sum; the query.
int exchange_bytes(const Step& step) {
  const int groups = step_threads * 8 / step.head_dim;
  return (groups * (step.head_dim + 2) + step.head_dim) * static_cast<int>(sizeof(float));
}

int activation_bytes(const Step& step) {
  int most = exchange_bytes(step);
  for (const int depth : {step.width, step.attention_width(), step.ffn}) {
    const int items = (depth + step.item.columns - 1) / step.item.columns;
    most = max(most, items * step.item.columns * step.columns * static_cast<int>(sizeof(bf16)));
  }
  return (most + 127) / 128 * 128;
}

template <Packing packing, int stages>
const char* launch_step(const CudaStep& args, const Step& step, int blocks, void* stream) {
  const Place first{0, 0, 0, Phase::gqkv};
  Call call{step, first, 1, activations_offset + activation_bytes(step)};
  LaunchShape shape{dim3(static_cast<unsigned>(blocks)), step_threads};
  shape.shared_bytes = static_cast<std::size_t>(call.ring_offset + step_warps * stages * item_bytes<packing>);
  if (args.persistent) {
    call.phases = step.phases();
    shape.cooperative = true;
    return launch(run<packing, stages>, shape, call, stream);
  }
  for (int left = step.phases(); left > 0; --left) {
    const char* error = launch(run<packing, stages>, shape, call, stream);
    if (error != nullptr) return error;
    call.first = step.after(call.first);
  }
  return nullptr;
}

struct Limits {
  int multiprocessors = 1, shared_bytes = 99 << 10;
};

const char* read_limits(Limits& limits) {
#if defined(__CUDACC__)
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return cudaGetErrorString(status);
#else
  static_cast<void>(limits);
#endif
  return nullptr;
}

template <Packing packing>
const char* launch_packed(const CudaStep& args, const Step& step, void* stream) {
  Limits limits;
  if (const char* error = read_limits(limits)) return error;
  const int blocks = args.blocks > 0 ? static_cast<int>(args.blocks) : limits.multiprocessors;
  const int fixed = activations_offset + activation_bytes(step), stage = step_warps * item_bytes<packing>;
  // The rings as deep as they fit: what is on its way covers the memory's latency.
  if (fixed + 16 * stage <= limits.shared_bytes) return launch_step<packing, 16>(args, step, blocks, stream);
  if (fixed + 4 * stage <= limits.shared_bytes) return launch_step<packing, 4>(args, step, blocks, stream);
  return "the step's activations do not fit this device's shared memory: fewer "
         "requests at once would";
}

int size(const TensorView& tensor, int axis) { return static_cast<int>(tensor.shape[axis]); }

Step step_of(const CudaStep& args) {
  Step step{};
  step.columns = size(args.tokens, 0);
  step.width = size(args.z_init, 0);
  step.ffn = static_cast<int>(args.ffn);
  step.heads = size(args.kv, 3);
  step.head_dim = size(args.kv, 4);
  step.vocabulary = size(args.logits, 1);
  step.fast_layers = static_cast<int>(args.fast_layers);
  step.slow_layers = static_cast<int>(args.slow_layers > 0 ? args.slow_layers : args.fast_layers);
  step.h_cycles = static_cast<int>(args.h_cycles);
  step.l_cycles = static_cast<int>(args.l_cycles);
  step.window = static_cast<int>(args.window);
  step.table_length = size(args.tables, 1);
  step.cache_blocks = size(args.kv, 2) / cache_block;
  step.rotations = size(args.rope, 0);
  step.item = item(args.packing);
  step.head_item = item(head_packing(args.packing));
  step.eps = static_cast<float>(args.eps);
  step.embedding_scale = static_cast<float>(args.embedding_scale);
  step.tokens = args.tokens.as<std::int32_t>();
  step.positions = args.positions.as<std::int32_t>();
  step.tables = args.tables.as<std::int32_t>();
  step.embedding = args.embedding.data;
  step.z_init = args.z_init.as<float>();
  step.rope = args.rope.as<float>();
  step.rates = args.rates.given() ? args.rates.as<float>() : nullptr;
  step.kv = args.kv.data;
  step.logits = args.logits.as<float>();
  step.fast = args.weights.as<std::byte>();
  step.slow = args.slow_layers > 0 ? step.fast + args.fast_layers * step.layer_bytes() : step.fast;
  step.head = step.fast + (args.fast_layers + args.slow_layers) * step.layer_bytes();
  step.place_workspace(args.workspace.as<std::byte>());
  return step;
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(cuda_step, hrmcore::CudaStep) {
  using namespace hrmcore;
  const cuda::Step step = cuda::step_of(args);
  switch (args.packing) {
    case Packing::int8:
      return cuda::launch_packed<Packing::int8>(args, step, stream);
    case Packing::int4:
      return cuda::launch_packed<Packing::int4>(args, step, stream);
    default:
      return cuda::launch_packed<Packing::bf16>(args, step, stream);
  }
}
