// What the CPU kernels share: the exported names, the instruction set, threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if defined(__x86_64__)
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,f16c")))
#endif

namespace bfmoe {

// 0: the compiler's baseline (NEON on ARM), 1: AVX2, 2: AVX-512.
inline int level() {
#if defined(__x86_64__)
  static const int found = [] {
    __builtin_cpu_init();
    int best = 0;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      best = 1;
    if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
      best = 2;
    const char* limit = std::getenv("BFMOE_CPU_LEVEL");  // for tests
    return limit ? std::clamp(std::atoi(limit), 0, best) : best;
  }();
  return found;
#else
  return 0;
#endif
}

// Threads that wait for work between calls. Starting one anew for each call costs as much as a small
// product, and it would lose what `kept` keeps for it. One call at a time has them.
class Pool {
 public:
  using Run = void (*)(const void* work, int64_t number);

  // That of this process: a forked one has none of its parent's threads, and starts its own. It is
  // never destroyed, for its threads sleep in it until the process ends.
  static Pool& own() {
    Pool* found = current().load();
    if (!found) {
      Pool* fresh = new Pool;
      if (current().compare_exchange_strong(found, fresh)) {
        found = fresh;
#if !defined(_WIN32)
        static const int known = pthread_atfork(nullptr, nullptr, [] { current().store(nullptr); });
        (void)known;
#endif
      } else {
        delete fresh;
      }
    }
    return *found;
  }

  // run(work, 0) .. run(work, total - 1), the first one here; false if another call has the threads.
  bool operator()(int64_t total, Run run, const void* work) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    std::unique_lock<std::mutex> lock(mutex_);
    try {
      for (; threads_ < total - 1; ++threads_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // no thread to be had: the others do more, or this one
    }
    run_ = run, work_ = work, total_ = total, next_ = 1, left_ = total;
    lock.unlock();
    wanted_.notify_all();
    run(work, 0);
    lock.lock();
    --left_;
    while (next_ < total_) take(lock);
    finished_.wait(lock, [this] { return left_ == 0; });
    return true;
  }

 private:
  static std::atomic<Pool*>& current() {
    static std::atomic<Pool*> pool{nullptr};
    return pool;
  }

  void take(std::unique_lock<std::mutex>& lock) {
    const Run run = run_;
    const void* work = work_;
    const int64_t number = next_++;
    lock.unlock();
    run(work, number);
    lock.lock();
    if (--left_ == 0) finished_.notify_one();
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wanted_.wait(lock, [this] { return next_ < total_; });
      take(lock);
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wanted_, finished_;
  Run run_ = nullptr;
  const void* work_ = nullptr;
  int64_t total_ = 0, next_ = 0, left_ = 0, threads_ = 0;
};

// Run work(0) .. work(threads - 1), the first one here.
template <typename Work>
void run(int64_t threads, const Work& work) {
  const auto call = [](const void* what, int64_t t) { (*static_cast<const Work*>(what))(t); };
  if (threads > 1 && Pool::own()(threads, call, &work)) return;
  for (int64_t t = 0; t < std::max<int64_t>(threads, 1); ++t) work(t);
}

// Memory that starts at a cache line; not initialised.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(n, 1) * sizeof(T), kLine))) {}
  ~Buffer() { ::operator delete(data_, kLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

// At least n numbers that this thread keeps for its next call: fresh pages cost more than a small
// product. One place for each purpose; a thread that ends gives them back.
template <typename T, int kPlace>
T* kept(int64_t n) {
  thread_local std::unique_ptr<Buffer<T>> buffer;
  thread_local int64_t size = 0;
  if (!buffer || n > size) {
    buffer.reset();
    buffer.reset(new Buffer<T>(n));
    size = n;
  }
  return buffer->get();
}

// Work in equal items, done by all threads together: item(i) for each i, and on when all are done.
class Together {
 public:
  template <typename Item>
  void operator()(int64_t items, const Item& item) {
    for (int64_t i; (i = next_.fetch_add(1)) < items;) {
      item(i);
      done_.fetch_add(1, std::memory_order_release);
    }
    while (done_.load(std::memory_order_acquire) < items) std::this_thread::yield();
  }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace bfmoe
