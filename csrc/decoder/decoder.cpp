// How the steps of a model follow each other: embedding, blocks of attention and MLP, and head.
#include "decoder/decoder.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace quantine {
namespace {

constexpr std::size_t kTokens = 64;    // tokens of a prompt that share one pass over the weights
constexpr std::size_t kAttending = 16;  // of them, those that attend at once: each takes memory

void normalize(const Norm& norm, const float* x, float* y, std::size_t count) {
  const std::size_t n = norm.weight.size();
  for (std::size_t row = 0; row < count; ++row) {
    if (norm.bias.empty())
      rms_norm(x + row * n, norm.weight.data(), norm.eps, n, y + row * n);
    else
      layer_norm(x + row * n, norm.weight.data(), norm.bias.data(), norm.eps, n, y + row * n);
  }
}

void need(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("the shape of ") + what + " does not fit");
}

void need_shape(const Linear& linear, std::size_t rows, std::size_t columns, const char* what) {
  need(linear.matrix != nullptr && linear.matrix->rows() == rows &&
           linear.matrix->columns() == columns &&
           (linear.bias.empty() || linear.bias.size() == rows),
       what);
}

void need_shape(const Norm& norm, std::size_t n) {
  need(norm.weight.size() == n && (norm.bias.empty() || norm.bias.size() == n), "a norm");
}

void need_shape(const std::optional<Norm>& norm, std::size_t n) {
  if (norm) need_shape(*norm, n);
}

std::size_t widest_mlp(const Model& model) {
  std::size_t widest = 0;
  for (const DecoderBlock& block : model.blocks)
    widest = std::max(widest, block.up.matrix == nullptr ? 0 : block.up.matrix->rows());
  return widest;
}

}  // namespace

Decoder::Decoder(Model model, std::size_t capacity, Arithmetic arithmetic,
                 std::shared_ptr<Pool> pool)
    : model_(std::move(model)),
      capacity_(capacity),
      arithmetic_(arithmetic),
      pool_(std::move(pool)),
      attention_(model_.heads, capacity, kAttending) {
  check_shapes();
  for (std::size_t block = 0; block < model_.blocks.size(); ++block)
    caches_.emplace_back(model_.heads, capacity, arithmetic_);
  const Heads& heads = model_.heads;
  for (auto* buffer : {&hidden_, &input_, &output_}) buffer->resize(kTokens * width());
  for (auto* buffer : {&q_, &attended_}) buffer->resize(kTokens * heads.heads * heads.dim);
  for (auto* buffer : {&k_, &v_}) buffer->resize(kTokens * heads.kv_heads * heads.dim);
  for (auto* buffer : {&gate_, &up_}) buffer->resize(kTokens * widest_mlp(model_));
}

void Decoder::check_shapes() const {
  need(model_.embedding != nullptr && capacity_ > 0, "the embedding");
  const Heads& heads = model_.heads;
  const std::size_t q = heads.heads * heads.dim, kv = heads.kv_heads * heads.dim;
  need(kv > 0 && q > 0 && heads.heads % heads.kv_heads == 0, "heads");
  const std::size_t angles = capacity_ * heads.dim / 2;
  const auto& positions = model_.positions;
  need(positions == nullptr || (positions->columns() == width() &&
                                positions->rows() >= model_.position_offset + capacity_),
       "the table of positions");
  for (const DecoderBlock& block : model_.blocks) {
    for (const auto* norm : {&block.attention_norm, &block.mlp_norm}) need_shape(*norm, width());
    for (const auto* norm : {&block.after_attention, &block.after_mlp}) need_shape(*norm, width());
    for (const auto* norm : {&block.q_norm, &block.k_norm}) need_shape(*norm, heads.dim);
    need_shape(block.q, q, width(), "q");
    need_shape(block.k, kv, width(), "k");
    need_shape(block.v, kv, width(), "v");
    need_shape(block.o, width(), q, "o");
    need(block.up.matrix != nullptr, "up");
    const std::size_t inner = block.up.matrix->rows();
    need_shape(block.up, inner, width(), "up");
    need_shape(block.down, width(), inner, "down");
    if (block.gate.matrix != nullptr) need_shape(block.gate, inner, width(), "gate");
    need(!block.rotary || (heads.dim % 2 == 0 && block.rotary->cos.size() >= angles &&
                           block.rotary->sin.size() >= angles),
         "cos, sin");
    need(block.window > 0, "the window");
  }
  need_shape(model_.norm, width());
  need_shape(model_.head, vocabulary(), width(), "the head");
}

void Decoder::append(const std::int64_t* tokens, std::size_t count, float* logits) {
  check_tokens(tokens, count);
  std::size_t chunk = 0;
  for (std::size_t done = 0; done < count; done += chunk) {
    chunk = std::min(kTokens, count - done);
    forward(tokens + done, chunk);
  }
  std::copy_n(hidden_.data() + (chunk - 1) * width(), width(), hidden_.data());
  normalize(model_.norm, hidden_.data(), input_.data(), 1);
  apply({{model_.head, logits}}, input_.data(), 1);
}

