// A loop that the caller's thread shares with helpers.
//
// A layer is a dozen native calls of some tens of microseconds each, and a thread that sleeps takes as long to wake. So a helper
// that has nothing to do watches for the next loop for a while before it sleeps, as OpenMP's threads do, and meanwhile leaves its
// processor to whoever wants it. Each processor has a helper of its own, bound to it: where threads are free to move, the system
// puts the caller and a helper on one processor, for milliseconds, and leaves another idle.

#pragma once

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace jaxserve {

constexpr std::chrono::microseconds kWatch{300};  // of a helper without work: longer than what lies between two native calls
constexpr std::chrono::microseconds kNap{20};
constexpr int kSpins = 2000;      // some tens of microseconds
constexpr int kSpinsAtOnce = 16;  // between looks at the clock
constexpr int kAnyProcessor = -1, kUnknownProcessor = -2;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// ---- Processors, as far as Linux tells of them.

inline int processor_at_hand() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return kUnknownProcessor;
#endif
}

// How many a container may use at a time, in whatever places (cgroup v2); 0: no limit.
inline int processors_of_quota() {
  double quota = 0, period = 0;
  std::ifstream("/sys/fs/cgroup/cpu.max") >> quota >> period;  // "max 100000" leaves zeros
  return period > 0 ? static_cast<int>((quota + period - 1) / period) : 0;
}

// One for each helper: those that this process may run on; or any, one fewer than may run at a time, where they are not told
// apart or where others have their quota of the same ones.
inline std::vector<int> processors_of_helpers() {
  std::vector<int> found;
  size_t at_once = std::thread::hardware_concurrency();
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
    for (int processor = 0; processor < CPU_SETSIZE; ++processor)
      if (CPU_ISSET(processor, &allowed)) found.push_back(processor);
#endif
  if (!found.empty()) at_once = found.size();
  const size_t quota = processors_of_quota();
  if (!found.empty() && (quota == 0 || quota >= at_once)) return found;
  if (quota > 0) at_once = std::min(at_once, quota);
  return std::vector<int>(std::max<size_t>(at_once, 1) - 1, kAnyProcessor);
}

inline void bind_to(int processor) {
#if defined(__linux__)
  if (processor == kAnyProcessor) return;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(processor, &one);
  sched_setaffinity(0, sizeof one, &one);  // where it is refused, the thread stays free
#endif
}

// ---- Helpers of one process, for all its engines and devices. They never end: threads would outlive them.

class Helpers {
 public:
  static Helpers& all() {
    static Helpers* const helpers = new Helpers;
    return *helpers;
  }

  // That work at a time, the caller's among them.
  int num_threads() const { return num_threads_; }

  // See parallel_for.
  void share(int64_t count, const std::function<void(int64_t)>& task) {
    Loop loop{task, count, processor_at_hand()};
    Place* const place = count > 1 ? post(&loop) : nullptr;
    loop.work();
    if (place != nullptr) withdraw(*place);
  }

 private:
  struct Loop {
    const std::function<void(int64_t)>& task;
    int64_t count;
    int processor;  // the caller's
    std::atomic<int64_t> next{0};

    void work() {
      for (int64_t i; (i = next.fetch_add(1)) < count;) task(i);
    }
  };

  // Where a loop is offered. It may go once no helper is at the place any more.
  struct alignas(64) Place {
    std::atomic<bool> is_taken{false};
    std::atomic<Loop*> loop{nullptr};
    std::atomic<int> visitors{0};
  };

  struct alignas(64) Helper {
    int processor;
    std::atomic<bool> is_asleep{false};
    std::mutex mutex;
    std::condition_variable awake;
  };

  Helpers() {
    const std::vector<int> processors = processors_of_helpers();
    const bool bound = !processors.empty() && processors[0] != kAnyProcessor;
    num_threads_ = static_cast<int>(processors.size()) + (bound ? 0 : 1);  // the caller has one of those helpers' places
    for (const int processor : processors) helpers_.emplace_back(new Helper)->processor = processor;
    for (auto& helper : helpers_) std::thread([this, &helper = *helper] { help(helper); }).detach();
  }

  // Null where as many callers as there are places are at work: one more has nothing to gain.
  Place* post(Loop* loop) {
    for (Place& place : places_) {
      if (place.is_taken.load(std::memory_order_relaxed) || place.is_taken.exchange(true)) continue;
      place.loop.store(loop);
      caller_.store(loop->processor);
      num_posted_.fetch_add(1);
      for (auto& helper : helpers_) {
        if (!helper->is_asleep.load() || helper->processor == loop->processor) continue;
        { std::lock_guard<std::mutex> lock(helper->mutex); }  // it looks once more before it sleeps, or sleeps now
        helper->awake.notify_one();
      }
      return &place;
    }
    return nullptr;
  }

  void withdraw(Place& place) {
    place.loop.store(nullptr);
    // Helpers end soon after: sleeping takes longer, unless one of them has lost its processor.
    for (int spins = 0; place.visitors.load() > 0; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::sleep_for(kNap);
      }
    }
    place.is_taken.store(false, std::memory_order_release);
  }

  void help(Helper& helper) {
    bind_to(helper.processor);
    for (;;) {
      const int64_t seen = num_posted_.load();
      for (Place& place : places_) {
        if (place.loop.load() == nullptr) continue;
        place.visitors.fetch_add(1);
        // Who has the caller's processor would only take it from the caller.
        Loop* const loop = place.loop.load();
        if (loop != nullptr && loop->processor != helper.processor) loop->work();
        place.visitors.fetch_sub(1);
      }
      if (!watch(helper, seen)) sleep(helper, seen);
    }
  }

  // Whether a loop comes. Not from the helper's own processor, which the caller needs.
  bool watch(const Helper& helper, int64_t seen) const {
    const auto end = std::chrono::steady_clock::now() + kWatch;
    do {
      for (int i = 0; i < kSpinsAtOnce; ++i) {
        if (num_posted_.load(std::memory_order_relaxed) != seen) return true;
        pause();
      }
      std::this_thread::yield();
    } while (caller_.load() != helper.processor && std::chrono::steady_clock::now() < end);
    return false;
  }

  void sleep(Helper& helper, int64_t seen) {
    std::unique_lock<std::mutex> lock(helper.mutex);
    helper.is_asleep.store(true);
    helper.awake.wait(lock, [&] { return num_posted_.load() != seen; });
    helper.is_asleep.store(false);
  }

  std::array<Place, 16> places_;
  alignas(64) std::atomic<int64_t> num_posted_{0};
  std::atomic<int> caller_{kUnknownProcessor};  // the processor of the last one
  std::vector<std::unique_ptr<Helper>> helpers_;
  int num_threads_;
};

}  // namespace jaxserve

namespace {

// Runs task(0) ... task(count - 1) on the caller and on helpers; returns when all are done. Who comes late finds nothing to do,
// so a busy machine cannot block the caller.
inline void parallel_for(int64_t count, const std::function<void(int64_t)>& task) {
  jaxserve::Helpers::all().share(count, task);
}

}  // namespace
