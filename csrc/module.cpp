// The extension quantine._native: the bindings of every stem.
#include "bindings.h"

NB_MODULE(_native, m) {
  // The pool of threads lives as long as the process: that is no leak.
  nb::set_leak_warnings(false);
  m.doc() = "quantine's native kernels; called through quantine.kernels only.";
  bind_base(m);
  bind_bits(m);
  bind_fit(m);
  bind_columns(m);
  bind_gram(m);
  bind_matrix(m);
  bind_integer(m);
  bind_kv_attention(m);
  bind_decoder(m);
}
