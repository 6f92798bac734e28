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
  std::vector<float> plain(norm.order.empty() ? 0 : n);
  for (std::size_t row = 0; row < count; ++row) {
    float* normed = plain.empty() ? y + row * n : plain.data();
    if (norm.bias.empty())
      rms_norm(x + row * n, norm.weight.data(), norm.eps, n, normed);
    else
      layer_norm(x + row * n, norm.weight.data(), norm.bias.data(), norm.eps, n, normed);
    for (std::size_t j = 0; j < plain.size(); ++j) y[row * n + j] = plain[norm.order[j]];
  }
}

// The outputs y of a slice, [count, outputs], from those of the matrix, x [count, rows].
void take(const Slice& slice, const float* x, std::size_t rows, std::size_t count, float* y) {
  for (std::size_t row = 0; row < count; ++row, x += rows)
    for (std::size_t run = 0; run < slice.runs; ++run)
      y = std::copy_n(x + slice.offset + run * slice.stride, slice.length, y);
}

}  // namespace

Decoder::Decoder(Model model, std::size_t capacity, Arithmetic arithmetic,
                 std::size_t integer_rows, std::shared_ptr<Pool> pool)
    : model_(std::move(model)),
      capacity_(capacity),
      arithmetic_(arithmetic),
      integer_rows_(integer_rows),
      integer_level_(integer_levels().front()),
      pool_(std::move(pool)),
      attention_(model_.heads, capacity, kAttending) {
  check_shapes(model_, capacity_);
  for (const DecoderBlock& block : model_.blocks) {
    if (block.states)
      caches_.emplace_back(std::in_place_type<PackedCache>, model_.heads, capacity, *block.states);
    else
      caches_.emplace_back(std::in_place_type<Cache>, model_.heads, capacity, arithmetic_);
  }
  const Heads& heads = model_.heads;
  for (auto* buffer : {&hidden_, &input_, &output_}) buffer->resize(kTokens * width());
  for (auto* buffer : {&q_, &attended_}) buffer->resize(kTokens * heads.heads * heads.dim);
  for (auto* buffer : {&k_, &v_}) buffer->resize(kTokens * heads.kv_heads * heads.dim);
  for (auto* buffer : {&gate_, &up_}) buffer->resize(kTokens * widest_mlp(model_));
}

void Decoder::append(const std::int64_t* tokens, std::size_t count, float* logits) {
  check_tokens(tokens, count);
  clock_.start();
  std::size_t chunk = 0;
  for (std::size_t done = 0; done < count; done += chunk) {
    chunk = std::min(kTokens, count - done);
    forward(tokens + done, chunk);
  }
  std::copy_n(hidden_.data() + (chunk - 1) * width(), width(), hidden_.data());
  normalize(model_.norm, hidden_.data(), input_.data(), 1);
  clock_.mark(Stage::kNorms);
  apply({{model_.head, logits}}, input_.data(), 1);
  if (model_.logit_cap > 0.0f) cap(logits, model_.logit_cap, vocabulary());
  clock_.mark(Stage::kHead);
}

std::array<std::size_t, kStageNames.size()> Decoder::stage_bytes() const {
  std::array<std::size_t, kStageNames.size()> bytes = {};
  // Slices of one matrix follow each other.
  const auto add = [&](Stage stage, std::initializer_list<const Linear*> linears) {
    const Matrix* before = nullptr;
    for (const Linear* linear : linears) {
      if (linear->matrix != nullptr && linear->matrix.get() != before)
        bytes[static_cast<std::size_t>(stage)] += linear->matrix->nbytes();
      before = linear->matrix.get();
    }
  };
  for (std::size_t index = 0; index < model_.blocks.size(); ++index) {
    const DecoderBlock& block = model_.blocks[index];
    add(Stage::kQkv, {&block.q, &block.k, &block.v});
    add(Stage::kO, {&block.o});
    add(Stage::kUp, {&block.gate, &block.up});
    add(Stage::kDown, {&block.down});
    const std::size_t seen = std::min(position_ + 1, block.scoring.window);
    const auto of_token = [](const auto& cache) { return cache.token_bytes(); };
    bytes[static_cast<std::size_t>(Stage::kAttention)] +=
        seen * std::visit(of_token, caches_[index]);
  }
  add(Stage::kHead, {&model_.head});
  return bytes;
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
    const DecoderBlock& block = model_.blocks[index];
    enter(block.attention_norm, count);
    attend(block, caches_[index], count);
    if (block.parallel) enter(block.mlp_norm, count);
    join(block.after_attention, count);
    if (!block.parallel) enter(block.mlp_norm, count);
    run_mlp(block, count);
    join(block.after_mlp, count);
  }
  position_ += count;
}

