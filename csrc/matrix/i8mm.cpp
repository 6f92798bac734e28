// Compiled for NEON with dot products of mixed signs (FEAT_I8MM); called only where the processor has them.
#include "matrix/neon.h"

namespace quantine {

const Level& i8mm_level() {
  static const Level level = level_of<Neon<ByteDot<MixedHigh>>>("i8mm");
  return level;
}

}  // namespace quantine
