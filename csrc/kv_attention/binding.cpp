// Python bindings of attention over packed codes: check shapes, then call.
#include <nanobind/stl/optional.h>

#include <optional>
#include <vector>

#include "bindings.h"
#include "bits/bits.h"
#include "kv_attention/kv_attention.h"

namespace {

using Floats4 = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using ConstFloats4 = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using ConstHalves3 = nb::ndarray<const std::int16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Codes4 = nb::ndarray<const std::uint8_t, nb::ndim<4>, nb::device::cpu>;
using Channels = Array<const float>;

using Places = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr std::size_t kFactorBytes = 2;

quantine::PackedStates states(const Codes4& codes, int bits, const Channels& scale,
                              const Channels& zero, std::size_t dim, std::size_t count,
                              bool factors) {
  if (bits < 2 || bits > 8) throw nb::value_error("bits must be 2 to 8");
  const std::size_t row = quantine::packed_bytes(count, bits) + (factors ? kFactorBytes : 0);
  if (codes.shape(3) != row || (codes.shape(3) > 1 && codes.stride(3) != 1))
    throw nb::value_error("rows of codes must be bit streams of as many codes as queries have");
  for (std::size_t axis = 0; axis < 3; ++axis)
    if (codes.stride(axis) < 0) throw nb::value_error("codes must not run backwards");
  if (!has_shape(scale, codes.shape(1), dim) || !has_shape(zero, codes.shape(1), dim))
    throw nb::value_error("scale and zero must be [kv_heads, dim]");
  const auto stride = [&](std::size_t axis) {
    return static_cast<std::size_t>(codes.stride(axis));
  };
  std::size_t extent = codes.shape(3);
  for (std::size_t axis = 0; axis < 3; ++axis) extent += (codes.shape(axis) - 1) * stride(axis);
  return {codes.data(), stride(0),    stride(1), stride(2), extent, bits,
          scale.data(), zero.data(), count,     nullptr,   nullptr, factors};
}

// Keys whose codes are cut into digits: of which channel each is, and what it is worth in the code.
quantine::PackedStates digits(const Codes4& codes, const Channels& scale, const Channels& zero,
                              std::size_t dim, int bits, const Places& place,
                              const Channels& weight) {
  const std::size_t count = place.shape(1);
  if (place.shape(0) != codes.shape(1) || !has_shape(weight, place.shape(0), count))
    throw nb::value_error("place and weight must be [kv_heads, digits]");
  for (std::size_t index = 0; index < place.size(); ++index)
    if (place.data()[index] < 0 || place.data()[index] >= static_cast<std::int64_t>(dim))
      throw nb::value_error("digits must be of channels that there are");
  quantine::PackedStates found = states(codes, bits, scale, zero, dim, count, false);
  found.place = place.data();
  found.weight = weight.data();
  return found;
}

void pack_states(nb::ndarray<const float, nb::ndim<4>, nb::device::cpu> states, Channels scale,
                 Channels zero, std::optional<ConstHalves3> feedback, int bits,
                 nb::ndarray<std::uint8_t, nb::ndim<4>, nb::device::cpu> packed,
                 std::optional<Channels> tops, quantine::Pool& pool) {
  if (bits < 2 || bits > 8) throw nb::value_error("bits must be 2 to 8");
  const std::size_t heads = states.shape(1), dim = states.shape(3);
  for (std::size_t axis = 0; axis < 4; ++axis)
    if (states.stride(axis) < 0 || packed.stride(axis) < 0)
      throw nb::value_error("nothing may run backwards");
  if (packed.shape(0) != states.shape(0) || packed.shape(1) != heads ||
      packed.shape(2) != states.shape(2) || packed.shape(3) != quantine::packed_bytes(dim, bits) ||
      (packed.shape(3) > 1 && packed.stride(3) != 1) || (dim > 1 && states.stride(3) != 1))
    throw nb::value_error("packed must be [batch, heads, tokens, packed_bytes(dim, bits)]");
  if (!has_shape(scale, heads, dim) || !has_shape(zero, heads, dim))
    throw nb::value_error("scale and zero must be [heads, dim]");
  if (feedback && (feedback->shape(0) != heads || feedback->shape(1) != dim ||
                   feedback->shape(2) != dim))
    throw nb::value_error("feedback must be [heads, dim, dim]");
  if (tops) {
    if (!has_shape(*tops, heads, dim)) throw nb::value_error("tops must be [heads, dim]");
    for (std::size_t index = 0; index < heads * dim; ++index)
      if (!(tops->data()[index] >= 0 && tops->data()[index] < static_cast<float>(1 << bits)))
        throw nb::value_error("tops must be codes of `bits` bits");
  }
  const auto stride = [](const auto& array, std::size_t axis) {
    return static_cast<std::size_t>(array.stride(axis));
  };
  const quantine::FloatStates floats{states.data(),     states.shape(0),   heads,
                                     states.shape(2),   dim,               stride(states, 0),
                                     stride(states, 1), stride(states, 2)};
  nb::gil_scoped_release release;
  std::vector<float> widened(feedback ? feedback->size() : 0);
  if (feedback)
    quantine::widen(reinterpret_cast<const std::uint16_t*>(feedback->data()), widened.size(),
                    widened.data());
  const float* rows = feedback ? widened.data() : nullptr;
  const quantine::StateGrid grid{bits, scale.data(), zero.data(), rows,
                                 tops ? tops->data() : nullptr};
  quantine::pack_states(floats, grid, packed.data(), stride(packed, 0), stride(packed, 1),
                        stride(packed, 2), pool);
}

// A mask whose first three axes are those of the call, or 1.
quantine::ScoreMask mask_of(const std::optional<ConstFloats4>& mask, std::size_t batch,
                            std::size_t heads, std::size_t rows, std::size_t context) {
  if (!mask) return {nullptr, 0, 0, 0};
  const std::size_t wanted[3] = {batch, heads, rows};
  std::size_t strides[3], stride = context;
  for (std::size_t axis = 3; axis-- > 0; stride *= mask->shape(axis)) {
    if (mask->shape(axis) != 1 && mask->shape(axis) != wanted[axis])
      throw nb::value_error("mask must be [batch or 1, heads or 1, rows or 1, context]");
    strides[axis] = mask->shape(axis) == 1 ? 0 : stride;
  }
  if (mask->shape(3) != context) throw nb::value_error("mask must be as long as the context");
  return {mask->data(), strides[0], strides[1], strides[2]};
}

void attend_packed(ConstFloats4 queries, Codes4 keys, int key_bits, Channels key_scale,
                   Channels key_zero, std::optional<Places> key_place,
                   std::optional<Channels> key_weight, Codes4 values, int value_bits,
                   Channels value_scale, Channels value_zero, bool value_factors,
                   std::optional<ConstFloats4> mask, float scaling, float softcap,
                   int softmax_bits, bool relative, Floats4 probabilities, Floats4 out,
                   quantine::Pool& pool) {
  const std::size_t batch = queries.shape(0), heads = queries.shape(1), rows = queries.shape(2);
  const std::size_t dim = queries.shape(3), kv_heads = keys.shape(1), context = keys.shape(2);
  if (queries.size() == 0 || keys.size() == 0) throw nb::value_error("nothing may be empty");
  if (keys.shape(0) != batch || heads % kv_heads != 0 || values.shape(0) != batch ||
      values.shape(1) != kv_heads || values.shape(2) != context)
    throw nb::value_error("keys and values must be [batch, kv_heads, context, bytes], and kv_heads "
                          "must divide heads");
  if (softmax_bits != 16 && (softmax_bits < 2 || softmax_bits > 8))
    throw nb::value_error("softmax_bits must be 2 to 8, or 16");
  if (probabilities.shape(0) != batch || probabilities.shape(1) != heads ||
      probabilities.shape(2) != rows || probabilities.shape(3) != context ||
      out.shape(0) != batch || out.shape(1) != rows || out.shape(2) != heads || out.shape(3) != dim)
    throw nb::value_error("probabilities must be [batch, heads, rows, context], out [batch, rows, "
                          "heads, dim]");
  if (key_place.has_value() != key_weight.has_value())
    throw nb::value_error("place and weight go together");
  const quantine::PackedStates packed_keys =
      key_place ? digits(keys, key_scale, key_zero, dim, key_bits, *key_place, *key_weight)
                : states(keys, key_bits, key_scale, key_zero, dim, dim, false);
  const quantine::PackedStates packed_values =
      states(values, value_bits, value_scale, value_zero, dim, dim, value_factors);
  const quantine::PackedAttention call{batch,
                                       heads,
                                       kv_heads,
                                       rows,
                                       context,
                                       dim,
                                       packed_keys,
                                       packed_values,
                                       mask_of(mask, batch, heads, rows, context),
                                       scaling,
                                       softcap,
                                       softmax_bits,
                                       relative};
  nb::gil_scoped_release release;
  quantine::attend_packed(call, queries.data(), probabilities.data(), out.data(), pool);
}

}  // namespace

void bind_kv_attention(nb::module_& m) {
  m.def("pack_states", &pack_states, nb::arg("states"), nb::arg("scale"), nb::arg("zero"),
        nb::arg("feedback").none(), nb::arg("bits"), nb::arg("packed"),
        nb::arg("tops").none(), nb::arg("pool"));
  m.def("attend_packed", &attend_packed, nb::arg("queries"), nb::arg("keys"), nb::arg("key_bits"),
        nb::arg("key_scale"), nb::arg("key_zero"), nb::arg("key_place").none(),
        nb::arg("key_weight").none(), nb::arg("values"), nb::arg("value_bits"),
        nb::arg("value_scale"), nb::arg("value_zero"), nb::arg("value_factors"),
        nb::arg("mask").none(), nb::arg("scaling"),
        nb::arg("softcap"), nb::arg("softmax_bits"), nb::arg("relative"), nb::arg("probabilities"),
        nb::arg("out"), nb::arg("pool"));
}
