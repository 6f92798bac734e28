// The instruction sets for integer products that this machine has.
#include <stdexcept>
#include <string>
#include <vector>

#include "base/arm.h"
#include "integer/codes.h"
#include "integer/integer.h"
#include "integer/level.h"

namespace quantine {
namespace {

std::vector<const IntegerLevel*> found_levels() {
  std::vector<const IntegerLevel*> found;
#if defined(QUANTINE_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
#if defined(QUANTINE_AMX)
    if (allow_integer_tiles()) found.push_back(&integer_amx());
#endif
    found.push_back(&integer_avx512());
  }
#endif
#if defined(QUANTINE_ARM)
  if (has_arm_mixed_dot_product()) found.push_back(&integer_i8mm());
  if (has_arm_dot_product()) found.push_back(&integer_dotprod());
  found.push_back(&integer_neon());
#endif
  found.push_back(&integer_scalar());
  return found;
}

const std::vector<const IntegerLevel*>& all_levels() {
  static const std::vector<const IntegerLevel*> found = found_levels();
  return found;
}

}  // namespace

std::vector<std::string> integer_levels() {
  std::vector<std::string> names;
  for (const IntegerLevel* level : all_levels()) names.push_back(level->name);
  return names;
}

const IntegerLevel& integer_level(const std::string& name) {
  for (const IntegerLevel* level : all_levels())
    if (name == level->name) return *level;
  throw std::invalid_argument("this machine has no level " + name);
}

const IntegerLevel& best_integer_level() { return *all_levels().front(); }

}  // namespace quantine
