// Attention over packed keys and values in three steps that threads share: the scores of spans of
// tokens, the softmax of each row, and mixtures of values.
#include "kv_attention/kv_attention.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "base/lanes.h"
#include "base/vector_math.h"
#include "kv_attention/level.h"
#include "matrix/matrix.h"

namespace quantine {
namespace {

constexpr std::size_t kSpanTokens = 256;  // of one task
constexpr std::size_t kSmall = 65536;     // multiplications that are done before a thread wakes up

const StateLevel& chosen_level() {
#if defined(QUANTINE_X86)
  const std::string name = level();
  if (name == "avx512") return avx512_state_level();
  if (name == "avx2") return avx2_state_level();
#endif
#if defined(QUANTINE_ARM)
  if (level() != "scalar") return neon_state_level();
#endif
  return scalar_state_level();
}

QUANTINE_CLONES
float largest(const float* x, std::size_t n) {
  float best[kSumLanes];
  for (float& lane : best) lane = -std::numeric_limits<float>::infinity();
  std::size_t j = 0;
  for (; j + kSumLanes <= n; j += kSumLanes)
    for (std::size_t r = 0; r < kSumLanes; ++r) best[r] = larger(best[r], x[j + r]);
  for (; j < n; ++j) best[0] = larger(best[0], x[j]);
  for (std::size_t r = 1; r < kSumLanes; ++r) best[0] = larger(best[0], best[r]);
  return best[0];
}

QUANTINE_CLONES
void cap(float* scores, std::size_t n, float bound) {
  for (std::size_t j = 0; j < n; ++j) scores[j] = capped(scores[j], bound);
}

// Values in [0, 1] become whole numbers up to `last`.
QUANTINE_CLONES
void round_to_steps(float* x, std::size_t n, float last) {
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: float32 has no fractions there
  for (std::size_t j = 0; j < n; ++j) x[j] = (x[j] * last + kWhole) - kWhole;
}

QUANTINE_CLONES
void divide(float* x, std::size_t n, float by) {
  for (std::size_t j = 0; j < n; ++j) x[j] = x[j] / by;
}

// Scores become probabilities, rounded unless `bits` are 16; returns their sum.
QUANTINE_CLONES
float normalize(float* scores, std::size_t n, int bits, bool relative) {
  const float top = largest(scores, n), last = static_cast<float>((1 << bits) - 1);
  for (std::size_t j = 0; j < n; ++j) scores[j] = exponential(scores[j] - top);
  if (bits < 16 && relative) round_to_steps(scores, n, last);
  divide(scores, n, sum_of(n, [scores](std::size_t j) { return scores[j]; }));
  if (bits < 16 && !relative) {
    round_to_steps(scores, n, last);
    divide(scores, n, last);
  }
  return sum_of(n, [scores](std::size_t j) { return scores[j]; });
}

// Whole vectors in memory, so that none crosses a line of the processor's cache.
struct alignas(kStateLanes * sizeof(float)) Lanes {
  float lane[kStateLanes];
};

class Run {
 public:
  Run(const PackedAttention& call, float* probabilities)
      : call_(call),
        level_(chosen_level()),
        probabilities_(probabilities),
        key_width_(padded(call.keys.count)),
        width_(padded(call.dim)),
        group_(call.heads / call.kv_heads * call.rows),
        spans_((call.context + kSpanTokens - 1) / kSpanTokens),
        queries_(count() * key_width_ / kStateLanes),
        offsets_(count()),
        totals_(count()),
        partials_(spans_ * count() * width_),
        factors_(call.values.factors ? call.batch * call.kv_heads * call.context : 0),
        weighted_(call.values.factors ? count() * call.context : 0) {}

  std::size_t count() const { return call_.batch * call_.heads * call_.rows; }
  std::size_t tasks() const { return call_.batch * call_.kv_heads * spans_; }

