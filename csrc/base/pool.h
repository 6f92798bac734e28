// The threads that kernels divide their work among.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace quantine {

// Threads that wait for work. A token takes some hundred parallel steps of a few microseconds, so
// idle threads look for the next step for a moment before they sleep.
class Pool {
 public:
  // The calling thread is one of `threads`.
  explicit Pool(std::size_t threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  std::size_t threads() const { return workers_.size() + 1; }

  // Calls `task(index)` once for each index below `count`, on any thread; returns when all are
  // done. Each thread begins with indices that follow each other, and helps the others when it has
  // none left. Callers from several threads take turns.
  void run(std::size_t count, const std::function<void(std::size_t)>& task);

 private:
  // Indices that a thread begins with, apart from others in memory.
  struct alignas(64) Part {
    std::atomic<std::size_t> next{0};
    std::size_t end = 0;
  };
  void work(std::size_t thread);
  void take_indices(std::size_t thread);

  std::vector<std::thread> workers_;
  std::mutex callers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  const std::function<void(std::size_t)>* task_ = nullptr;
  std::vector<Part> parts_;  // of each thread, the calling one first
  std::atomic<std::size_t> busy_{0};        // workers that have not finished this step
  std::atomic<std::size_t> generation_{0};  // of steps; workers wait for it to change
  std::atomic<bool> stop_{false};
};

}  // namespace quantine