void Decoder::check_tokens(const std::int64_t* tokens, std::size_t count) const {
  if (count == 0) throw std::invalid_argument("there are no tokens");
  if (count > capacity_ - position_)
    throw std::length_error("no room for " + std::to_string(count) + " more tokens: " +
                            std::to_string(position_) + " of " + std::to_string(capacity_) +
                            " places are taken");
  for (std::size_t i = 0; i < count; ++i)
    if (tokens[i] < 0 || static_cast<std::uint64_t>(tokens[i]) >= vocabulary())
      throw std::invalid_argument("token " + std::to_string(tokens[i]) + " is not below " +
                                  std::to_string(vocabulary()));
}

// Leaves the hidden states of these tokens in hidden_, and their keys and values in the caches.
void Decoder::forward(const std::int64_t* tokens, std::size_t count) {
  embed(tokens, count);
  for (std::size_t index = 0; index < model_.blocks.size(); ++index) {
    attend(model_.blocks[index], caches_[index], count);
    run_mlp(model_.blocks[index], count);
  }
  position_ += count;
}

void Decoder::embed(const std::int64_t* tokens, std::size_t count) {
  for (std::size_t row = 0; row < count; ++row)
    model_.embedding->decode(static_cast<std::size_t>(tokens[row]), 1,
                             hidden_.data() + row * width(), *pool_);
  if (model_.embedding_factor != 1.0f)
    scale(hidden_.data(), model_.embedding_factor, count * width());
  if (model_.positions == nullptr) return;
  model_.positions->decode(model_.position_offset + position_, count, output_.data(), *pool_);
  add(hidden_.data(), output_.data(), count * width());
}

void Decoder::attend(const DecoderBlock& block, Cache& cache, std::size_t count) {
  normalize(block.attention_norm, hidden_.data(), input_.data(), count);
  apply({{block.q, q_.data()}, {block.k, k_.data()}, {block.v, v_.data()}}, input_.data(), count);
  place(block, cache, count);
  const std::size_t width = model_.heads.heads * model_.heads.dim;
  for (std::size_t first = 0; first < count; first += kAttending)
    attention_.run(cache, q_.data() + first * width, std::min(kAttending, count - first),
                   position_ + first, block.window, attended_.data() + first * width, *pool_);
  apply({{block.o, output_.data()}}, attended_.data(), count);
  join(block.after_attention, count);
}

// Turns queries and keys to their positions, and puts keys and values into the cache.
void Decoder::place(const DecoderBlock& block, Cache& cache, std::size_t count) {
  const Heads& heads = model_.heads;
  if (block.q_norm) normalize(*block.q_norm, q_.data(), q_.data(), count * heads.heads);
  if (block.k_norm) normalize(*block.k_norm, k_.data(), k_.data(), count * heads.kv_heads);
  scale(q_.data(), block.attention_scale, count * heads.heads * heads.dim);
  const std::size_t half = heads.dim / 2, kv = heads.kv_heads * heads.dim;
  for (std::size_t row = 0; row < count; ++row) {
    const std::size_t position = position_ + row;
    if (block.rotary) {
      const float* cos = block.rotary->cos.data() + position * half;
      const float* sin = block.rotary->sin.data() + position * half;
      for (std::size_t head = 0; head < heads.heads; ++head)
        rotate(q_.data() + (row * heads.heads + head) * heads.dim, cos, sin, half);
      for (std::size_t head = 0; head < heads.kv_heads; ++head)
        rotate(k_.data() + (row * heads.kv_heads + head) * heads.dim, cos, sin, half);
    }
    cache.put(position, k_.data() + row * kv, v_.data() + row * kv);
  }
}

void Decoder::run_mlp(const DecoderBlock& block, std::size_t count) {
  normalize(block.mlp_norm, hidden_.data(), input_.data(), count);
  const std::size_t inner = count * block.up.matrix->rows();
  if (block.gate.matrix == nullptr) {
    apply({{block.up, up_.data()}}, input_.data(), count);
    activate(block.activation, up_.data(), inner);
  } else {
    apply({{block.gate, gate_.data()}, {block.up, up_.data()}}, input_.data(), count);
    activate(block.activation, gate_.data(), inner);
    gate(up_.data(), gate_.data(), inner);
  }
  apply({{block.down, output_.data()}}, up_.data(), count);
  join(block.after_mlp, count);
}

// Adds output_ to the residual stream.
void Decoder::join(const std::optional<Norm>& norm, std::size_t count) {
  if (norm) normalize(*norm, output_.data(), output_.data(), count);
  add(hidden_.data(), output_.data(), count * width());
}

void Decoder::apply(std::initializer_list<Application> applications, const float* x,
                    std::size_t count) {
  Product products[3] = {};
  std::size_t number = 0;
  for (const Application& one : applications)
    products[number++] = {one.linear.matrix.get(), one.y};
  multiply(products, number, x, count, arithmetic_, *pool_);
  for (const Application& one : applications) {
    const std::size_t rows = one.linear.bias.size();
    for (std::size_t row = 0; rows > 0 && row < count; ++row)
      add(one.y + row * rows, one.linear.bias.data(), rows);
  }
}

}  // namespace quantine