  // Queries take the scales of keys; what zero points take off is the same for all tokens. For
  // digits, they take what these are worth, too.
  void prepare(const float* queries) {
    std::vector<float> channels(call_.dim);
    for (std::size_t index = 0; index < count(); ++index) {
      const std::size_t head = index / group_ % call_.kv_heads;
      const float* x = queries + index * call_.dim;
      const float* scale = call_.keys.scale + head * call_.dim;
      const float* zero = call_.keys.zero + head * call_.dim;
      float* scaled = call_.keys.place == nullptr ? query(index) : channels.data();
      for (std::size_t d = 0; d < call_.dim; ++d) scaled[d] = x[d] * call_.scaling * scale[d];
      offsets_[index] = sum_of(call_.dim, [=](std::size_t d) { return scaled[d] * zero[d]; });
      if (call_.keys.place == nullptr) continue;
      const std::int64_t* place = call_.keys.place + head * call_.keys.count;
      const float* weight = call_.keys.weight + head * call_.keys.count;
      float* of_digits = query(index);
      for (std::size_t j = 0; j < call_.keys.count; ++j)
        of_digits[j] = scaled[place[j]] * weight[j];
    }
  }

  void score(std::size_t task) {
    std::vector<std::uint8_t> copy;
    const StateRows rows = rows_of(call_.keys, task, key_width_, copy);
    const std::size_t from = first_query(task);
    for (std::size_t q = from; q < from + group_; q += kStateQueries)
      level_.score(rows, query(q), offsets_.data() + q,
                   std::min(kStateQueries, from + group_ - q),
                   probabilities_ + q * call_.context + first_token(task), call_.context);
    if (call_.values.factors) read_factors(task);
  }

  void normalize_row(std::size_t index) {
    float* scores = probabilities_ + index * call_.context;
    const std::size_t n = call_.context;
    if (call_.softcap != 0.0f) cap(scores, n, call_.softcap);
    if (call_.mask.values != nullptr) {
      const std::size_t row = index % call_.rows, head = index / call_.rows % call_.heads;
      const std::size_t batch = index / call_.rows / call_.heads;
      const float* mask = call_.mask.values + batch * call_.mask.batch_stride +
                          head * call_.mask.head_stride + row * call_.mask.row_stride;
      for (std::size_t j = 0; j < n; ++j) scores[j] += mask[j];
    }
    totals_[index] = normalize(scores, n, call_.softmax_bits, call_.relative);
    if (!call_.values.factors) return;
    const float* factor = factors_.data() + index / group_ * n;
    float* weights = weighted_.data() + index * n;
    for (std::size_t j = 0; j < n; ++j) weights[j] = scores[j] * factor[j];
    totals_[index] = sum_of(n, [weights](std::size_t j) { return weights[j]; });
  }

  void mix(std::size_t task) {
    std::vector<std::uint8_t> copy;
    const StateRows rows = rows_of(call_.values, task, width_, copy);
    const std::size_t from = first_query(task);
    const float* weights = call_.values.factors ? weighted_.data() : probabilities_;
    for (std::size_t q = from; q < from + group_; q += kStateQueries)
      level_.mix(rows, weights + q * call_.context + first_token(task), call_.context,
                 std::min(kStateQueries, from + group_ - q), partial(task % spans_, q));
  }

  // Spans in order, then the scales and zero points of values.
  void merge(float* out) {
    for (std::size_t index = 0; index < count(); ++index) {
      float* sums = partial(0, index);
      for (std::size_t span = 1; span < spans_; ++span) {
        const float* part = partial(span, index);
        for (std::size_t d = 0; d < call_.dim; ++d) sums[d] += part[d];
      }
      const std::size_t kv_head = index / group_ % call_.kv_heads;
      const float* scale = call_.values.scale + kv_head * call_.dim;
      const float* zero = call_.values.zero + kv_head * call_.dim;
      const std::size_t row = index % call_.rows, head = index / call_.rows % call_.heads;
      const std::size_t batch = index / call_.rows / call_.heads;
      float* to = out + ((batch * call_.rows + row) * call_.heads + head) * call_.dim;
      for (std::size_t d = 0; d < call_.dim; ++d)
        to[d] = scale[d] * (sums[d] - zero[d] * totals_[index]);
    }
  }

