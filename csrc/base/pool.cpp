// How threads of a pool wait for a step, take their share of it, and help each other.
#include "base/pool.h"

#include <algorithm>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quantine {
namespace {

constexpr int kSpins = 4000;  // some 50 microseconds

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

Pool::Pool(std::size_t threads) : parts_(std::max<std::size_t>(threads, 1)) {
  try {
    for (std::size_t index = 1; index < threads; ++index)
      workers_.emplace_back([this, index] { work(index); });
  } catch (const std::system_error&) {
    // The system gives no more threads: those that started do all the work.
  }
}

Pool::~Pool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    ++generation_;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run(std::size_t count, const std::function<void(std::size_t)>& task) {
  if (workers_.empty() || count < 2) {
    for (std::size_t index = 0; index < count; ++index) task(index);
    return;
  }
  const std::lock_guard<std::mutex> turn(callers_);
  task_ = &task;
  for (std::size_t part = 0; part < parts_.size(); ++part) {
    parts_[part].next = count * part / parts_.size();
    parts_[part].end = count * (part + 1) / parts_.size();
  }
  busy_ = workers_.size();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++generation_;
  }
  wake_.notify_all();
  take_indices(0);
  for (int spins = 0; busy_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpins) pause();
    else std::this_thread::yield();  // the worker may wait for this very processor
  }
}

void Pool::take_indices(std::size_t thread) {
  for (std::size_t other = 0; other < parts_.size(); ++other) {
    Part& part = parts_[(thread + other) % parts_.size()];
    for (std::size_t index = part.next++; index < part.end; index = part.next++) (*task_)(index);
  }
}

void Pool::work(std::size_t thread) {
  std::size_t seen = 0;
  while (true) {
    int spins = 0;
    while (generation_.load(std::memory_order_acquire) == seen && ++spins < kSpins) pause();
    if (generation_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load() != seen; });
    }
    ++seen;
    if (stop_) return;
    take_indices(thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace quantine
