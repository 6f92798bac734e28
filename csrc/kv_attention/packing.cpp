// Rounding of queries, keys and values to the grids of their channels, one head at a time.
#include <algorithm>
#include <cstring>
#include <vector>

#include "base/lanes.h"
#include "bits/bits.h"
#include "kv_attention/kv_attention.h"

namespace quantine {
namespace {

constexpr std::size_t kSmall = 65536;   // operations that are done before a thread wakes up
constexpr std::size_t kRunTokens = 64;  // of a head that a thread rounds at once

// The nearest codes: x / scale + zero, which rounds twice, as quantine.core.grid.encode does.
QUANTINE_CLONES
void encode(const float* x, const float* scale, const float* zero, std::size_t n, const float* top,
            std::uint8_t* codes) {
  for (std::size_t d = 0; d < n; ++d)
    codes[d] = static_cast<std::uint8_t>(
        static_cast<std::int32_t>(nearest_code(x[d] / scale[d] + zero[d], top[d])));
}

// The same one channel after another; `rest` are the values, of which errors are taken off.
QUANTINE_CLONES
void encode_fed(float* rest, const float* scale, const float* zero, const float* feedback,
                std::size_t n, const float* top, std::uint8_t* codes) {
  for (std::size_t d = 0; d < n; ++d) {
    const float code = nearest_code(rest[d] / scale[d] + zero[d], top[d]);
    const float error = rest[d] - (code - zero[d]) * scale[d];
    codes[d] = static_cast<std::uint8_t>(static_cast<std::int32_t>(code));
    const float* row = feedback + d * n;
    for (std::size_t k = d + 1; k < n; ++k) rest[k] = rest[k] - error * row[k];
  }
}

QUANTINE_CLONES
void decode(const std::uint8_t* codes, const float* scale, const float* zero, std::size_t n,
            float* out) {
  for (std::size_t d = 0; d < n; ++d) out[d] = (static_cast<float>(codes[d]) - zero[d]) * scale[d];
}

// Calls `take(batch, head, token, codes)` with the codes [dim] of each.
template <typename Take>
void encode_each(const FloatStates& states, const StateGrid& grid, Pool& pool, const Take& take) {
  const std::size_t dim = states.dim, runs = (states.tokens + kRunTokens - 1) / kRunTokens;
  const std::vector<float> alike(grid.tops == nullptr ? dim : 0,
                                 static_cast<float>((1 << grid.bits) - 1));
  const bool fed = grid.feedback != nullptr;
  const auto encode_run = [&](std::size_t index) {
    const std::size_t head = index % states.heads, first = index / states.heads * kRunTokens;
    const std::size_t end = std::min(states.tokens, first + kRunTokens);
    const float *scale = grid.scale + head * dim, *zero = grid.zero + head * dim;
    const float* tops = grid.tops == nullptr ? alike.data() : grid.tops + head * dim;
    std::vector<std::uint8_t> codes(dim);
    std::vector<float> rest(dim);
    for (std::size_t batch = 0; batch < states.batch; ++batch)
      for (std::size_t token = first; token < end; ++token) {
        const float* x = states.values + batch * states.batch_stride + head * states.head_stride +
                         token * states.token_stride;
        if (fed) {
          std::copy(x, x + dim, rest.begin());
          encode_fed(rest.data(), scale, zero, grid.feedback + head * dim * dim, dim,
                     tops, codes.data());
        } else {
          encode(x, scale, zero, dim, tops, codes.data());
        }
        take(batch, head, token, codes.data());
      }
  };
  const std::size_t work = states.batch * states.tokens * states.heads * dim;
  if (work * (fed ? dim : 1) > kSmall) return pool.run(states.heads * runs, encode_run);
  for (std::size_t index = 0; index < states.heads * runs; ++index) encode_run(index);
}

}  // namespace

// Without the branches of `half_to_float`: vectors can do it.
QUANTINE_CLONES
void widen(const std::uint16_t* halves, std::size_t n, float* out) {
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(halves[i] & 0x7fffu) << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;  // from the one bias of exponents to the other
    out[i] = (halves[i] & 0x8000u) != 0 ? -value : value;
  }
}

void pack_states(const FloatStates& states, const StateGrid& grid, std::uint8_t* packed,
                 std::size_t batch_stride, std::size_t head_stride, std::size_t token_stride,
                 Pool& pool) {
  const auto pack = [&](std::size_t batch, std::size_t head, std::size_t token,
                        const std::uint8_t* codes) {
    std::uint8_t* row = packed + batch * batch_stride + head * head_stride + token * token_stride;
    pack_bits(codes, row, 1, states.dim, grid.bits);
  };
  encode_each(states, grid, pool, pack);
}

void round_states(const FloatStates& states, const StateGrid& grid, float* out, Pool& pool) {
  const std::size_t dim = states.dim;
  const auto put = [&](std::size_t batch, std::size_t head, std::size_t token,
                       const std::uint8_t* codes) {
    const std::size_t row = (batch * states.heads + head) * states.tokens + token;
    decode(codes, grid.scale + head * dim, grid.zero + head * dim, dim, out + row * dim);
  };
  encode_each(states, grid, pool, put);
}

}  // namespace quantine
