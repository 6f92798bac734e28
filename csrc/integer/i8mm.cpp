// Compiled for NEON with dot products of mixed signs (FEAT_I8MM); called only where the processor has them.
#include "integer/neon.h"

namespace quantine {

const IntegerLevel& integer_i8mm() {
  static const IntegerLevel level = integer_level_of<MixedDot>("i8mm");
  return level;
}

}  // namespace quantine
