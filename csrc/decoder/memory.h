// Memory that is zero, and that costs nothing before it is reached.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace quantine {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, FreeMemory>;

// The system maps zero pages when they are first used.
inline Memory zeros(std::size_t bytes) {
  Memory memory(std::calloc(bytes, 1));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace quantine
