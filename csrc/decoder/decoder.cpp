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

Decoder::Decoder(Model model, std::size_t capacity, std::size_t texts, Arithmetic arithmetic,
                 std::size_t integer_rows, std::shared_ptr<Pool> pool)
    : model_(std::move(model)),
      capacity_(capacity),
      arithmetic_(arithmetic),
      integer_rows_(integer_rows),
      integer_level_(integer_levels().front()),
      pool_(std::move(pool)),
      attention_(model_.heads, capacity, kAttending) {
  check_shapes(model_, capacity_);
  texts_.reserve(texts);
  for (std::size_t text = 0; text < texts; ++text)
    texts_.emplace_back(model_, capacity_, arithmetic_);
  const Heads& heads = model_.heads;
  for (auto* buffer : {&hidden_, &input_, &output_}) buffer->resize(kTokens * width());
  for (auto* buffer : {&q_, &attended_}) buffer->resize(kTokens * heads.heads * heads.dim);
  for (auto* buffer : {&k_, &v_}) buffer->resize(kTokens * heads.kv_heads * heads.dim);
  for (auto* buffer : {&gate_, &up_}) buffer->resize(kTokens * widest_mlp(model_));
}

void Decoder::append(std::size_t text, const std::int64_t* tokens, std::size_t count,
                     float* logits) {
  const std::lock_guard<std::mutex> turn(turn_);
  check(std::vector<std::size_t>(count, text).data(), tokens, count);
  clock_.start();
  std::size_t chunk = 0;
  for (std::size_t done = 0; done < count; done += chunk) {
    chunk = std::min(kTokens, count - done);
    forward(tokens + done, appended(texts_[text], chunk));
  }
  score(hidden_.data() + (chunk - 1) * width(), {{{&texts_[text], 0, 0, 1}}}, logits);
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
    const std::size_t seen = std::min(texts_[0].position + 1, block.scoring.window);
    const auto of_token = [](const auto& cache) { return cache.token_bytes(); };
    bytes[static_cast<std::size_t>(Stage::kAttention)] +=
        seen * std::visit(of_token, texts_[0].caches[index]);
  }
  add(Stage::kHead, {&model_.head});
  return bytes;
}

void Decoder::step(const std::size_t* texts, const std::int64_t* tokens, std::size_t count,
                   float* logits) {
  const std::lock_guard<std::mutex> turn(turn_);
  check(texts, tokens, count);
  clock_.start();
  for (std::size_t done = 0; done < count; done += kTokens) {
    const Pass pass = stepped(texts_, texts + done, std::min(kTokens, count - done));
    forward(tokens + done, pass);
    score(hidden_.data(), pass, logits + done * vocabulary());
  }
}

void Decoder::truncate(std::size_t text, std::size_t position) {
  const std::lock_guard<std::mutex> turn(turn_);
  std::size_t& held = texts_.at(text).position;
  held = std::min(held, position);
}

void Decoder::check(const std::size_t* texts, const std::int64_t* tokens,
                    std::size_t count) const {
  if (count == 0) throw std::invalid_argument("there are no tokens");
  std::vector<std::size_t> more(texts_.size());
  for (std::size_t i = 0; i < count; ++i) {
    if (texts[i] >= texts_.size())
      throw std::invalid_argument("there is no text " + std::to_string(texts[i]));
    if (tokens[i] < 0 || static_cast<std::uint64_t>(tokens[i]) >= vocabulary())
      throw std::invalid_argument("token " + std::to_string(tokens[i]) + " is not below " +
                                  std::to_string(vocabulary()));
    ++more[texts[i]];
  }
  for (std::size_t text = 0; text < texts_.size(); ++text)
    if (more[text] > capacity_ - texts_[text].position)
      throw std::length_error("no room for " + std::to_string(more[text]) + " more tokens: " +
                              std::to_string(texts_[text].position) + " of " +
                              std::to_string(capacity_) + " places are taken");
}

// Leaves the hidden states of these tokens in hidden_, and their keys and values in the caches.
void Decoder::forward(const std::int64_t* tokens, const Pass& pass) {
  const std::size_t count = pass.count();
  embed(tokens, pass);
  for (std::size_t index = 0; index < model_.blocks.size(); ++index) {
    const DecoderBlock& block = model_.blocks[index];
    enter(block.attention_norm, count);
    attend(index, pass);
    if (block.parallel) enter(block.mlp_norm, count);
    join(block.after_attention, count);
    if (!block.parallel) enter(block.mlp_norm, count);
    run_mlp(block, pass);
    join(block.after_mlp, count);
  }
  for (const Stretch& stretch : pass.stretches) stretch.text->position += stretch.count;
}

