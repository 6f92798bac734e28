// Cuts the sum over tokens into strips of columns for threads; amx.cpp multiplies them.
#include "gram/gram.h"

#include <algorithm>
#include <memory>

#include "gram/amx.h"

namespace quantine {
namespace {

constexpr std::size_t kTokens = 1024;  // packed at once

// Adds strip `i` times the strips from it on.
void add_products(const float* products, std::size_t i, std::size_t inputs,
                  float* total) {
  const std::size_t rows = std::min(kStrip, inputs - i * kStrip);
  for (std::size_t r = 0; r < rows; ++r) {
    float* row = total + (i * kStrip + r) * inputs;
    for (std::size_t first = i * kStrip; first < inputs; first += kStrip) {
      const float* product = products + (first - i * kStrip) * kStrip + r * kStrip;
      const std::size_t columns = std::min(kStrip, inputs - first);
      for (std::size_t c = 0; c < columns; ++c) row[first + c] += product[c];
    }
  }
}

// Copies the strip of rows right of the diagonal block of strip `i` below it.
void mirror(std::size_t i, std::size_t inputs, float* total) {
  const std::size_t begin = i * kStrip, end = std::min(begin + kStrip, inputs);
  for (std::size_t column = end; column < inputs; ++column)
    for (std::size_t row = begin; row < end; ++row)
      total[column * inputs + row] = total[row * inputs + column];
}

}  // namespace

bool multiplies_tiles() {
  static const bool allowed = __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") && allow_tiles();
  return allowed;
}

void add_gram(const std::uint16_t* x, std::size_t tokens, std::size_t inputs, float* total,
              Pool& pool) {
  const std::size_t strips = (inputs + kStrip - 1) / kStrip;
  const std::size_t most = std::min(kTokens, tokens + kStep - 1) / kStep;
  const std::unique_ptr<PackedStep[]> packed(new PackedStep[strips * most]);
  for (std::size_t done = 0; done < tokens; done += kTokens) {
    const std::uint16_t* part = x + done * inputs;
    const std::size_t count = std::min(kTokens, tokens - done);
    const std::size_t steps = (count + kStep - 1) / kStep;
    pool.run(strips, [&](std::size_t strip) {
      for (std::size_t step = 0; step < steps; ++step)
        pack_step(part + step * kStep * inputs, count - step * kStep, inputs, strip * kStrip,
                  packed[strip * steps + step]);
    });
    pool.run(strips, [&](std::size_t i) {
      const std::unique_ptr<float[]> products(new float[(strips - i) * kStrip * kStrip]);
      multiply_strips(&packed[i * steps], &packed[i * steps], strips - i, steps, products.get());
      add_products(products.get(), i, inputs, total);
    });
  }
  pool.run(strips, [&](std::size_t i) { mirror(i, inputs, total); });
}

}  // namespace quantine
