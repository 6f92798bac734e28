// Which instruction set is used, memory for codes, and how threads share products and decoding: by
// tiles of 16 rows.
#include "matrix/matrix.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "base/arm.h"
#include "matrix/activations.h"

namespace quantine {
namespace {

constexpr std::size_t kOverread = 64;       // kernels read whole vectors
constexpr std::size_t kHuge = 2u << 20;     // bytes of a large page
constexpr std::size_t kTaskBytes = 16384;   // codes that are worth a thread's attention
constexpr std::size_t kScaledTiles = 16;    // tiles that share scaled activations, at most

std::vector<const Level*> found_levels() {
  std::vector<const Level*> found;
#if defined(QUANTINE_X86)
  __builtin_cpu_init();
  // Whoever has AVX2 has F16C.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(&avx512_level());
  if (avx2) found.push_back(&avx2_level());
#endif
#if defined(QUANTINE_ARM)
  if (has_arm_mixed_dot_product()) found.push_back(&i8mm_level());
  if (has_arm_dot_product()) found.push_back(&dotprod_level());
  found.push_back(&neon_level());
#endif
  found.push_back(&scalar_level());
  return found;
}

const std::vector<const Level*>& all_levels() {
  static const std::vector<const Level*> found = found_levels();
  return found;
}

std::atomic<const Level*>& chosen() {
  static std::atomic<const Level*> level{all_levels().front()};
  return level;
}

std::size_t tiles_of(const Weights& w) { return (w.rows + kTile - 1) / kTile; }

// Tiles that a thread takes at once. Where groups run along outputs, whole groups if they are
// small: activations are scaled once for those of a task.
std::size_t together(const Weights& w) {
  const std::size_t worth =
      std::max<std::size_t>(1, kTaskBytes / std::max<std::size_t>(1, w.tile_bytes));
  if (w.group_rows == 0) return worth;
  const std::size_t group =
      std::min((std::min(w.group_rows, w.rows) + kTile - 1) / kTile, kScaledTiles);
  return std::max<std::size_t>(1, worth / group) * group;
}

// Tiles of one product that a thread takes at once.
struct Task {
  std::size_t product, first, count;
};

void multiply_common(const Level& level, const OwnProduct& product, const Task& task,
                     const Activations& a, bool exact) {
  for (std::size_t tile = task.first; tile < task.first + task.count; ++tile)
    level.multiply(product.matrix->weights(), a, product.batch, tile, product.y, exact);
}

// For groups along outputs: activations are scaled for one group after another. A tile is met once
// for each of its groups, and what a group has written behind its end the next one writes again.
void multiply_scaled(const Level& level, const OwnProduct& product, const Task& task,
                     const Activations& a, bool exact) {
  const Weights& w = product.matrix->weights();
  Scaled scaled(level, w, std::min(product.batch, kTile), exact);
  const std::size_t begin = task.first * kTile;
  const std::size_t end = std::min(w.rows, (task.first + task.count) * kTile);
  for (std::size_t row = 0; row < product.batch; row += kTile) {
    const std::size_t rows = std::min(kTile, product.batch - row);
    for (std::size_t from = begin, to; from < end; from = to) {  // rows of one group
      to = std::min(end, (from / w.group_rows + 1) * w.group_rows);
      scaled.take(a, row, rows, from / w.group_rows);
      for (std::size_t at = from; at < to; at = (at / kTile + 1) * kTile)
        level.multiply(w, scaled.view(at % kTile), rows, at / kTile, product.y + row * w.rows,
                       exact);
    }
  }
}

// What products with the same activations read.
struct Arrangement {
  const Weights* weights;  // of the first of these products
  const float* x;
  std::size_t batch;
  bool outliers;  // in any of them
};

bool same_input(const Arrangement& one, const OwnProduct& product) {
  return one.x == product.x && one.batch == product.batch &&
         alike(*one.weights, product.matrix->weights());
}

}  // namespace

const Level& current_level() { return *chosen().load(); }

Bytes::Bytes(std::size_t size) : size_(size) {
  // Large pages save the processor most of the work of finding memory.
  const bool huge = size >= kHuge;
  const std::size_t unit = huge ? kHuge : 64;
  const std::size_t whole = (size + kOverread + unit - 1) / unit * unit;
  void* memory = std::aligned_alloc(unit, whole);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (huge) madvise(memory, whole, MADV_HUGEPAGE);
#endif
  std::memset(memory, 0, size + kOverread);
  data_.reset(static_cast<std::uint8_t*>(memory));
}

void Bytes::Free::operator()(std::uint8_t* data) const { std::free(data); }

std::size_t Matrix::nbytes() const {
  const Weights& w = weights_;
  return w.codes.size() + w.statistics.size() + w.outlier_lanes.size() +
         sizeof(std::uint16_t) * (w.outlier_short_columns.size() + w.outlier_halves.size()) +
         sizeof(float) * (w.scale.second.size() + w.zero.second.size() + w.outlier_floats.size()) +
         sizeof(std::uint32_t) * (w.order.size() + w.outlier_offsets.size() +
                                  w.outlier_columns.size()) +
         sizeof(Block) * w.blocks.size();
}

template <typename T, typename Decode>
void Matrix::decode_rows(std::size_t first, std::size_t count, T* out, Decode&& decode,
                         Pool& pool) const {
  const Weights& w = weights_;
  const std::size_t begin = first / kTile, end = (first + count + kTile - 1) / kTile;
  const std::size_t group_rows = w.group_rows == 0 ? w.rows : w.group_rows;
  pool.run(end - begin, [&](std::size_t index) {
    const std::size_t tile = begin + index;
    const std::size_t last = std::min(first + count, (tile + 1) * kTile);
    std::vector<T> stored;
    for (std::size_t row = std::max(first, tile * kTile), to; row < last; row = to) {
      const std::size_t group = row / group_rows;
      to = std::min(last, (group + 1) * group_rows);
      T* target = out + (row - first) * w.columns;
      if (to - row == kTile && w.order.empty()) return decode(w, tile, group, target, w.columns);
      stored.resize(kTile * w.columns);
      decode(w, tile, group, stored.data(), w.columns);
      const T* from = stored.data() + row % kTile * w.columns;
      if (w.order.empty()) {
        std::memcpy(target, from, (to - row) * w.columns * sizeof(T));
        continue;
      }
      for (std::size_t r = row; r < to; ++r, target += w.columns, from += w.columns)
        for (std::size_t j = 0; j < w.columns; ++j) target[w.order[j]] = from[j];
    }
  });
}

void Matrix::decode(std::size_t first, std::size_t count, float* out, Pool& pool) const {
  decode_rows(first, count, out, current_level().decode, pool);
}

void Matrix::decode(std::size_t first, std::size_t count, std::uint16_t* out, Pool& pool) const {
  decode_rows(first, count, out, current_level().decode_bfloat16, pool);
}

void multiply(const Product* products, std::size_t count, const float* x, std::size_t batch,
              Arithmetic arithmetic, Pool& pool) {
  std::vector<OwnProduct> own;
  own.reserve(count);
  for (std::size_t p = 0; p < count; ++p)
    own.push_back({products[p].matrix, x, batch, products[p].y});
  multiply_grouped(own.data(), count, arithmetic, pool);
}

void multiply_grouped(const OwnProduct* products, std::size_t count, Arithmetic arithmetic,
                      Pool& pool) {
  const Level& level = current_level();
  const bool exact = arithmetic == Arithmetic::kExact;
  std::vector<Arrangement> wanted;
  wanted.reserve(count);
  std::vector<std::size_t> uses(count);
  std::vector<Task> tasks;
  tasks.reserve(64);
  for (std::size_t p = 0; p < count; ++p) {
    const OwnProduct& product = products[p];
    if (product.batch == 0) continue;
    const Weights& w = product.matrix->weights();
    const auto found = std::find_if(wanted.begin(), wanted.end(), [&](const Arrangement& one) {
      return same_input(one, product);
    });
    uses[p] = static_cast<std::size_t>(found - wanted.begin());
    if (found == wanted.end()) wanted.push_back({&w, product.x, product.batch, false});
    wanted[uses[p]].outliers |= !w.outlier_offsets.empty();
    const std::size_t tiles = tiles_of(w), count_together = together(w);
    for (std::size_t tile = 0; tile < tiles; tile += count_together)
      tasks.push_back({p, tile, std::min(count_together, tiles - tile)});
  }
  std::vector<Arranged> arranged;
  arranged.reserve(wanted.size());
  for (const Arrangement& one : wanted)
    arranged.emplace_back(level, *one.weights, one.x, one.batch, exact, one.outliers);
  const auto run = [&](std::size_t index) {
    const Task& task = tasks[index];
    const OwnProduct& product = products[task.product];
    const auto multiply_tiles =
        product.matrix->weights().group_rows == 0 ? multiply_common : multiply_scaled;
    multiply_tiles(level, product, task, arranged[uses[task.product]].view(), exact);
  };
  pool.run(tasks.size(), std::ref(run));  // by reference, nothing is allocated
}

bool has_bfloat16() {
#if defined(QUANTINE_X86)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Level* level : all_levels()) names.push_back(level->name);
  return names;
}

std::string level() { return current_level().name; }

void use_level(const std::string& name) {
  for (const Level* level : all_levels())
    if (name == level->name) {
      chosen() = level;
      return;
    }
  throw std::invalid_argument("this machine has no level " + name);
}

}  // namespace quantine
