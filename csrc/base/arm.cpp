// Linux and macOS are asked in their own ways; elsewhere nothing beyond NEON is used.
#include "base/arm.h"

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace quantine {

#if defined(__linux__)
// Bits of the kernel's answer; headers of older systems do not name them.
bool has_arm_dot_product() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }
bool has_arm_mixed_dot_product() {
  return has_arm_dot_product() && (getauxval(AT_HWCAP2) >> 13 & 1) != 0;
}
#elif defined(__APPLE__)
namespace {
bool has(const char* feature) {
  int found = 0;
  std::size_t size = sizeof found;
  return sysctlbyname(feature, &found, &size, nullptr, 0) == 0 && found != 0;
}
}  // namespace
bool has_arm_dot_product() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_arm_mixed_dot_product() {
  return has_arm_dot_product() && has("hw.optional.arm.FEAT_I8MM");
}
#else
bool has_arm_dot_product() { return false; }
bool has_arm_mixed_dot_product() { return false; }
#endif

}  // namespace quantine
