// Python bindings of sums of outer products. Where the compiler does not know AMX, all there is to
// say is that no tiles are multiplied.
#include <cstdint>

#include "bindings.h"
#if defined(QUANTINE_AMX)
#include "gram/gram.h"
#endif

namespace {

#if defined(QUANTINE_AMX)
void add_gram(Array<const std::int16_t> x, Array<float> total, quantine::Pool& pool) {
  if (!quantine::multiplies_tiles()) throw nb::value_error("this processor multiplies no tiles");
  if (!has_shape(total, x.shape(1), x.shape(1)))
    throw nb::value_error("total must be [inputs, inputs]");
  nb::gil_scoped_release release;
  quantine::add_gram(reinterpret_cast<const std::uint16_t*>(x.data()), x.shape(0), x.shape(1),
                     total.data(), pool);
}

bool multiplies_tiles() { return quantine::multiplies_tiles(); }
#else
bool multiplies_tiles() { return false; }
#endif

}  // namespace

void bind_gram(nb::module_& m) {
  m.def("multiplies_tiles", &multiplies_tiles);
#if defined(QUANTINE_AMX)
  m.def("add_gram", &add_gram, nb::arg("x"), nb::arg("total"), nb::arg("pool"));
#endif
}
