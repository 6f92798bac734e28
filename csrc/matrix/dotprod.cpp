// Compiled for NEON with dot products (FEAT_DotProd); called only where the processor has them.
#include "matrix/neon.h"

namespace quantine {

const Level& dotprod_level() {
  static const Level level = level_of<Neon<ByteDot<SignedHigh>>>("dotprod");
  return level;
}

}  // namespace quantine
