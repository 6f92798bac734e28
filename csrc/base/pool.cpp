// How threads of a pool wait for a step, take their share of it, and help each other.
#include "base/pool.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <system_error>
#include <utility>

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

// How often this process, and those it comes from, were forked since this was first asked.
std::size_t forks() {
  static std::atomic<std::size_t> count{0};
  static const int registered = pthread_atfork(nullptr, nullptr, [] { ++count; });
  static_cast<void>(registered);
  return count;
}

}  // namespace

Pool::Pool(std::size_t threads) : forks_(forks()), parts_(std::max<std::size_t>(threads, 1)) {
  try {
    for (std::size_t index = 1; index < threads; ++index)
      waiting_->workers.emplace_back([this, index] { work(index); });
  } catch (const std::system_error&) {
    // The system gives no more threads: those that started do all the work.
  }
}

Pool::~Pool() {
  if (forked()) {
    static_cast<void>(waiting_.release());  // destroying it would wait for threads for ever
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(waiting_->mutex);
    stop_ = true;
  }
  waiting_->wake.notify_all();
  for (std::thread& worker : waiting_->workers) worker.join();
}

bool Pool::forked() const { return forks() != forks_; }

void Pool::run(std::size_t count, const std::function<void(std::size_t)>& task) {
  if (waiting_->workers.empty() || count < 2 || forked()) {
    for (std::size_t index = 0; index < count; ++index) task(index);
    return;
  }
  const std::lock_guard<std::mutex> turn(callers_);
  task_ = &task;
  failed_ = false;
  for (std::size_t part = 0; part < parts_.size(); ++part) {
    parts_[part].next = count * part / parts_.size();
    parts_[part].end = count * (part + 1) / parts_.size();
  }
  step_ += kNumber + kOpen;
  if (sleeping_workers_ != 0) {
    { const std::lock_guard<std::mutex> lock(waiting_->mutex); }  // who is about to sleep does
    waiting_->wake.notify_all();
  }
  take_indices(0);
  step_ -= kOpen;
  wait_for_workers();
  if (failed_) std::rethrow_exception(std::exchange(thrown_, nullptr));
}

void Pool::take_indices(std::size_t thread) {
  try {
    for (std::size_t other = 0; other < parts_.size(); ++other) {
      Part& part = parts_[(thread + other) % parts_.size()];
      for (std::size_t index = part.next++; index < part.end; index = part.next++) (*task_)(index);
    }
  } catch (...) {
    give_up(std::current_exception());
  }
}

void Pool::give_up(std::exception_ptr thrown) {
  if (!failed_.exchange(true)) thrown_ = std::move(thrown);
  for (Part& part : parts_) part.next = part.end;
}

void Pool::wait_for_workers() {
  const auto alone = [&] { return (step_ & kWorkers) == 0; };
  if (alone()) return;
  const auto begin = Clock::now();
  if (!soon(alone)) {
    std::unique_lock<std::mutex> lock(waiting_->mutex);
    ++sleeping_callers_;
    waiting_->done.wait(lock, alone);
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
  std::unique_lock<std::mutex> lock(waiting_->mutex);
  ++sleeping_workers_;
  waiting_->wake.wait(lock, called);
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
  { const std::lock_guard<std::mutex> lock(waiting_->mutex); }  // the caller may be about to sleep
  waiting_->done.notify_one();
}

}  // namespace quantine
