// How fast memory gives its words: what the speed of products is measured against.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/pool.h"

namespace quantine {

// Reads `count` words, as fast as memory gives them; returns their sum, so that none is left out.
std::uint64_t read_words(const std::uint64_t* words, std::size_t count, Pool& pool);

}  // namespace quantine
