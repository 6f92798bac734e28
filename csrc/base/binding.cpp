// Python bindings of what all stems stand on: the pool of threads, and the speed of memory.
#include <cstdint>

#include "base/bandwidth.h"
#include "base/pool.h"
#include "bindings.h"

namespace {

using quantine::Pool;

std::uint64_t read_words(Vector<const std::int64_t> words, Pool& pool) {
  nb::gil_scoped_release release;
  return quantine::read_words(reinterpret_cast<const std::uint64_t*>(words.data()), words.shape(0),
                              pool);
}

}  // namespace

void bind_base(nb::module_& m) {
  nb::class_<Pool>(m, "Pool")
      .def(nb::init<std::size_t>(), nb::arg("threads"))
      .def_prop_ro("threads", &Pool::threads)
      .def_prop_ro("steps", &Pool::steps)
      .def_prop_ro("waited", &Pool::waited);
  m.def("read_words", &read_words, nb::arg("words"), nb::arg("pool"));
}
