// How threads of a pool wait for a step, take their share of it, and help each other.
#include "base/pool.h"

#include <algorithm>
#include <chrono>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quantine {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds kMoment(50);  // longer than most pauses between steps
constexpr int kLooks = 16;                        // between two looks at the clock

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Whether `happened()` within a moment.
template <typename Happened>
bool soon(Happened&& happened) {
  const auto end = Clock::now() + kMoment;
  do {
    for (int look = 0; look < kLooks; ++look) {
      if (happened()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return false;
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
  step_ += kNumber + kOpen;
  if (sleeping_workers_ != 0) {
    { const std::lock_guard<std::mutex> lock(mutex_); }  // those about to sleep do so first
    wake_.notify_all();
  }
  take_indices(0);
  step_ -= kOpen;
  wait_for_workers();
}

void Pool::take_indices(std::size_t thread) {
  for (std::size_t other = 0; other < parts_.size(); ++other) {
    Part& part = parts_[(thread + other) % parts_.size()];
    for (std::size_t index = part.next++; index < part.end; index = part.next++) (*task_)(index);
  }
}

void Pool::wait_for_workers() {
  const auto alone = [&] { return (step_ & kWorkers) == 0; };
  if (alone()) return;
  const auto begin = Clock::now();
  if (!soon(alone)) {
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleeping_callers_;
    done_.wait(lock, alone);
    --sleeping_callers_;
  }
  waited_ = waited_.load() + (Clock::now() - begin);  // callers take turns
}

void Pool::work(std::size_t thread) {
  std::uint64_t seen = 0;  // the last step that it was in or came too late for
  while (true) {
    wait_for_step(seen);
    if (stop_) return;
    if (!join(seen)) continue;
    take_indices(thread);
    leave();
  }
}

void Pool::wait_for_step(std::uint64_t seen) {
  const auto called = [&] { return step_ / kNumber != seen || stop_; };
  if (soon(called)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  ++sleeping_workers_;
  wake_.wait(lock, called);
  --sleeping_workers_;
}

bool Pool::join(std::uint64_t& seen) {
  std::uint64_t step = step_;
  while ((step & kOpen) != 0 && !step_.compare_exchange_weak(step, step + 1)) continue;
  seen = step / kNumber;
  return (step & kOpen) != 0;
}

void Pool::leave() {
  const std::uint64_t left = --step_;
  if ((left & (kOpen | kWorkers)) != 0 || sleeping_callers_ == 0) return;
  { const std::lock_guard<std::mutex> lock(mutex_); }  // the caller may be about to sleep
  done_.notify_one();
}

}  // namespace quantine
