#include "matrix.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "half.h"
#include "matrix_level.h"

namespace quantine {
namespace {

constexpr std::size_t kOverread = 64;       // kernels read whole vectors
constexpr std::size_t kHuge = 2u << 20;     // bytes of a large page
constexpr std::size_t kTaskBytes = 16384;   // codes that are worth a thread's attention

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

bool is_packed(const Weights& w) { return w.bits <= 8; }

// Whether both read activations in the same arrangement.
bool alike(const Weights& a, const Weights& b) {
  if (is_packed(a) != is_packed(b) || a.columns != b.columns || a.order != b.order) return false;
  if (!is_packed(a)) return true;
  return std::equal(a.blocks.begin(), a.blocks.end(), b.blocks.begin(), b.blocks.end(),
                    [](const Block& p, const Block& q) { return p.first == q.first; });
}

// Activations arranged for the kernels of one matrix, and the memory they are in.
class Arranged {
 public:
  Arranged(const Level& level, const Weights& w, const float* x, std::size_t batch, bool exact,
           bool outliers) {
    view_.columns = w.columns;
    view_.x = stored_order(w, x, batch);
    if (outliers && batch > 1) turn(w, batch);
    if (!is_packed(w)) return;
    view_.blocks = w.blocks.size();
    // Whole vectors of up to 8 chunks are read, so the padding behind the last block is, too.
    view_.padded = (w.chunks + 7) / 8 * 8 * kChunk;
    if (exact) {
      arrange_exact(w, batch);
    } else {
      arrange_fast(level, w, batch);
    }
  }
  const Activations& view() const { return view_; }

 private:
  const float* stored_order(const Weights& w, const float* x, std::size_t batch) {
    if (w.order.empty()) return x;
    ordered_.resize(batch * w.columns);
    for (std::size_t b = 0; b < batch; ++b)
      for (std::size_t j = 0; j < w.columns; ++j)
        ordered_[b * w.columns + j] = x[b * w.columns + w.order[j]];
    return ordered_.data();
  }

  void turn(const Weights& w, std::size_t batch) {
    turned_.assign((batch + kTile - 1) / kTile * kTile * w.columns, 0.0f);
    for (std::size_t b = 0; b < batch; ++b) {
      float* out = turned_.data() + b / kTile * kTile * w.columns + b % kTile;
      for (std::size_t j = 0; j < w.columns; ++j) out[j * kTile] = view_.x[b * w.columns + j];
    }
    view_.turned = turned_.data();
  }

  void arrange_exact(const Weights& w, std::size_t batch) {
    spread_.assign(batch * view_.padded, 0.0f);
    view_.spread = spread_.data();
    for (std::size_t b = 0; b < batch; ++b) {
      float* out = spread_.data() + b * view_.padded;
      for (const Block& block : w.blocks) {
        std::memcpy(out, view_.x + b * w.columns + block.first, block.width * sizeof(float));
        out += block.chunks * kChunk;
      }
    }
  }

  void arrange_fast(const Level& level, const Weights& w, std::size_t batch) {
    const std::size_t bytes = view_.padded / kChunk * kChunkBytes;  // of a row
    codes_.assign(batch * bytes, 0);
    scales_.resize(batch * view_.blocks);
    sums_.resize(batch * view_.blocks);
    for (std::size_t b = 0; b < batch; ++b)
      level.round(w, view_.x + b * w.columns, codes_.data() + b * bytes,
                  scales_.data() + b * view_.blocks, sums_.data() + b * view_.blocks);
    view_.codes = codes_.data();
    view_.scales = scales_.data();
    view_.sums = sums_.data();
  }

  Activations view_;
  std::vector<float> ordered_, turned_, spread_, scales_, sums_;
  std::vector<std::uint8_t> codes_;
};

std::size_t tiles_of(const Weights& w) { return (w.rows + kTile - 1) / kTile; }

// Tiles of one product that a thread takes at once.
struct Task {
  std::size_t product, first, count;
};

}  // namespace

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
  pool.run(end - begin, [&](std::size_t index) {
    const std::size_t tile = begin + index, row = std::max(first, tile * kTile);
    const std::size_t rows = std::min(first + count, (tile + 1) * kTile) - row;
    T* target = out + (row - first) * w.columns;
    if (rows == kTile && w.order.empty()) return decode(w, tile, target, w.columns);
    std::vector<T> stored(kTile * w.columns);
    decode(w, tile, stored.data(), w.columns);
    const T* from = stored.data() + row % kTile * w.columns;
    if (w.order.empty()) {
      std::memcpy(target, from, rows * w.columns * sizeof(T));
      return;
    }
    for (std::size_t r = 0; r < rows; ++r, target += w.columns, from += w.columns)
      for (std::size_t j = 0; j < w.columns; ++j) target[w.order[j]] = from[j];
  });
}

void Matrix::decode(std::size_t first, std::size_t count, float* out, Pool& pool) const {
  decode_rows(first, count, out, chosen().load()->decode, pool);
}

void Matrix::decode(std::size_t first, std::size_t count, std::uint16_t* out, Pool& pool) const {
  decode_rows(first, count, out, chosen().load()->decode_bfloat16, pool);
}

void multiply(const Product* products, std::size_t count, const float* x, std::size_t batch,
              Arithmetic arithmetic, Pool& pool) {
  const Level& level = *chosen().load();
  const bool exact = arithmetic == Arithmetic::kExact;
  std::vector<Arranged> arranged;
  arranged.reserve(count);
  std::vector<std::size_t> uses(count);
  std::vector<Task> tasks;
  tasks.reserve(64);
  const bool outliers = std::any_of(products, products + count, [](const Product& product) {
    return !product.matrix->weights().outlier_offsets.empty();
  });
  for (std::size_t p = 0; p < count; ++p) {
    const Weights& w = products[p].matrix->weights();
    std::size_t same = 0;
    while (same < p && !alike(products[same].matrix->weights(), w)) ++same;
    if (same == p) arranged.emplace_back(level, w, x, batch, exact, outliers);
    uses[p] = same == p ? arranged.size() - 1 : uses[same];
    const std::size_t tiles = tiles_of(w);
    const std::size_t together = std::max<std::size_t>(1, kTaskBytes / std::max<std::size_t>(1, w.tile_bytes));
    for (std::size_t tile = 0; tile < tiles; tile += together)
      tasks.push_back({p, tile, std::min(together, tiles - tile)});
  }
  const auto run = [&](std::size_t index) {
    const Task& task = tasks[index];
    const Product& product = products[task.product];
    for (std::size_t tile = task.first; tile < task.first + task.count; ++tile)
      level.multiply(product.matrix->weights(), arranged[uses[task.product]].view(), batch, tile,
                     product.y, exact);
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

std::string level() { return chosen().load()->name; }

void use_level(const std::string& name) {
  for (const Level* level : all_levels())
    if (name == level->name) {
      chosen() = level;
      return;
    }
  throw std::invalid_argument("this machine has no level " + name);
}

}  // namespace quantine
