// Puts activations in order, spreads them over padded blocks, or has a level round or scale them.
#include "matrix/activations.h"

#include <algorithm>
#include <cstring>

namespace quantine {
namespace {

bool is_packed(const Weights& w) { return w.bits <= 8; }

// Products read activations that are the same for all rows.
bool is_common(const Weights& w) { return is_packed(w) && w.group_rows == 0; }

}  // namespace

bool alike(const Weights& a, const Weights& b) {
  if (is_common(a) != is_common(b) || a.columns != b.columns || a.order != b.order) return false;
  if (!is_common(a)) return true;
  return std::equal(a.blocks.begin(), a.blocks.end(), b.blocks.begin(), b.blocks.end(),
                    [](const Block& p, const Block& q) { return p.first == q.first; });
}

Arranged::Arranged(const Level& level, const Weights& w, const float* x, std::size_t batch,
                   bool exact, bool outliers) {
  view_.columns = w.columns;
  view_.x = stored_order(w, x, batch);
  if (outliers && batch > 1) turn(w, batch);
  if (!is_common(w)) return;
  view_.blocks = w.blocks.size();
  view_.padded = w.padded;
  if (exact) {
    arrange_exact(w, batch);
  } else {
    arrange_fast(level, w, batch);
  }
}

const float* Arranged::stored_order(const Weights& w, const float* x, std::size_t batch) {
  if (w.order.empty()) return x;
  ordered_.resize(batch * w.columns);
  for (std::size_t b = 0; b < batch; ++b)
    for (std::size_t j = 0; j < w.columns; ++j)
      ordered_[b * w.columns + j] = x[b * w.columns + w.order[j]];
  return ordered_.data();
}

void Arranged::turn(const Weights& w, std::size_t batch) {
  turned_.assign((batch + kTile - 1) / kTile * kTile * w.columns, 0.0f);
  for (std::size_t b = 0; b < batch; ++b) {
    float* out = turned_.data() + b / kTile * kTile * w.columns + b % kTile;
    for (std::size_t j = 0; j < w.columns; ++j) out[j * kTile] = view_.x[b * w.columns + j];
  }
  view_.turned = turned_.data();
}

void Arranged::arrange_exact(const Weights& w, std::size_t batch) {
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

void Arranged::arrange_fast(const Level& level, const Weights& w, std::size_t batch) {
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

Scaled::Scaled(const Level& level, const Weights& w, std::size_t rows, bool exact)
    : level_(level), weights_(w) {
  view_.columns = w.columns;
  view_.padded = w.padded;
  view_.blocks = w.blocks.size();
  offsets_.resize(rows);
  view_.offsets = target_.offsets = offsets_.data();
  if (exact) {
    spread_.reset(new float[rows * w.padded]);
    view_.spread = target_.spread = spread_.get();
    for (std::size_t row = 0; row < rows; ++row)
      std::fill(&spread_[row * w.padded + w.columns], &spread_[(row + 1) * w.padded], 0.0f);
    return;
  }
  const std::size_t bytes = w.padded / kChunk * kChunkBytes;  // of a row
  codes_.reset(new std::uint8_t[rows * bytes]);
  scales_.reset(new float[rows * view_.blocks]);
  for (std::size_t row = 0; row < rows; ++row)
    std::fill(&codes_[row * bytes + w.columns / kChunk * kChunkBytes], &codes_[row * bytes] + bytes,
              std::uint8_t{0});
  view_.codes = target_.codes = codes_.get();
  view_.scales = target_.scales = scales_.get();
}

void Scaled::take(const Activations& all, std::size_t first, std::size_t rows, std::size_t group) {
  view_.x = all.x + first * all.columns;
  view_.turned = all.turned == nullptr ? nullptr : all.turned + first * all.columns;
  level_.scale(weights_, group, view_.x, rows, target_);
}

}  // namespace quantine
