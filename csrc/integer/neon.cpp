// Compiled for NEON alone, which every ARM processor of 64 bits has.
#include "integer/neon.h"

namespace quantine {

const IntegerLevel& integer_neon() {
  static const IntegerLevel level = integer_level_of<WideDot>("neon");
  return level;
}

}  // namespace quantine
