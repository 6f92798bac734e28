// Activations in the order in which kernels read them: of whole products, or scaled for one group
// of outputs; and the memory they are in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "matrix/level.h"

namespace quantine {

// What all products with matrices that are alike read.
class Arranged {
 public:
  // `x` is [batch, columns], in the order of the inputs. `outliers`: some of the matrices have any.
  Arranged(const Level& level, const Weights& w, const float* x, std::size_t batch, bool exact,
           bool outliers);
  const Activations& view() const { return view_; }

 private:
  const float* stored_order(const Weights& w, const float* x, std::size_t batch);
  void turn(const Weights& w, std::size_t batch);
  void arrange_exact(const Weights& w, std::size_t batch);
  void arrange_fast(const Level& level, const Weights& w, std::size_t batch);

  Activations view_;
  std::vector<float> ordered_, turned_, spread_, scales_, sums_;
  std::vector<std::uint8_t> codes_;
};

// Whether both read activations in the same arrangement.
bool alike(const Weights& a, const Weights& b);

// Up to 16 rows of activations, scaled for one group of outputs at a time.
class Scaled {
 public:
  Scaled(const Level& level, const Weights& w, std::size_t rows, bool exact);
  // Rows `first`, a multiple of 16, and following.
  void take(const Activations& all, std::size_t first, std::size_t rows, std::size_t group);
  // For a tile whose rows before `first_lane` are in another group.
  const Activations& view(std::size_t first_lane) {
    view_.first_lane = first_lane;
    return view_;
  }

 private:
  const Level& level_;
  const Weights& weights_;
  Activations view_;
  ScaledRows target_;
  std::vector<float> offsets_;
  // Not vectors: those would be filled with zeros for every task.
  std::unique_ptr<float[]> spread_, scales_;
  std::unique_ptr<std::uint8_t[]> codes_;
};

}  // namespace quantine
