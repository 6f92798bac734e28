// Attention over keys and values that stay packed codes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/pool.h"

namespace quantine {

// Codes [batch, kv_heads, context, bytes]: each row is the bit stream (docs/format.md) of the `dim`
// codes of one token. A code c of channel d of a head stands for scale[d] * (c - zero[d]).
// Codes may be cut into `count` digits of `bits` bits: digit j is worth weight[j] in the code of
// channel place[j]. A factor of the token, a float16, may follow, by which all is multiplied.
struct PackedStates {
  const std::uint8_t* codes;
  std::size_t batch_stride, head_stride, token_stride;  // bytes
  std::size_t extent;                                   // bytes from `codes` on that may be read
  int bits;                                             // 2 to 8
  const float *scale, *zero;                            // [kv_heads, dim]
  std::size_t count;                                    // codes or digits of a row
  const std::int64_t* place;                            // [kv_heads, count], or null: no digits
  const float* weight;                                  // likewise
  bool factors;
};

// Floats [batch, heads, tokens, dim] that become codes; strides in floats.
struct FloatStates {
  const float* values;
  std::size_t batch, heads, tokens, dim;
  std::size_t batch_stride, head_stride, token_stride;
};

// The grid of each channel, and error feedback among the channels of a head: the error of a
// channel, times its row of `feedback`, is taken off the channels after it.
struct StateGrid {
  int bits;                   // 2 to 8
  const float *scale, *zero;  // [heads, dim]
  const float* feedback;      // [heads, dim, dim], or null
  const float* tops;          // [heads, dim], largest codes where channels differ; or null
};

// Floats [n] from finite float16, as which feedback is stored.
void widen(const std::uint16_t* halves, std::size_t n, float* out);

// Writes the codes of `states` as rows of bit streams into `packed`, whose strides are bytes. The
// number of threads does not change codes.
void pack_states(const FloatStates& states, const StateGrid& grid, std::uint8_t* packed,
                 std::size_t batch_stride, std::size_t head_stride, std::size_t token_stride,
                 Pool& pool);

// The floats that the codes of `states` stand for: out [batch, heads, tokens, dim].
void round_states(const FloatStates& states, const StateGrid& grid, float* out, Pool& pool);

// Added to scores; a stride of 0 repeats.
struct ScoreMask {
  const float* values;  // null: nothing is added
  std::size_t batch_stride, head_stride, row_stride;
};

// One call. Each of kv_heads serves heads / kv_heads query heads. Keys have no factors, and values
// no digits.
struct PackedAttention {
  std::size_t batch, heads, kv_heads, rows, context, dim;
  PackedStates keys, values;
  ScoreMask mask;
  float scaling;     // of scores
  float softcap;     // bounds scores; 0: none
  int softmax_bits;  // probabilities are rounded to this many bits on [0, 1]; 16: not
  bool relative;     // what is rounded is their ratio to the largest of a row
};

// queries [batch, heads, rows, dim] -> probabilities [batch, heads, rows, context] and
// out [batch, rows, heads, dim]. The number of threads does not change results.
void attend_packed(const PackedAttention& call, const float* queries, float* probabilities,
                   float* out, Pool& pool);

}  // namespace quantine
