// Compiled for NEON alone, which every ARM processor of 64 bits has.
#include "matrix/neon.h"

namespace quantine {

const Level& neon_level() {
  static const Level level = level_of<Neon<WideDot>>("neon");
  return level;
}

}  // namespace quantine