 private:
  std::size_t first_token(std::size_t task) const { return task % spans_ * kSpanTokens; }
  std::size_t first_query(std::size_t task) const { return task / spans_ * group_; }
  float* query(std::size_t index) { return queries_[index * key_width_ / kStateLanes].lane; }
  float* partial(std::size_t span, std::size_t query) {
    return partials_.data() + (span * count() + query) * width_;
  }

  static std::size_t padded(std::size_t n) {
    return (n + kStateLanes - 1) / kStateLanes * kStateLanes;
  }

  std::size_t at(const PackedStates& states, std::size_t task) const {
    const std::size_t head = task / spans_;
    return head / call_.kv_heads * states.batch_stride +
           head % call_.kv_heads * states.head_stride + first_token(task) * states.token_stride;
  }

  // The factors of the tokens of a span, which are the last bytes of their rows.
  void read_factors(std::size_t task) {
    const PackedStates& values = call_.values;
    const std::size_t first = first_token(task);
    const std::size_t tokens = std::min(kSpanTokens, call_.context - first);
    const std::uint8_t* tail = values.codes + at(values, task) + bytes_of(values);
    std::vector<std::uint16_t> halves(tokens);
    for (std::size_t j = 0; j < tokens; ++j)
      std::memcpy(&halves[j], tail + j * values.token_stride, sizeof(std::uint16_t));
    widen(halves.data(), tokens, factors_.data() + task / spans_ * call_.context + first);
  }

  static std::size_t bytes_of(const PackedStates& states) {
    return (states.count * static_cast<std::size_t>(states.bits) + 7) / 8;
  }

  // Kernels read whole vectors: a span at the very end of memory is copied first.
  StateRows rows_of(const PackedStates& states, std::size_t task, std::size_t width,
                    std::vector<std::uint8_t>& copy) const {
    const std::size_t tokens = std::min(kSpanTokens, call_.context - first_token(task));
    const auto bits = static_cast<std::size_t>(states.bits);
    const std::size_t from = at(states, task), last = (tokens - 1) * states.token_stride;
    StateRows rows{states.codes + from, states.token_stride, tokens, width, states.bits};
    if (from + last + width * bits / 8 + kStateOverread > states.extent) {
      copy.assign(last + width * bits / 8 + kStateOverread, 0);
      std::memcpy(copy.data(), rows.codes, last + bytes_of(states));
      rows.codes = copy.data();
    }
    return rows;
  }

  const PackedAttention& call_;
  const StateLevel& level_;
  float* probabilities_;
  std::size_t key_width_, width_;
  std::size_t group_, spans_;  // group_: queries that share a head of keys and values
  std::vector<Lanes> queries_;
  std::vector<float> offsets_, totals_, partials_;
  std::vector<float> factors_;   // [batch, kv_heads, context]; empty without
  std::vector<float> weighted_;  // probabilities times factors
};

}  // namespace

void attend_packed(const PackedAttention& call, const float* queries, float* probabilities,
                   float* out, Pool& pool) {
  Run run(call, probabilities);
  const bool alone = run.count() * call.context * call.dim <= kSmall;
  const auto each = [&](std::size_t count, const std::function<void(std::size_t)>& task) {
    if (!alone) return pool.run(count, task);
    for (std::size_t index = 0; index < count; ++index) task(index);
  };
  run.prepare(queries);
  each(run.tasks(), [&](std::size_t task) { run.score(task); });
  each(run.count(), [&](std::size_t index) { run.normalize_row(index); });
  each(run.tasks(), [&](std::size_t task) { run.mix(task); });
  run.merge(out);
}

}  // namespace quantine
