// Python bindings of the decoder: its parts, put together in quantine/runtime/decoder.py.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "decoder/decoder.h"

using namespace nb::literals;

namespace {

using quantine::Activation;
using Block = quantine::DecoderBlock;
using quantine::Decoder;
using quantine::Linear;
using quantine::Model;
using quantine::Norm;
using quantine::StateChannels;

using Floats = Vector<const float>;
using Table = Array<const float>;
using Logits = Vector<float>;
using SharedPool = std::shared_ptr<quantine::Pool>;
using SharedRotary = std::shared_ptr<const quantine::Rotary>;
using SharedMatrix = std::shared_ptr<const quantine::Matrix>;
using SharedInputs = std::shared_ptr<const quantine::InputRounding>;
using SharedStates = std::shared_ptr<const quantine::AttentionRounding>;
using SharedBias = std::shared_ptr<const quantine::ScoreBias>;
using Order = Vector<const std::int32_t>;
using Halves = nb::ndarray<const std::int16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

template <typename Numbers>
std::vector<float> copied(const std::optional<Numbers>& array) {
  return array ? std::vector<float>(array->data(), array->data() + array->size())
               : std::vector<float>();
}

Activation activation_named(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  throw nb::value_error("no such activation");
}

void check_bits(int bits) {
  if (bits < 2 || bits > 8) throw nb::value_error("bits must be 2 to 8");
}

void make_linear(Linear* self, SharedMatrix matrix, std::optional<Floats> bias,
                 SharedInputs rounding, std::optional<quantine::InputGrid> integers,
                 std::optional<quantine::Slice> slice) {
  new (self) Linear{std::move(matrix), copied(bias), slice, std::move(rounding),
                    std::move(integers)};
}

// For tests.
void round_rows(const quantine::InputRounding& self, Table x, Array<float> y, SharedPool pool) {
  if (x.shape(1) != self.ends.back() || !has_shape(y, x.shape(0), x.shape(1)))
    throw nb::value_error("x and y must be [batch, channels]");
  quantine::round_inputs(self.grid, self.ends, x.data(), x.shape(0), y.data(), *pool);
}

void make_norm(Norm* self, Floats weight, std::optional<Floats> bias, float eps,
               std::optional<Order> order) {
  new (self) Norm{copied(std::optional(weight)), copied(bias), eps, {}};
  if (order) self->order.assign(order->data(), order->data() + order->size());
}

void make_channels(StateChannels* self, int bits, Table scale, Table zero,
                   std::optional<Halves> feedback) {
  check_bits(bits);
  new (self) StateChannels{bits, copied(std::optional(scale)), copied(std::optional(zero)), {}};
  if (!feedback) return;
  self->feedback.resize(feedback->size());
  quantine::widen(reinterpret_cast<const std::uint16_t*>(feedback->data()), feedback->size(),
                  self->feedback.data());
}

void make_states(quantine::AttentionRounding* self, StateChannels key, StateChannels value,
                 std::optional<StateChannels> query, float scaling, int softmax_bits,
                 bool relative) {
  if (softmax_bits != 16) check_bits(softmax_bits);
  new (self) quantine::AttentionRounding{std::move(key), std::move(value), std::move(query),
                                         scaling,        softmax_bits,     relative};
}

void make_rotary(quantine::Rotary* self, Table cos, Table sin, bool neighbours) {
  if (!has_shape(sin, cos.shape(0), cos.shape(1)))
    throw nb::value_error("cos and sin must be [capacity, half]");
  new (self) quantine::Rotary{copied(std::optional(cos)), copied(std::optional(sin)), cos.shape(1),
                              neighbours};
}

void make_scoring(quantine::Scoring* self, std::optional<std::size_t> window,
                  std::optional<float> cap, SharedBias bias) {
  if (cap && !(*cap > 0.0f)) throw nb::value_error("scores are capped by what is not above 0");
  new (self) quantine::Scoring{window ? *window : static_cast<std::size_t>(-1),
                               cap ? *cap : 0.0f, std::move(bias)};
}

void make_block(Block* self, std::optional<Norm> attention_norm, std::optional<Norm> mlp_norm,
                Linear q, Linear k, Linear v, Linear o, std::optional<Linear> gate, Linear up,
                Linear down, const std::string& activation, SharedRotary rotary,
                float attention_scale, quantine::Scoring scoring, bool parallel,
                std::optional<Norm> q_norm, std::optional<Norm> k_norm,
                std::optional<Norm> after_attention, std::optional<Norm> after_mlp,
                SharedStates states) {
  new (self) Block{std::move(attention_norm),
                   std::move(mlp_norm),
                   std::move(after_attention),
                   std::move(after_mlp),
                   std::move(q_norm),
                   std::move(k_norm),
                   std::move(q),
                   std::move(k),
                   std::move(v),
                   std::move(o),
                   gate ? std::move(*gate) : Linear{},
                   std::move(up),
                   std::move(down),
                   activation_named(activation),
                   std::move(rotary),
                   attention_scale,
                   std::move(scoring),
                   parallel,
                   std::move(states)};
}

void make_decoder(Decoder* self, std::size_t heads, std::size_t kv_heads, std::size_t dim,
                  SharedMatrix embedding, float embedding_factor, SharedMatrix positions,
                  std::size_t position_offset, std::optional<Norm> embedding_norm,
                  std::vector<Block> blocks, Norm norm, Linear head, std::optional<float> logit_cap,
                  std::size_t capacity, std::size_t texts, bool exact, std::size_t integer_rows,
                  SharedPool pool) {
  if (logit_cap && !(*logit_cap > 0.0f))
    throw nb::value_error("logits are capped by what is not above 0");
  Model model{{heads, kv_heads, dim},
              std::move(embedding),
              embedding_factor,
              std::move(positions),
              position_offset,
              std::move(embedding_norm),
              std::move(blocks),
              std::move(norm),
              std::move(head),
              logit_cap ? *logit_cap : 0.0f};
  new (self) Decoder(std::move(model), capacity, texts,
                     exact ? quantine::Arithmetic::kExact : quantine::Arithmetic::kFast,
                     integer_rows, std::move(pool));
}

void append(Decoder& self, std::size_t text, Vector<const std::int64_t> tokens, Logits logits) {
  if (logits.shape(0) != self.vocabulary()) throw nb::value_error("logits must be [vocabulary]");
  nb::gil_scoped_release release;
  self.append(text, tokens.data(), tokens.shape(0), logits.data());
}

void step(Decoder& self, const std::vector<std::size_t>& texts, Vector<const std::int64_t> tokens,
          Array<float> logits) {
  if (tokens.shape(0) != texts.size() || !has_shape(logits, texts.size(), self.vocabulary()))
    throw nb::value_error("tokens must be [texts], and logits [texts, vocabulary]");
  nb::gil_scoped_release release;
  self.step(texts.data(), tokens.data(), texts.size(), logits.data());
}

// Name, seconds and bytes of each stage.
std::vector<std::tuple<std::string, double, std::size_t>> stages(const Decoder& self) {
  std::vector<std::tuple<std::string, double, std::size_t>> found;
  const auto bytes = self.stage_bytes();
  for (std::size_t stage = 0; stage < bytes.size(); ++stage)
    found.emplace_back(quantine::kStageNames[stage], self.clock().seconds(stage), bytes[stage]);
  return found;
}

void activate(const std::string& name, Vector<float> x) {
  quantine::activate(activation_named(name), x.data(), x.shape(0));
}

}  // namespace

