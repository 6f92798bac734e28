// Compiled for NEON with dot products (FEAT_DotProd); called only where the processor has them.
#include "integer/neon.h"

namespace quantine {

const IntegerLevel& integer_dotprod() {
  static const IntegerLevel level = integer_level_of<PlainDot>("dotprod");
  return level;
}

}  // namespace quantine