void Decoder::embed(const std::int64_t* tokens, std::size_t count) {
  for (std::size_t row = 0; row < count; ++row)
    model_.embedding->decode(static_cast<std::size_t>(tokens[row]), 1,
                             hidden_.data() + row * width(), *pool_);
  if (model_.embedding_factor != 1.0f)
    scale(hidden_.data(), model_.embedding_factor, count * width());
  if (model_.positions != nullptr) {
    model_.positions->decode(model_.position_offset + position_, count, output_.data(), *pool_);
    add(hidden_.data(), output_.data(), count * width());
  }
  if (model_.embedding_norm)
    normalize(*model_.embedding_norm, hidden_.data(), hidden_.data(), count);
  clock_.mark(Stage::kEmbedding);
}

// Makes the residual stream, or its norm, what matrices read.
void Decoder::enter(const std::optional<Norm>& norm, std::size_t count) {
  if (norm)
    normalize(*norm, hidden_.data(), input_.data(), count);
  else
    std::copy_n(hidden_.data(), count * width(), input_.data());
  clock_.mark(Stage::kNorms);
}

void Decoder::attend(const DecoderBlock& block, AnyCache& cache, std::size_t count) {
  apply({{block.q, q_.data()}, {block.k, k_.data()}, {block.v, v_.data()}}, input_.data(), count);
  clock_.mark(Stage::kQkv);
  rotate_heads(block, count);
  put(cache, count);
  clock_.mark(Stage::kCache);
  const std::size_t width = model_.heads.heads * model_.heads.dim;
  for (std::size_t done = 0; done < count; done += kAttending) {
    const std::size_t some = std::min(kAttending, count - done), first = position_ + done;
    const float* queries = q_.data() + done * width;
    float* out = attended_.data() + done * width;
    if (const auto* packed = std::get_if<PackedCache>(&cache))
      packed->attend(queries, some, first, block.scoring, out, scratch_, *pool_);
    else
      attention_.run(std::get<Cache>(cache), queries, some, first, block.scoring, out, *pool_);
  }
  clock_.mark(Stage::kAttention);
  apply({{block.o, output_.data()}}, attended_.data(), count);
  clock_.mark(Stage::kO);
}

// Turns queries and keys to their positions.
void Decoder::rotate_heads(const DecoderBlock& block, std::size_t count) {
  const Heads& heads = model_.heads;
  const std::size_t queries = count * heads.heads * heads.dim;
  const std::size_t keys = count * heads.kv_heads * heads.dim;
  if (const auto& norm = block.q_norm)
    normalize(*norm, q_.data(), q_.data(), queries / norm->weight.size());
  if (const auto& norm = block.k_norm)
    normalize(*norm, k_.data(), k_.data(), keys / norm->weight.size());
  scale(q_.data(), block.attention_scale, queries);
  if (!block.rotary) return;
  const std::size_t half = block.rotary->half;
  const auto turn = block.rotary->neighbours ? rotate_neighbours : rotate;
  for (std::size_t row = 0; row < count; ++row) {
    const float* cos = block.rotary->cos.data() + (position_ + row) * half;
    const float* sin = block.rotary->sin.data() + (position_ + row) * half;
    for (std::size_t head = 0; head < heads.heads; ++head)
      turn(q_.data() + (row * heads.heads + head) * heads.dim, cos, sin, half);
    for (std::size_t head = 0; head < heads.kv_heads; ++head)
      turn(k_.data() + (row * heads.kv_heads + head) * heads.dim, cos, sin, half);
  }
}

