// What the CPU kernels share: the exported names, the instruction set, threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
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

// Run work(0) .. work(threads - 1), the first one here.
template <typename Work>
void run(int64_t threads, const Work& work) {
  std::vector<std::thread> others;
  others.reserve(threads);
  int64_t t = 1;
  try {
    for (; t < threads; ++t) others.emplace_back(work, t);
  } catch (const std::system_error&) {
    // no thread to be had: do the rest here
  }
  work(0);
  for (; t < threads; ++t) work(t);
  for (auto& other : others) other.join();
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

}  // namespace bfmoe
