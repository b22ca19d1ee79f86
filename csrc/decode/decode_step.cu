#include "decode/decode_step.h"

#include <cmath>

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
  Consumer<P, false> block{params, layout, segment.first, first_tile(segment.dealt)};
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
  Loader<head, stages * stage_bytes<packing, P> / stage_bytes<head, P>, P> loader(params, layout, block.at, 1,
                                                                                  block.tile);
  if (persistent) barrier.wait();
  Consumer<P, true> last{params, layout, block.at, block.tile};
  multiply_phase<head>(last, loader);
}

constexpr int up_to(int bytes, int multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// How many columns of a matrix a warp multiplies.
int columns_of_warp(const DecodeParams& params, Phase phase) {
  const Item item = phase == Phase::head ? params.head_item : params.item;
  return params.shape(phase).warp_items * item.columns;
}

// Of how many columns a warp has room for the activations: of any matrix's, or only of those of the matrices of as many
// columns as the model is wide, whole stages, beside which the others' stream or are joined in parts.
int held_columns(const DecodeParams& params, bool any) {
  const int of_width = max(columns_of_warp(params, Phase::gqkv), columns_of_warp(params, Phase::head));
  if (!any) return max(of_width, params.item.of_stage * params.item.columns);
  return max(of_width, max(columns_of_warp(params, Phase::o), columns_of_warp(params, Phase::down)));
}

// Where things lie in shared memory; the rings come last.
SharedLayout shared_layout(const DecodeParams& params, int rows, int page_entries, int slots, bool any) {
  SharedLayout layout{};
  const int d = params.head_dim, word = static_cast<int>(sizeof(float));
  layout.tiles_together = max(1, slots * product_columns / max(rows, product_columns));
  layout.held_columns = held_columns(params, any);
  layout.angles = request_state_bytes;
  layout.log_decay = layout.angles + (rows > product_columns ? 0 : params.batch * d * word);
  layout.pages = up_to(layout.log_decay + d / 2 * word, 128);
  layout.partials = up_to(layout.pages + page_entries * static_cast<int>(sizeof(PageEntry)), 128);
  layout.activations = up_to(layout.partials + max(slots * tile_partials * word, exchange_bytes(d)), 128);
  const int activations = decode_warps * layout.held_columns * rows * static_cast<int>(bf16_bytes);
  layout.rings = up_to(layout.activations + activations, 128);
  return layout;
}

template <Packing packing, int stages, class P>
const char* launch_decode(const DecodeStep& args, const DecodeParams& params, const SharedLayout& layout,
                          int blocks, void* stream) {
  Segment<P> segment{{}, layout, {0, 0, 0, 0, Phase::gqkv}, 1, 0};
  static_cast<DecodeParams&>(segment.params) = params;
  LaunchShape shape{dim3(static_cast<unsigned>(blocks)), decode_threads};
  shape.shared_bytes =
      static_cast<std::size_t>(layout.rings + decode_warps * stages * stage_bytes<packing, P>);
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

// How the pages are shared out when all requests fill their tables.
struct PageShares {
  int splits, of_block;  // of a head, in blocks of their own; pages of the blocks that have most
};
PageShares page_shares(const DecodeParams& params, int blocks, bool splits_apart) {
  int pages = params.table_length;
  if (params.window > 0) pages = min(pages, 2 * params.window / page_tokens);
  const int splits = splits_apart ? min(pages, max_kv_splits) : 1;
  const int turns = (params.batch * params.heads * splits + blocks - 1) / blocks;
  return {splits, turns * ((pages + splits - 1) / splits)};
}

// Splits in blocks of their own cost the phase after the joining: a warp joins 32 pieces of 8 channels in the time of
// a page, or of two where there are more than 4 splits.
bool splits_apart(const DecodeParams& params, int blocks) {
  const PageShares apart = page_shares(params, blocks, true), together = page_shares(params, blocks, false);
  const int pieces = params.batch * columns_of_warp(params, Phase::o) / 8, turns = (pieces + 31) / 32;
  return apart.of_block + (apart.splits > max_kv_splits / 2 ? 2 : 1) * turns < together.of_block;
}

// How deep the rings are, in stages: as deep as they fit, since what is on its way covers the memory's latency and the
// phases' chains.
struct Depths {
  int deep, middle, shallow;  // of a single request, of up to 8, and on cards with little shared memory
  int of_8, of_16, of_32;     // where activations stream
};
// Beside an int8 cache a stage may be larger, since it has room for a page: rings are less deep there.
template <Packing packing, bool int8_cache>
constexpr Depths depths = packing == Packing::int8   ? Depths{7, 5, 2, 7, 6, 4}
                          : packing == Packing::int4 ? Depths{12, 8, 4, 11, 9, 6}
                                                     : Depths{11, 7, 3, 11, 9, 6};
template <Packing packing>
constexpr Depths depths<packing, true> = packing == Packing::int8   ? Depths{7, 5, 2, 7, 5, 3}
                                         : packing == Packing::int4 ? Depths{10, 8, 3, 10, 8, 5}
                                                                    : Depths{10, 7, 3, 10, 8, 5};

// A kernel and its shared memory. launch is null where the requests do not fit.
struct Choice {
  using Launch = const char*(const DecodeStep&, const DecodeParams&, const SharedLayout&, int, void*);
  Launch* launch;
  SharedLayout layout;
};

template <class Params>
using Bf16Cache = Params;

// The first of a step's kernels that there is shared memory for. Over an int8 cache there are fewer: on cards with little
// of it one for any shape, and for more than 8 requests those of head_dim 128 with RoPE alone.
template <Packing packing, template <class> class Cached>
Choice choose(DecodeParams& params, int blocks, int shared_bytes) {
  using Plain = Cached<PlainParams>;
  using Any = Cached<DecodeParams>;
  constexpr Depths depth = depths<packing, Plain::int8_cache>;
  const bool plain = params.head_dim == PlainParams::head_dim && params.log_decay == nullptr;
  const int groups = params.batch <= product_columns ? 1 : params.batch <= 2 * product_columns ? 2 : 4;
  params.splits_apart = splits_apart(params, blocks);
  const int pages = page_shares(params, blocks, params.splits_apart).of_block;
  const auto fits = [&](const SharedLayout& layout, int stages) {
    return layout.rings + decode_warps * stages * stage_bytes<packing, Any> <= shared_bytes;
  };
  const SharedLayout streaming = shared_layout(params, groups * product_columns, pages, partial_slots, false);
  if (groups > 1) {
    if (plain && groups == 2 && fits(streaming, depth.of_16))
      return {launch_decode<packing, depth.of_16, StreamingParams<Plain, 2>>, streaming};
    if (plain && groups == 4 && fits(streaming, depth.of_32))
      return {launch_decode<packing, depth.of_32, StreamingParams<Plain, 4>>, streaming};
    if constexpr (!Any::int8_cache) {
      if (fits(streaming, depth.shallow))
        return {groups == 2 ? launch_decode<packing, depth.shallow, StreamingParams<Any, 2>>
                            : launch_decode<packing, depth.shallow, StreamingParams<Any, 4>>,
                streaming};
    }
    return {};
  }
  const SharedLayout whole = shared_layout(params, params.batch, pages, partial_slots, true),
                     narrow = shared_layout(params, params.batch, pages, 1, true);
  if (plain && params.batch == 1 && fits(whole, depth.deep))
    return {launch_decode<packing, depth.deep, Cached<SingleParams>>, whole};
  if (plain && params.batch > 1 && fits(streaming, depth.of_8))
    return {launch_decode<packing, depth.of_8, StreamingParams<Plain, 1>>, streaming};
  if (plain && fits(whole, depth.middle)) return {launch_decode<packing, depth.middle, Plain>, whole};
  if constexpr (!Any::int8_cache) {
    if (fits(whole, depth.middle)) return {launch_decode<packing, depth.middle, Any>, whole};
    if (plain && fits(narrow, depth.shallow)) return {launch_decode<packing, depth.shallow, Plain>, narrow};
  }
  if (fits(narrow, depth.shallow)) return {launch_decode<packing, depth.shallow, Any>, narrow};
  return {};
}

template <Packing packing>
Choice choose(DecodeParams& params, bool int8_cache, int blocks, int shared_bytes) {
  return int8_cache ? choose<packing, Int8Cache>(params, blocks, shared_bytes)
                    : choose<packing, Bf16Cache>(params, blocks, shared_bytes);
}

Choice choose(Packing packing, DecodeParams& params, bool int8_cache, int blocks, int shared_bytes) {
  if (packing == Packing::int8) return choose<Packing::int8>(params, int8_cache, blocks, shared_bytes);
  if (packing == Packing::int4) return choose<Packing::int4>(params, int8_cache, blocks, shared_bytes);
  return choose<Packing::bf16>(params, int8_cache, blocks, shared_bytes);
}

int size(const TensorView& tensor, int axis) { return static_cast<int>(tensor.shape[axis]); }

DecodeParams params_of(const DecodeStep& args) {
  DecodeParams params{};
  params.batch = size(args.tokens, 0);
  params.inverse_batch = static_cast<std::uint32_t>(((std::uint64_t{1} << 32) - 1) / params.batch + 1);
  params.width = size(args.z_init, 0);
  params.ffn = static_cast<int>(args.ffn);
  params.heads = static_cast<int>(args.heads());
  params.head_dim = size(args.rope, 1);
  params.vocabulary = size(args.logits, 1);
  params.schedule.l_layers = static_cast<int>(args.l_layers);
  params.schedule.h_layers = static_cast<int>(args.h_layers > 0 ? args.h_layers : args.l_layers);
  params.schedule.h_cycles = static_cast<int>(args.h_cycles);
  params.schedule.l_cycles = static_cast<int>(args.l_cycles);
  params.window = static_cast<int>(args.window);
  params.table_length = size(args.tables, 1);
  params.cache_pages = static_cast<int>(args.cache_pages());
  params.rotations = size(args.rope, 0);
  params.item = item(args.packing);
  params.head_item = item(head_packing(args.packing));
  params.eps = static_cast<float>(args.eps);
  params.inverse_width = 1.0f / static_cast<float>(params.width);
  params.query_scale =
      static_cast<float>(1 / (std::sqrt(static_cast<double>(params.head_dim)) * std::log(2.0)));
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

// What decides of the kernel and its shared memory.
DecodeParams params_of(const DecodeRoom& args) {
  DecodeParams params{};
  static constexpr float any = 0;
  params.width = static_cast<int>(args.width);
  params.ffn = static_cast<int>(args.ffn);
  params.heads = static_cast<int>(args.heads);
  params.head_dim = static_cast<int>(args.head_dim);
  params.vocabulary = 1;
  params.window = static_cast<int>(args.window);
  params.table_length = static_cast<int>(args.table_length);
  params.log_decay = args.xpos ? &any : nullptr;
  params.item = item(args.packing);
  params.head_item = item(head_packing(args.packing));
  params.place_weights(nullptr, 0);
  return params;
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(cuda_step, hrmcore::DecodeStep) {
  using namespace hrmcore;
  cuda::DecodeParams params = cuda::params_of(args);
  cuda::Limits limits;
  if (const char* error = cuda::read_limits(limits)) return error;
  const int blocks = args.blocks > 0 ? static_cast<int>(args.blocks) : limits.multiprocessors;
  const cuda::Choice choice =
      cuda::choose(args.packing, params, args.int8_cache(), blocks, limits.shared_bytes);
  if (choice.launch == nullptr)
    return "the step's activations do not fit this device's shared memory: fewer requests at once would";
  return choice.launch(args, params, choice.layout, blocks, stream);
}

HRMCORE_DEVICE_KERNEL(cuda_step_most_requests, hrmcore::DecodeRoom) {
  using namespace hrmcore;
  static_cast<void>(stream);
  cuda::Limits limits;
  if (const char* error = cuda::read_limits(limits)) return error;
  const int blocks = args.blocks > 0 ? static_cast<int>(args.blocks) : limits.multiprocessors;
  cuda::DecodeParams params = cuda::params_of(args);
  *args.most = 0;
  for (params.batch = max_batch; params.batch > 0 && *args.most == 0; --params.batch) {
    const cuda::Choice choice =
        cuda::choose(args.packing, params, args.int8_cache, blocks, limits.shared_bytes);
    if (choice.launch != nullptr) *args.most = params.batch;
  }
  return nullptr;
}
