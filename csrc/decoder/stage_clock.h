// Where the time of decoding goes: a clock that stands still unless somebody asks.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>

namespace quantine {

// What a token passes through, in order. Products include the rounding of their inputs.
enum class Stage {
  kEmbedding, kNorms, kQkv, kCache, kAttention, kO, kUp, kActivation, kDown, kHead
};
constexpr std::array<const char*, 10> kStageNames = {
    "embedding", "norms", "q, k, v", "positions and cache", "attention",
    "o", "gate and up", "activation", "down", "head"};

// Adds up the time between marks, by stage.
class StageClock {
 public:
  // Forgets what it has added up; runs from now on, or stands still.
  void turn(bool on) {
    on_ = on;
    spent_ = {};
  }
  // A call begins.
  void start() {
    if (on_) last_ = std::chrono::steady_clock::now();
  }
  // What has passed since the mark before belongs to `stage`.
  void mark(Stage stage) {
    if (!on_) return;
    const auto now = std::chrono::steady_clock::now();
    spent_[static_cast<std::size_t>(stage)] += now - last_;
    last_ = now;
  }
  double seconds(std::size_t stage) const {
    return std::chrono::duration<double>(spent_[stage]).count();
  }

 private:
  bool on_ = false;
  std::chrono::steady_clock::time_point last_;
  std::array<std::chrono::steady_clock::duration, kStageNames.size()> spent_ = {};
};

}  // namespace quantine
