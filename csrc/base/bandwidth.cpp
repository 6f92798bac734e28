// Reads words on all threads and adds them up, which takes no time beside what memory takes.
#include "base/bandwidth.h"

#include <algorithm>
#include <atomic>

#include "base/lanes.h"

namespace quantine {
namespace {

constexpr std::size_t kPart = 1u << 16;  // words that a thread takes at once

QUANTINE_CLONES
std::uint64_t sum_of(const std::uint64_t* words, std::size_t count) {
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += words[i];
  return sum;
}

}  // namespace

std::uint64_t read_words(const std::uint64_t* words, std::size_t count, Pool& pool) {
  std::atomic<std::uint64_t> total{0};
  pool.run((count + kPart - 1) / kPart, [&](std::size_t part) {
    total += sum_of(words + part * kPart, std::min(kPart, count - part * kPart));
  });
  return total;
}

}  // namespace quantine
