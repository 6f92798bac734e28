// What an ARM processor of 64 bits has beyond NEON, which all of them have.
#pragma once

namespace quantine {

// Sums of products of four bytes (FEAT_DotProd), and those of bytes of which one has a sign and the
// other has none (FEAT_I8MM).
bool has_arm_dot_product();
bool has_arm_mixed_dot_product();

}  // namespace quantine
