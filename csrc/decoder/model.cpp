// Checks of shapes: everything after them may trust in them.
#include "decoder/model.h"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace quantine {
namespace {

void need(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("the shape of ") + what + " does not fit");
}

bool has_shape(const InputRounding& rounding, std::size_t columns) {
  const std::vector<std::size_t>& ends = rounding.ends;
  return !ends.empty() && ends.back() == columns && std::is_sorted(ends.begin(), ends.end()) &&
         ends.size() == std::max<std::size_t>(1, rounding.grid.scale.size());
}

bool has_shape(const InputGrid& grid, const Weights& w) {
  return w.bits <= 8 && w.group_rows == 0 &&
         (grid.scale.empty() || grid.scale.size() == w.groups);
}

bool has_shape(const StateChannels& channels, std::size_t heads, std::size_t dim) {
  return channels.scale.size() == heads * dim && channels.zero.size() == heads * dim &&
         (channels.feedback.empty() || channels.feedback.size() == heads * dim * dim);
}

void need_shape(const AttentionRounding& rounding, const Heads& heads) {
  need(has_shape(rounding.key, heads.kv_heads, heads.dim) &&
           has_shape(rounding.value, heads.kv_heads, heads.dim) &&
           (!rounding.query || has_shape(*rounding.query, heads.heads, heads.dim)),
       "the grids of queries, keys and values");
}

bool has_shape(const Slice& slice, std::size_t rows) {
  if (slice.runs == 0 || slice.offset + slice.length > rows) return false;
  const std::size_t left = rows - slice.offset - slice.length;
  return slice.runs - 1 <= left / std::max<std::size_t>(1, slice.stride);
}

void need_shape(const Linear& linear, std::size_t rows, std::size_t columns, const char* what) {
  need(linear.matrix != nullptr && linear.matrix->columns() == columns &&
           (!linear.slice || has_shape(*linear.slice, linear.matrix->rows())) &&
           linear.outputs() == rows &&
           (linear.bias.empty() || linear.bias.size() == rows) &&
           (linear.rounding == nullptr || has_shape(*linear.rounding, columns)) &&
           (!linear.integers || has_shape(*linear.integers, linear.matrix->weights())),
       what);
}

// All are slices of the first one's matrix, or none is a slice.
void need_together(std::initializer_list<const Linear*> linears, const char* what) {
  const Linear& first = **linears.begin();
  for (const Linear* one : linears)
    need(one->slice.has_value() == first.slice.has_value() &&
             (!one->slice || one->matrix == first.matrix),
         what);
}

void need_shape(const Norm& norm, std::size_t n) {
  need(norm.weight.size() == n && (norm.bias.empty() || norm.bias.size() == n) &&
           (norm.order.empty() || norm.order.size() == n) &&
           std::all_of(norm.order.begin(), norm.order.end(),
                       [n](std::uint32_t channel) { return channel < n; }),
       "a norm");
}

void need_shape(const std::optional<Norm>& norm, std::size_t n) {
  if (norm) need_shape(*norm, n);
}

// Of each head, or of all at once.
void need_head_shape(const std::optional<Norm>& norm, std::size_t heads, std::size_t dim) {
  if (norm) need_shape(*norm, norm->weight.size() == dim ? dim : heads * dim);
}

void need_shape(const Scoring& scoring, const Heads& heads, std::size_t capacity) {
  need(scoring.window > 0, "the window");
  need(scoring.bias == nullptr || scoring.bias->values.size() == heads.heads * capacity,
       "what is added to scores");
}

void need_shape(const Rotary& rotary, const Heads& heads, std::size_t capacity) {
  const std::size_t angles = capacity * rotary.half;
  need(rotary.half > 0 && 2 * rotary.half <= heads.dim && rotary.cos.size() >= angles &&
           rotary.sin.size() >= angles,
       "cos, sin");
}

}  // namespace

void check_shapes(const Model& model, std::size_t capacity) {
  need(model.embedding != nullptr && capacity > 0, "the embedding");
  const Heads& heads = model.heads;
  const std::size_t width = model.embedding->columns();
  const std::size_t q = heads.heads * heads.dim, kv = heads.kv_heads * heads.dim;
  need(kv > 0 && q > 0 && heads.heads % heads.kv_heads == 0, "heads");
  const auto& positions = model.positions;
  need(positions == nullptr || (positions->columns() == width &&
                                positions->rows() >= model.position_offset + capacity),
       "the table of positions");
  need_shape(model.embedding_norm, width);
  for (const DecoderBlock& block : model.blocks) {
    for (const auto* norm : {&block.attention_norm, &block.mlp_norm, &block.after_attention,
                             &block.after_mlp})
      need_shape(*norm, width);
    need_head_shape(block.q_norm, heads.heads, heads.dim);
    need_head_shape(block.k_norm, heads.kv_heads, heads.dim);
    need_shape(block.q, q, width, "q");
    need_shape(block.k, kv, width, "k");
    need_shape(block.v, kv, width, "v");
    need_together({&block.q, &block.k, &block.v}, "q, k and v");
    need_shape(block.o, width, q, "o");
    need(block.up.matrix != nullptr, "up");
    const std::size_t inner = block.up.outputs();
    need_shape(block.up, inner, width, "up");
    need_shape(block.down, width, inner, "down");
    if (block.gate.matrix != nullptr) {
      need_shape(block.gate, inner, width, "gate");
      need_together({&block.gate, &block.up}, "gate and up");
    }
    if (block.rotary) need_shape(*block.rotary, heads, capacity);
    need_shape(block.scoring, heads, capacity);
    if (block.states) {
      need_shape(*block.states, heads);
      need(block.scoring.bias == nullptr, "what is added to scores of rounded keys");
    }
  }
  need_shape(model.norm, width);
  need_shape(model.head, model.embedding->rows(), width, "the head");
}

std::size_t widest_mlp(const Model& model) {
  std::size_t widest = 0;
  for (const DecoderBlock& block : model.blocks)
    widest = std::max(widest, block.up.matrix == nullptr ? 0 : block.up.outputs());
  return widest;
}

}  // namespace quantine
