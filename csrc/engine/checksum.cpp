#include "engine/checksum.h"

#include "gemm/lanes.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

constexpr int stripe_bytes = 256;
constexpr int vectors = stripe_bytes / (4 * lanes);
constexpr std::uint32_t odd = 0x9e3779b1;

std::uint64_t block_sum(const std::byte* data, std::int64_t bytes) {
  vuint lane[vectors];
  for (int v = 0; v < vectors; ++v) lane[v] = odd + vuint{};
  for (std::int64_t at = 0; at < bytes; at += stripe_bytes) {
    const std::byte* stripe = data + at;
    std::byte last[stripe_bytes] = {};
    if (bytes - at < stripe_bytes) {
      __builtin_memcpy(last, stripe, static_cast<std::size_t>(bytes - at));
      stripe = last;
    }
    for (int v = 0; v < vectors; ++v) lane[v] = (lane[v] ^ (vuint)load_bits(stripe + v * 4 * lanes)) * odd;
  }
  std::uint64_t folded = static_cast<std::uint64_t>(bytes);
  for (int v = 0; v < vectors; ++v) {
    for (int i = 0; i < lanes; ++i) {
      folded = (folded ^ lane[v][i]) * 0x9e3779b97f4a7c15ull;
      folded ^= folded >> 29;
    }
  }
  return folded;
}

}  // namespace

void checksum_blocks(const Checksum& args) noexcept {
  parallel_for(
      (args.bytes + checksum_block - 1) / checksum_block, 4, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t block = begin; block < end; ++block) {
          const std::int64_t left = args.bytes - block * checksum_block;
          args.blocks[block] =
              block_sum(args.data + block * checksum_block, left < checksum_block ? left : checksum_block);
        }
      });
}

}  // namespace hrmcore::HRMCORE_ISA