// Puts the new keys and values into the cache.
void Decoder::put(AnyCache& cache, std::size_t count) {
  if (auto* packed = std::get_if<PackedCache>(&cache))
    return packed->put(position_, count, k_.data(), v_.data(), *pool_);
  const std::size_t width = model_.heads.kv_heads * model_.heads.dim;
  for (std::size_t row = 0; row < count; ++row)
    std::get<Cache>(cache).put(position_ + row, k_.data() + row * width, v_.data() + row * width);
}

void Decoder::run_mlp(const DecoderBlock& block, std::size_t count) {
  const std::size_t inner = count * block.up.outputs();
  if (block.gate.matrix == nullptr) {
    apply({{block.up, up_.data()}}, input_.data(), count);
    clock_.mark(Stage::kUp);
    activate(block.activation, up_.data(), inner);
  } else {
    apply({{block.gate, gate_.data()}, {block.up, up_.data()}}, input_.data(), count);
    clock_.mark(Stage::kUp);
    activate(block.activation, gate_.data(), inner);
    gate(up_.data(), gate_.data(), inner);
  }
  clock_.mark(Stage::kActivation);
  apply({{block.down, output_.data()}}, up_.data(), count);
  clock_.mark(Stage::kDown);
}

// Adds output_ to the residual stream.
void Decoder::join(const std::optional<Norm>& norm, std::size_t count) {
  if (norm) normalize(*norm, output_.data(), output_.data(), count);
  add(hidden_.data(), output_.data(), count * width());
  clock_.mark(Stage::kNorms);
}

void Decoder::apply(std::initializer_list<Application> applications, const float* x,
                    std::size_t count) {
  const Linear& first = applications.begin()->linear;
  if (first.slice) {
    const std::size_t rows = first.matrix->rows();
    fused_.resize(count * rows);
    multiply_all({{first, fused_.data()}}, x, count);
    for (const Application& one : applications)
      take(*one.linear.slice, fused_.data(), rows, count, one.y);
  } else {
    multiply_all(applications, x, count);
  }
  for (const Application& one : applications) {
    const std::size_t outputs = one.linear.bias.size();
    for (std::size_t row = 0; outputs > 0 && row < count; ++row)
      add(one.y + row * outputs, one.linear.bias.data(), outputs);
  }
}

// All rows of the matrices. Those that read the same inputs share one parallel step.
void Decoder::multiply_all(std::initializer_list<Application> applications, const float* x,
                           std::size_t count) {
  const auto in_integers = [&](const Application& one) {
    return one.linear.integers && count >= integer_rows_;
  };
  for (const Application* one = applications.begin(); one != applications.end();) {
    const Linear& linear = one->linear;
    if (in_integers(*one)) {
      multiply_integer(*linear.matrix, *linear.integers, x, count, one->y, integer_level_, *pool_);
      ++one;
      continue;
    }
    Product products[3] = {};
    std::size_t number = 0;
    for (; one != applications.end() && one->linear.rounding == linear.rounding &&
           !in_integers(*one);
         ++one)
      products[number++] = {one->linear.matrix.get(), one->y};
    multiply(products, number, rounded(linear.rounding.get(), x, count), count, arithmetic_,
             *pool_);
  }
}

// The inputs `x` as linears with `rounding` multiply them; valid until the next call.
const float* Decoder::rounded(const InputRounding* rounding, const float* x, std::size_t count) {
  if (rounding == nullptr) return x;
  rounded_.resize(count * rounding->ends.back());
  round_inputs(rounding->grid, rounding->ends, x, count, rounded_.data(), *pool_);
  return rounded_.data();
}

}  // namespace quantine
