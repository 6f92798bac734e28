// Python bindings of what all stems stand on: the pool of threads, and the speed of memory.
#include <cstddef>
#include <cstdint>
#include <stdexcept>

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

// For tests: `count` tasks, of which those from `first` to `last` fail.
void fail(std::size_t count, std::size_t first, std::size_t last, Pool& pool) {
  nb::gil_scoped_release release;
  pool.run(count, [&](std::size_t index) {
    if (index >= first && index <= last) throw std::runtime_error("a task failed");
  });
}

}  // namespace

void bind_base(nb::module_& m) {
  nb::class_<Pool>(m, "Pool")
      .def(nb::init<std::size_t>(), nb::arg("threads"))
      .def_prop_ro("threads", &Pool::threads)
      .def_prop_ro("steps", &Pool::steps)
      .def_prop_ro("waited", &Pool::waited);
  m.def("read_words", &read_words, nb::arg("words"), nb::arg("pool"));
  m.def("fail", &fail, nb::arg("count"), nb::arg("first"), nb::arg("last"), nb::arg("pool"));
}