void Decoder::embed(const std::int64_t* tokens, const Pass& pass) {
  const std::size_t count = pass.count();
  for (std::size_t row = 0; row < count; ++row)
    model_.embedding->decode(static_cast<std::size_t>(tokens[row]), 1,
                             hidden_.data() + row * width(), *pool_);
  if (model_.embedding_factor != 1.0f)
    scale(hidden_.data(), model_.embedding_factor, count * width());
  if (model_.positions != nullptr) {
    for (const Stretch& stretch : pass.stretches)
      model_.positions->decode(model_.position_offset + stretch.position, stretch.count,
                               output_.data() + stretch.row * width(), *pool_);
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

void Decoder::attend(std::size_t index, const Pass& pass) {
  const DecoderBlock& block = model_.blocks[index];
  const std::size_t width = model_.heads.kv_heads * model_.heads.dim;
  apply({{block.q, q_.data()}, {block.k, k_.data()}, {block.v, v_.data()}}, input_.data(), pass);
  clock_.mark(Stage::kQkv);
  rotate_heads(block, pass);
  for (const Stretch& stretch : pass.stretches) {
    AnyCache& cache = stretch.text->caches[index];
    const std::size_t begin = stretch.row * width;
    put(cache, model_.heads, stretch, k_.data() + begin, v_.data() + begin, *pool_);
    clock_.mark(Stage::kCache);
    attend_text(block, cache, stretch);
    clock_.mark(Stage::kAttention);
  }
  apply({{block.o, output_.data()}}, attended_.data(), pass);
  clock_.mark(Stage::kO);
}

void Decoder::attend_text(const DecoderBlock& block, const AnyCache& cache,
                          const Stretch& stretch) {
  const std::size_t width = model_.heads.heads * model_.heads.dim;
  for (std::size_t done = 0; done < stretch.count; done += kAttending) {
    const std::size_t some = std::min(kAttending, stretch.count - done);
    const std::size_t first = stretch.position + done, begin = (stretch.row + done) * width;
    const float* queries = q_.data() + begin;
    float* out = attended_.data() + begin;
    if (const auto* packed = std::get_if<PackedCache>(&cache))
      packed->attend(queries, some, first, block.scoring, out, scratch_, *pool_);
    else
      attention_.run(std::get<Cache>(cache), queries, some, first, block.scoring, out, *pool_);
  }
}

// Turns queries and keys to their positions.
void Decoder::rotate_heads(const DecoderBlock& block, const Pass& pass) {
  const Heads& heads = model_.heads;
  const std::size_t queries = pass.count() * heads.heads * heads.dim;
  const std::size_t keys = pass.count() * heads.kv_heads * heads.dim;
  if (const auto& norm = block.q_norm)
    normalize(*norm, q_.data(), q_.data(), queries / norm->weight.size());
  if (const auto& norm = block.k_norm)
    normalize(*norm, k_.data(), k_.data(), keys / norm->weight.size());
  scale(q_.data(), block.attention_scale, queries);
  if (!block.rotary) return;
  const std::size_t half = block.rotary->half;
  const auto turn = block.rotary->neighbours ? rotate_neighbours : rotate;
  for (const Stretch& stretch : pass.stretches)
    for (std::size_t at = 0; at < stretch.count; ++at) {
      const std::size_t row = stretch.row + at;
      const float* cos = block.rotary->cos.data() + (stretch.position + at) * half;
      const float* sin = block.rotary->sin.data() + (stretch.position + at) * half;
      for (std::size_t head = 0; head < heads.heads; ++head)
        turn(q_.data() + (row * heads.heads + head) * heads.dim, cos, sin, half);
      for (std::size_t head = 0; head < heads.kv_heads; ++head)
        turn(k_.data() + (row * heads.kv_heads + head) * heads.dim, cos, sin, half);
    }
}

void Decoder::run_mlp(const DecoderBlock& block, const Pass& pass) {
  const std::size_t inner = pass.count() * block.up.outputs();
  if (block.gate.matrix == nullptr) {
    apply({{block.up, up_.data()}}, input_.data(), pass);
    clock_.mark(Stage::kUp);
    activate(block.activation, up_.data(), inner);
  } else {
    apply({{block.gate, gate_.data()}, {block.up, up_.data()}}, input_.data(), pass);
    clock_.mark(Stage::kUp);
    activate(block.activation, gate_.data(), inner);
    gate(up_.data(), gate_.data(), inner);
  }
  clock_.mark(Stage::kActivation);
  apply({{block.down, output_.data()}}, up_.data(), pass);
  clock_.mark(Stage::kDown);
}

// Logits [count, vocabulary] after the hidden states of a pass.
void Decoder::score(const float* hidden, const Pass& pass, float* logits) {
  normalize(model_.norm, hidden, input_.data(), pass.count());
  clock_.mark(Stage::kNorms);
  apply({{model_.head, logits}}, input_.data(), pass);
  if (model_.logit_cap > 0.0f) cap(logits, model_.logit_cap, pass.count() * vocabulary());
  clock_.mark(Stage::kHead);
}

// Adds output_ to the residual stream.
void Decoder::join(const std::optional<Norm>& norm, std::size_t count) {
  if (norm) normalize(*norm, output_.data(), output_.data(), count);
  add(hidden_.data(), output_.data(), count * width());
  clock_.mark(Stage::kNorms);
}

void Decoder::apply(std::initializer_list<Application> applications, const float* x,
                    const Pass& pass) {
  const std::size_t count = pass.count();
  const Linear& first = applications.begin()->linear;
  if (first.slice) {
    const std::size_t rows = first.matrix->rows();
    fused_.resize(count * rows);
    multiply_all({{first, fused_.data()}}, x, pass);
    for (const Application& one : applications)
      take(*one.linear.slice, fused_.data(), rows, count, one.y);
  } else {
    multiply_all(applications, x, pass);
  }
  for (const Application& one : applications) {
    const std::size_t outputs = one.linear.bias.size();
    for (std::size_t row = 0; outputs > 0 && row < count; ++row)
      add(one.y + row * outputs, one.linear.bias.data(), outputs);
  }
}

// All rows of the matrices. Those that read the same inputs share one parallel step.
void Decoder::multiply_all(std::initializer_list<Application> applications, const float* x,
                           const Pass& pass) {
  const std::size_t count = pass.count();
  const auto in_integers = [&](const Application& one) {
    return one.linear.integers && pass.together() >= integer_rows_;
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