void bind_decoder(nb::module_& m) {
  m.def("activate", &activate, "name"_a, "x"_a);
  nb::class_<quantine::InputRounding>(m, "InputRounding")
      .def("__init__",
           [](quantine::InputRounding* self, const quantine::InputGrid& grid,
              std::vector<std::size_t> ends) {
             if (ends.empty()) throw nb::value_error("there are no inputs");
             new (self) quantine::InputRounding{grid, std::move(ends)};
           },
           "grid"_a, "ends"_a)
      .def("round", &round_rows, "x"_a, "y"_a, "pool"_a);
  nb::class_<quantine::Slice>(m, "Slice")
      .def("__init__",
           [](quantine::Slice* self, std::size_t offset, std::size_t length, std::size_t stride,
              std::size_t runs) { new (self) quantine::Slice{offset, length, stride, runs}; },
           "offset"_a, "length"_a, "stride"_a, "runs"_a);
  nb::class_<Linear>(m, "Linear")
      .def("__init__", &make_linear, "matrix"_a, "bias"_a.none(),
           "rounding"_a.none() = nb::none(), "integers"_a.none() = nb::none(),
           "slice"_a.none() = nb::none());
  nb::class_<Norm>(m, "Norm")
      .def("__init__", &make_norm, "weight"_a, "bias"_a.none(), "eps"_a,
           "order"_a.none() = nb::none());
  nb::class_<StateChannels>(m, "StateChannels")
      .def("__init__", &make_channels, "bits"_a, "scale"_a, "zero"_a,
           "feedback"_a.none() = nb::none());
  nb::class_<quantine::AttentionRounding>(m, "AttentionRounding")
      .def("__init__", &make_states, nb::kw_only(), "key"_a, "value"_a, "query"_a.none(),
           "scaling"_a, "softmax_bits"_a, "relative"_a);
  nb::class_<quantine::Rotary>(m, "Rotary")
      .def("__init__", &make_rotary, "cos"_a, "sin"_a, "neighbours"_a);
  nb::class_<quantine::ScoreBias>(m, "ScoreBias")
      .def("__init__",
           [](quantine::ScoreBias* self, Table values) {
             new (self) quantine::ScoreBias{copied(std::optional(values))};
           },
           "values"_a);
  nb::class_<quantine::Scoring>(m, "Scoring")
      .def("__init__", &make_scoring, nb::kw_only(), "window"_a.none(), "cap"_a.none(),
           "bias"_a.none());
  nb::class_<Block>(m, "Block")
      .def("__init__", &make_block, nb::kw_only(), "attention_norm"_a.none(),
           "mlp_norm"_a.none(), "q"_a, "k"_a, "v"_a, "o"_a, "gate"_a.none(), "up"_a, "down"_a,
           "activation"_a, "rotary"_a.none(), "attention_scale"_a, "scoring"_a, "parallel"_a,
           "q_norm"_a.none(), "k_norm"_a.none(), "after_attention"_a.none(), "after_mlp"_a.none(),
           "states"_a.none());
  nb::class_<Decoder>(m, "Decoder")
      .def("__init__", &make_decoder, nb::kw_only(), "heads"_a, "kv_heads"_a, "dim"_a,
           "embedding"_a, "embedding_factor"_a, "positions"_a.none(), "position_offset"_a,
           "embedding_norm"_a.none(), "blocks"_a, "norm"_a, "head"_a, "logit_cap"_a.none(),
           "capacity"_a, "texts"_a, "exact"_a, "integer_rows"_a, "pool"_a)
      .def("append", &append, "text"_a, "tokens"_a, "logits"_a)
      .def("step", &step, "texts"_a, "tokens"_a, "logits"_a)
      .def("truncate", &Decoder::truncate, "text"_a, "position"_a,
           nb::call_guard<nb::gil_scoped_release>())
      .def("position", &Decoder::position, "text"_a)
      .def("time_stages", &Decoder::time_stages, "on"_a)
      .def("stages", &stages)
      .def_prop_ro("texts", &Decoder::texts)
      .def_prop_ro("capacity", &Decoder::capacity)
      .def_prop_ro("vocabulary", &Decoder::vocabulary);
}
