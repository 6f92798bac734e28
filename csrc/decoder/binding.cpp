// Python bindings of the decoder: its parts, put together in quantine/runtime/decoder.py.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
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

using Floats = Vector<const float>;
using Table = Array<const float>;
using Logits = Vector<float>;
using SharedPool = std::shared_ptr<quantine::Pool>;
using SharedRotary = std::shared_ptr<const quantine::Rotary>;
using SharedMatrix = std::shared_ptr<const quantine::Matrix>;

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

void make_linear(Linear* self, SharedMatrix matrix, std::optional<Floats> bias) {
  new (self) Linear{std::move(matrix), copied(bias)};
}

void make_norm(Norm* self, Floats weight, std::optional<Floats> bias, float eps) {
  new (self) Norm{copied(std::optional(weight)), copied(bias), eps};
}

void make_rotary(quantine::Rotary* self, Table cos, Table sin) {
  new (self) quantine::Rotary{copied(std::optional(cos)), copied(std::optional(sin))};
}

void make_block(Block* self, Norm attention_norm, Norm mlp_norm, Linear q, Linear k, Linear v,
                Linear o, std::optional<Linear> gate, Linear up, Linear down,
                const std::string& activation, SharedRotary rotary, float attention_scale,
                std::optional<std::size_t> window, std::optional<Norm> q_norm,
                std::optional<Norm> k_norm, std::optional<Norm> after_attention,
                std::optional<Norm> after_mlp) {
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
                   window ? *window : static_cast<std::size_t>(-1)};
}

void make_decoder(Decoder* self, std::size_t heads, std::size_t kv_heads, std::size_t dim,
                  SharedMatrix embedding, float embedding_factor, SharedMatrix positions,
                  std::size_t position_offset, std::vector<Block> blocks, Norm norm, Linear head,
                  std::size_t capacity, bool exact, SharedPool pool) {
  Model model{{heads, kv_heads, dim},
              std::move(embedding),
              embedding_factor,
              std::move(positions),
              position_offset,
              std::move(blocks),
              std::move(norm),
              std::move(head)};
  new (self) Decoder(std::move(model), capacity,
                     exact ? quantine::Arithmetic::kExact : quantine::Arithmetic::kFast,
                     std::move(pool));
}

void append(Decoder& self, Vector<const std::int64_t> tokens, Logits logits) {
  if (logits.shape(0) != self.vocabulary()) throw nb::value_error("logits must be [vocabulary]");
  nb::gil_scoped_release release;
  self.append(tokens.data(), tokens.shape(0), logits.data());
}

void activate(const std::string& name, Vector<float> x) {
  quantine::activate(activation_named(name), x.data(), x.shape(0));
}

}  // namespace

void bind_decoder(nb::module_& m) {
  m.def("activate", &activate, "name"_a, "x"_a);
  nb::class_<Linear>(m, "Linear").def("__init__", &make_linear, "matrix"_a, "bias"_a.none());
  nb::class_<Norm>(m, "Norm").def("__init__", &make_norm, "weight"_a, "bias"_a.none(), "eps"_a);
  nb::class_<quantine::Rotary>(m, "Rotary").def("__init__", &make_rotary, "cos"_a, "sin"_a);
  nb::class_<Block>(m, "Block")
      .def("__init__", &make_block, nb::kw_only(), "attention_norm"_a, "mlp_norm"_a, "q"_a, "k"_a,
           "v"_a, "o"_a, "gate"_a.none(), "up"_a, "down"_a, "activation"_a, "rotary"_a.none(),
           "attention_scale"_a, "window"_a.none(), "q_norm"_a.none() = nb::none(),
           "k_norm"_a.none() = nb::none(), "after_attention"_a.none() = nb::none(),
           "after_mlp"_a.none() = nb::none());
  nb::class_<Decoder>(m, "Decoder")
      .def("__init__", &make_decoder, nb::kw_only(), "heads"_a, "kv_heads"_a, "dim"_a,
           "embedding"_a, "embedding_factor"_a, "positions"_a.none(), "position_offset"_a,
           "blocks"_a, "norm"_a, "head"_a, "capacity"_a, "exact"_a,
           "pool"_a)
      .def("append", &append, "tokens"_a, "logits"_a)
      .def("reset", &Decoder::reset)
      .def_prop_ro("position", &Decoder::position)
      .def_prop_ro("capacity", &Decoder::capacity)
      .def_prop_ro("vocabulary", &Decoder::vocabulary);
}
