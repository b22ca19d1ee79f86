#include "decode/decode_step.h"

#include "core/cuda.cuh"
#include "decode/phases.cuh"

namespace hrmcore::cuda {
namespace {

// The phases that one launch goes through.
struct Segment {
  DecodeParams params;
  SchedulePoint first;
  int phases;  // 1, or all of them in a cooperative launch
  int ring_offset;
};

// The next GEMM's first weights are on their way before the barrier that it waits for, and before that of
// the attention.
template <Packing packing, int stages>
__global__ void __launch_bounds__(decode_threads, 1) decode(Segment segment) {
  const DecodeParams& params = segment.params;
  WeightStream<packing, stages> stream(segment.ring_offset);
  WeightStream<head_packing(packing), stages> head(segment.ring_offset);
  SchedulePoint at = segment.first;
  load_positions(params);
  if (at.phase == Phase::head) {
    head.begin(params.head_matrix());
  } else if (at.phase != Phase::attention) {
    stream.begin(params.matrix(at));
  }
  for (int left = segment.phases; at.phase != Phase::head;) {
    run_phase(params, stream, at);
    if (--left == 0) return;
    const bool multiplies = at.phase != Phase::attention;
    at = params.schedule.after(at);
    if (at.phase == Phase::head) {
      head.begin(params.head_matrix());
    } else if (multiplies) {
      stream.begin(params.matrix(at));
    }
    grid_barrier(params.barrier);
  }
  run_head(params, head);
}

// What the attention exchanges: of each group of lanes, d outputs, the highest score and the sum; the query.
int exchange_bytes(const DecodeParams& params) {
  const int groups = decode_threads * 8 / params.head_dim;
  return (groups * (params.head_dim + 2) + params.head_dim) * static_cast<int>(sizeof(float));
}

int activation_bytes(const DecodeParams& params) {
  int most = exchange_bytes(params);
  for (const int depth : {params.width, params.attention_width(), params.ffn}) {
    const int items = (depth + params.item.columns - 1) / params.item.columns;
    most = max(most, items * params.item.columns * params.batch * static_cast<int>(sizeof(bf16)));
  }
  return (most + 127) / 128 * 128;
}

template <Packing packing, int stages>
const char* launch_decode(const DecodeStep& args, const DecodeParams& params, int blocks, void* stream) {
  const SchedulePoint first{0, 0, 0, Phase::gqkv};
  Segment segment{params, first, 1, activations_offset + activation_bytes(params)};
  LaunchShape shape{dim3(static_cast<unsigned>(blocks)), decode_threads};
  shape.shared_bytes =
      static_cast<std::size_t>(segment.ring_offset + decode_warps * stages * item_bytes<packing>);
  if (args.persistent) {
    segment.phases = params.schedule.phases();
    shape.cooperative = true;
    return launch(decode<packing, stages>, shape, segment, stream);
  }
  for (int left = params.schedule.phases(); left > 0; --left) {
    const char* error = launch(decode<packing, stages>, shape, segment, stream);
    if (error != nullptr) return error;
    segment.first = params.schedule.after(segment.first);
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
const char* launch_packed(const DecodeStep& args, const DecodeParams& params, void* stream) {
  Limits limits;
  if (const char* error = read_limits(limits)) return error;
  const int blocks = args.blocks > 0 ? static_cast<int>(args.blocks) : limits.multiprocessors;
  const int fixed = activations_offset + activation_bytes(params), stage = decode_warps * item_bytes<packing>;
  // The rings as deep as they fit: what is on its way covers the memory's latency.
  if (fixed + 16 * stage <= limits.shared_bytes)
    return launch_decode<packing, 16>(args, params, blocks, stream);
  if (fixed + 4 * stage <= limits.shared_bytes)
    return launch_decode<packing, 4>(args, params, blocks, stream);
  return "the step's activations do not fit this device's shared memory: fewer requests at once would";
}

int size(const TensorView& tensor, int axis) { return static_cast<int>(tensor.shape[axis]); }

DecodeParams params_of(const DecodeStep& args) {
  DecodeParams params{};
  params.batch = size(args.tokens, 0);
  params.width = size(args.z_init, 0);
  params.ffn = static_cast<int>(args.ffn);
  params.heads = size(args.kv, 3);
  params.head_dim = size(args.kv, 4);
  params.vocabulary = size(args.logits, 1);
  params.schedule.l_layers = static_cast<int>(args.l_layers);
  params.schedule.h_layers = static_cast<int>(args.h_layers > 0 ? args.h_layers : args.l_layers);
  params.schedule.h_cycles = static_cast<int>(args.h_cycles);
  params.schedule.l_cycles = static_cast<int>(args.l_cycles);
  params.window = static_cast<int>(args.window);
  params.table_length = size(args.tables, 1);
  params.cache_pages = size(args.kv, 2) / page_tokens;
  params.rotations = size(args.rope, 0);
  params.item = item(args.packing);
  params.head_item = item(head_packing(args.packing));
  params.eps = static_cast<float>(args.eps);
  params.embedding_scale = static_cast<float>(args.embedding_scale);
  params.tokens = args.tokens.as<std::int32_t>();
  params.positions = args.positions.as<std::int32_t>();
  params.tables = args.tables.as<std::int32_t>();
  params.embedding = args.embedding.data;
  params.z_init = args.z_init.as<float>();
  params.rope = args.rope.as<float>();
  params.log_decay = args.log_decay.given() ? args.log_decay.as<float>() : nullptr;
  params.kv = args.kv.data;
  params.logits = args.logits.as<float>();
  params.l_weights = args.weights.as<std::byte>();
  params.h_weights =
      args.h_layers > 0 ? params.l_weights + args.l_layers * params.layer_bytes() : params.l_weights;
  params.head_weights = params.l_weights + (args.l_layers + args.h_layers) * params.layer_bytes();
  params.place_workspace(args.workspace.as<std::byte>());
  return params;
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(cuda_step, hrmcore::DecodeStep) {
  using namespace hrmcore;
  const cuda::DecodeParams params = cuda::params_of(args);
  switch (args.packing) {
    case Packing::int8:
      return cuda::launch_packed<Packing::int8>(args, params, stream);
    case Packing::int4:
      return cuda::launch_packed<Packing::int4>(args, params, stream);
    default:
      return cuda::launch_packed<Packing::bf16>(args, params, stream);
  }
}
