// The threads that kernels divide their work among.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace quantine {

// Threads that wait for work. A token takes some hundred parallel steps of a few microseconds, so
// idle threads look for the next step for a moment before they sleep. Processors may be taken by
// other programs, or by threads of PyTorch that look for work themselves: so nobody waits for a
// thread that has not begun, and who has to wait for longer than a moment gives its processor away.
class Pool {
 public:
  // The calling thread is one of `threads`.
  explicit Pool(std::size_t threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  std::size_t threads() const { return waiting_->workers.size() + 1; }

  // Calls `task(index)` once for each index below `count`, on any thread; returns when all are
  // done. Each thread begins with indices that follow each other, and helps the others when it has
  // none left: the calling thread does alone what no other comes to do. Callers from several
  // threads take turns. If a task throws, no more are begun than already are, and the caller gets
  // the first exception once those have ended. In a process that was forked since, the caller does
  // all by itself.
  void run(std::size_t count, const std::function<void(std::size_t)>& task);

  // Of all steps so far that threads shared: their number, and how long callers waited at the end
  // for threads that had not finished.
  std::size_t steps() const { return step_ / kNumber; }
  double waited() const { return std::chrono::duration<double>(waited_.load()).count(); }

 private:
  // Indices that a thread begins with, apart from others in memory.
  struct alignas(64) Part {
    std::atomic<std::size_t> next{0};
    std::size_t end = 0;
  };
  void work(std::size_t thread);
  void wait_for_step(std::uint64_t seen);
  bool join(std::uint64_t& seen);
  void leave();
  void wait_for_workers();
  void take_indices(std::size_t thread);
  void give_up(std::exception_ptr thrown);
  bool forked() const;

  // What a child of the process that made it must not destroy: its threads are not there.
  struct Waiting {
    std::vector<std::thread> workers;
    std::mutex mutex;  // under which who sleeps is woken
    std::condition_variable wake, done;
  };
  std::unique_ptr<Waiting> waiting_ = std::make_unique<Waiting>();
  std::size_t forks_;  // that had led to this process when it was made
  std::mutex callers_;
  const std::function<void(std::size_t)>* task_ = nullptr;
  std::vector<Part> parts_;  // of each thread, the calling one first
  // The number of the step, whether workers may join it, and how many are in it.
  static constexpr std::uint64_t kOpen = 1ull << 32, kWorkers = kOpen - 1, kNumber = 1ull << 33;
  std::atomic<std::uint64_t> step_{0};
  std::atomic<std::chrono::steady_clock::duration> waited_{};
  std::atomic<bool> stop_{false}, failed_{false};
  std::exception_ptr thrown_;  // by the one task that set failed_
  // Whether anyone sleeps.
  std::atomic<std::size_t> sleeping_workers_{0}, sleeping_callers_{0};
};

}  // namespace quantine
