#include "decode/decode_step.h"

#include "core/cuda.cuh"
#include "decode/phases.cuh"

namespace hrmcore::cuda {
namespace {

// The phases that one launch goes through, and how many tiles the blocks have been dealt before.
template <class P>
struct Segment {
  P params;
  SharedLayout layout;
  SchedulePoint first;
  int phases;  // 1, or all of them in a cooperative launch
  int dealt;   // modulo the grid
};

// What a phase reads from memory is on its way before the barrier that it waits for, and before those ahead of
// it as far as the rings reach. The head has rings of its own packing, begun at the last barrier.
template <Packing packing, int stages, class P>
__global__ void __launch_bounds__(decode_threads, 1) decode(Segment<P> segment) {
  const P& params = segment.params;
  const SharedLayout& layout = segment.layout;
  const bool persistent = segment.phases > 1;
  load_request_state(params, layout);
  Consumer<P> block{params, layout, segment.first, first_tile(segment.dealt)};
  GridBarrier barrier(params.barrier);
  if (block.at.phase != Phase::head) {
    Loader<packing, stages, P> loader(params, layout, block.at, persistent ? segment.phases - 1 : 1,
                                      block.tile);
    for (;;) {
      if (block.at.phase == Phase::attention) {
        attend<packing>(params, layout, loader, block.at.slot);
      } else {
        multiply_phase<packing>(block, loader);
      }
      if (!persistent) return;
      block.at = params.schedule.after(block.at);
      barrier.arrive();
      if (block.at.phase == Phase::head) break;
      barrier.wait();
    }
  }
  constexpr Packing head = head_packing(packing);
  Loader<head, stages * stage_bytes<packing> / stage_bytes<head>, P> loader(params, layout, block.at, 1,
                                                                            block.tile);
  if (persistent) barrier.wait();
  multiply_phase<head>(block, loader);
}

constexpr int up_to(int bytes, int multiple) { return (bytes + multiple - 1) / multiple * multiple; }

int activation_bytes(const DecodeParams& params) {
  int most = 0;
  for (int phase = 0; phase < phase_count; ++phase) {
    const MatrixShape& shape = params.shapes[phase];
    const int columns = (phase + 1 == phase_count ? params.head_item : params.item).columns;
    most = max(most, shape.warp_items * columns);
  }
  return decode_warps * most * params.batch * static_cast<int>(bf16_bytes);
}

// Where things lie in shared memory; the rings come last.
SharedLayout shared_layout(const DecodeParams& params, int page_entries, int tiles_together) {
  SharedLayout layout{};
  const int d = params.head_dim, word = static_cast<int>(sizeof(float));
  layout.tiles_together = tiles_together;
  layout.angles = request_state_bytes;
  layout.log_decay = layout.angles + params.batch * d * word;
  layout.pages = up_to(layout.log_decay + d / 2 * word, 128);
  layout.partials = up_to(layout.pages + page_entries * static_cast<int>(sizeof(PageEntry)), 128);
  layout.activations =
      up_to(layout.partials + max(tiles_together * tile_partials * word, exchange_bytes(d)), 128);
  layout.rings = up_to(layout.activations + activation_bytes(params), 128);
  return layout;
}

template <Packing packing, int stages, class P>
const char* launch_decode(const DecodeStep& args, const DecodeParams& params, const SharedLayout& layout,
                          int blocks, void* stream) {
  Segment<P> segment{{}, layout, {0, 0, 0, 0, Phase::gqkv}, 1, 0};
  static_cast<DecodeParams&>(segment.params) = params;
  LaunchShape shape{dim3(static_cast<unsigned>(blocks)), decode_threads};
  shape.shared_bytes = static_cast<std::size_t>(layout.rings + decode_warps * stages * stage_bytes<packing>);
  if (args.persistent) {
    segment.phases = params.schedule.phases();
    shape.cooperative = true;
    return launch(decode<packing, stages, P>, shape, segment, stream);
  }
  for (int left = params.schedule.phases(); left > 0; --left) {
    const char* error = launch(decode<packing, stages, P>, shape, segment, stream);
    if (error != nullptr) return error;
    segment.dealt = (segment.dealt + params.shape(segment.first.phase).tiles) % blocks;
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
  limits.shared_bytes = static_cast<int>(emulator::shared_bytes_of_device());
#endif
  return nullptr;
}

// How many pages a block attends to at most, when all requests fill their tables.
int pages_of_block(const DecodeParams& params, int blocks, bool splits_apart) {
  int pages = params.table_length;
  if (params.window > 0) pages = min(pages, 2 * params.window / page_tokens);
  const int splits = splits_apart ? min(pages, max_kv_splits) : 1;
  const int turns = (params.batch * params.heads * splits + blocks - 1) / blocks;
  return turns * ((pages + splits - 1) / splits);
}

template <Packing packing>
const char* launch_packed(const DecodeStep& args, DecodeParams params, void* stream) {
  Limits limits;
  if (const char* error = read_limits(limits)) return error;
  const int blocks = args.blocks > 0 ? static_cast<int>(args.blocks) : limits.multiprocessors;
  // Splits in blocks of their own cost the phase after the joining: some more than a page.
  params.splits_apart = pages_of_block(params, blocks, true) + 1 < pages_of_block(params, blocks, false);
  const int pages = pages_of_block(params, blocks, params.splits_apart);
  // The rings as deep as they fit: what is on its way covers the memory's latency and the phases' chains.
  constexpr int stage = decode_warps * stage_bytes<packing>;
  constexpr bool int8 = packing == Packing::int8, int4 = packing == Packing::int4;
  constexpr int deep = int8   ? 7
                       : int4 ? 12
                              : 11,
                middle = int8   ? 5
                         : int4 ? 8
                                : 7,
                shallow = int8   ? 2
                          : int4 ? 4
                                 : 3;
  const SharedLayout wide = shared_layout(params, pages, max_tiles_together),
                     narrow = shared_layout(params, pages, 1);
  const bool plain = params.head_dim == PlainParams::head_dim && params.log_decay == nullptr;
  if (plain && wide.rings + deep * stage <= limits.shared_bytes)
    return launch_decode<packing, deep, PlainParams>(args, params, wide, blocks, stream);
  if (wide.rings + middle * stage <= limits.shared_bytes)
    return plain ? launch_decode<packing, middle, PlainParams>(args, params, wide, blocks, stream)
                 : launch_decode<packing, middle, DecodeParams>(args, params, wide, blocks, stream);
  if (narrow.rings + shallow * stage <= limits.shared_bytes)
    return plain ? launch_decode<packing, shallow, PlainParams>(args, params, narrow, blocks, stream)
                 : launch_decode<packing, shallow, DecodeParams>(args, params, narrow, blocks, stream);
  return "the step's activations do not fit this device's shared memory: fewer requests at once would";
}

int size(const TensorView& tensor, int axis) { return static_cast<int>(tensor.shape[axis]); }

DecodeParams params_of(const DecodeStep& args) {
  DecodeParams params{};
  params.batch = size(args.tokens, 0);
  params.inverse_batch = static_cast<std::uint32_t>(((std::uint64_t{1} << 32) - 1) / params.batch + 1);
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
  params.inverse_width = 1.0f / static_cast<float>(params.width);
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
  while (1 << params.head_shift < params.head_dim) ++params.head_shift;
  params.place_weights(args.weights.as<std::byte>(), args.h_layers);
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
