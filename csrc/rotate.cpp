// Rotate rows by their expert's butterfly, and back with gradients. Plain C interface, no torch.
//
// Rows come sorted by expert, as counts. Each thread takes a contiguous share of them, builds the
// cosines of an expert when it meets one, and keeps them in its own cache: a table per expert is
// never stored. Sums of angle gradients are formed in double, in an order that depends only on the
// number of threads.

#include "rotate.h"

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common.h"

namespace bfmoe {
namespace {

// Cosine and sine of one expert in deck order, (stages, pairs).
template <typename T>
struct Table {
  const T *cosine, *sine;
};

constexpr int kBlock = 2;            // rows rotated together, which share each load of a cosine
constexpr int64_t kTableRows = 8;  // building an expert's table costs about as much as these rows
constexpr int64_t kFlush = 64;  // rows summed in T before they go to the sums in double
constexpr int64_t kNaturalRows = 4;  // of one expert: with more, its table is worth building

}  // namespace
}  // namespace bfmoe

using namespace bfmoe;

#define INLINE TARGET static inline __attribute__((always_inline))
#define TARGET
#define LEVEL base
#define BYTES 16
#include "stages.inc"
#include "natural.inc"
#include "passes.inc"
#undef TARGET
#undef LEVEL
#undef BYTES

#if defined(__x86_64__)
#define TARGET TARGET_AVX2
#define LEVEL avx2
#define BYTES 32
#include "stages.inc"
#include "natural.inc"
#include "passes.inc"
#undef TARGET
#undef LEVEL
#undef BYTES
#define TARGET TARGET_AVX512
#define LEVEL avx512
#define BYTES 64
#include "stages.inc"
#include "natural.inc"
#include "passes.inc"
#undef TARGET
#undef LEVEL
#undef BYTES
#endif

#if defined(__x86_64__)
#define AT_BEST_LEVEL(call) (level() == 2 ? avx512::call : level() == 1 ? avx2::call : base::call)
#else
#define AT_BEST_LEVEL(call) (base::call)
#endif

namespace bfmoe {
namespace {

void cos_sin_of(const float* angle, float* cosine, float* sine, int64_t n) {
  AT_BEST_LEVEL(cos_sin(angle, cosine, sine, n));
}

void cos_sin_of(const double* angle, double* cosine, double* sine, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    cosine[i] = std::cos(angle[i]);
    sine[i] = std::sin(angle[i]);
  }
}

std::unique_ptr<Plan> make_plan(int64_t d, int64_t stages) {
  const int64_t pairs = d / 2, half = d - pairs;
  auto plan = std::make_unique<Plan>();
  plan->d = d;
  plan->stages = stages;
  plan->pitch = (d + 15) / 16 * 16 + 16;  // rows a power of two apart would share cache sets
  plan->deck.reset(new int32_t[d]);
  plan->place.reset(new int32_t[d]);
  plan->angle.reset(new int32_t[stages * pairs]);
  plan->flipped.reset(new int8_t[stages * pairs]);
  std::vector<int32_t> deck(d), next(d), rank(d);
  for (int64_t i = 0; i < d; ++i) deck[i] = static_cast<int32_t>(i);
  for (int64_t s = 0; s < stages; ++s) {
    std::fill(rank.begin(), rank.end(), 0);
    for (int64_t j = 0; j < pairs; ++j) rank[std::min(deck[2 * j], deck[2 * j + 1])] = 1;
    int32_t smaller = 0;  // angles are sorted by the pair's smaller coordinate
    for (auto& r : rank) smaller += r, r = smaller - 1;
    for (int64_t j = 0; j < pairs; ++j) {
      const int32_t left = deck[2 * j], right = deck[2 * j + 1];
      plan->angle[s * pairs + j] = rank[std::min(left, right)];
      plan->flipped[s * pairs + j] = left > right;
      next[j] = left;
      next[half + j] = right;
    }
    if (d % 2) next[half - 1] = deck[d - 1];
    deck.swap(next);
  }
  plan->sorted = std::is_sorted(deck.begin(), deck.end());
  plan->natural = d >= 2 && (d & (d - 1)) == 0 && stages < 63 && (int64_t(1) << stages) <= d;
  for (int64_t i = 0; i < d; ++i) plan->deck[i] = deck[i], plan->place[deck[i]] = i;
  return plan;
}

// What one thread needs: an expert's table, scratch rows, and sums of angle gradients.
template <typename T>
struct Desk {
  const Plan& plan;
  const int64_t size;   // stages * pairs
  const bool in_order;  // tables and sums are in natural order, for natural.inc and passes.inc
  std::unique_ptr<T[]> table, scratch, turned;
  std::vector<double> sum;

  Desk(const Plan& p, bool gradients)
      : plan(p), size(p.stages * (p.d / 2)),
        in_order(std::is_same_v<T, float> && AT_BEST_LEVEL(has_passes(p))),
        scratch(gradients ? new T[4 * kBlock * p.pitch] : nullptr),
        turned(gradients ? new T[size]() : nullptr), sum(gradients ? size : 0) {}

  Table<T> look_up(const T* angles) {
    if (!table) table.reset(new T[3 * size]);
    T *cosine = table.get(), *sine = cosine + size, *ordered = sine + size;
    if (!in_order) AT_BEST_LEVEL(order<T>(plan, angles, ordered));
    cos_sin_of(in_order ? angles : ordered, cosine, sine, size);
    return {cosine, sine};
  }

  // All or some rows of one expert, of which there are `count`.
  void forward(const T* x, T* y, int64_t rows, int64_t count, const T* angles, bool inverse) {
    if constexpr (std::is_same_v<T, float>)
      if (count <= kNaturalRows && AT_BEST_LEVEL(serves(plan)) &&
          AT_BEST_LEVEL(near_zero(angles, size))) {
        if (x != y) std::memcpy(y, x, rows * plan.d * sizeof(float));
        AT_BEST_LEVEL(rotate_natural(plan, y, rows, angles, inverse));
        return;
      }
    const Table<T> cosines = look_up(angles);
    if constexpr (std::is_same_v<T, float>)
      if (in_order) {
        AT_BEST_LEVEL(natural_rows(plan, x, y, rows, cosines.cosine, cosines.sine, inverse));
        return;
      }
    if (!scratch) scratch.reset(new T[2 * kBlock * plan.pitch]);
    AT_BEST_LEVEL(forward<T>(plan, x, y, rows, cosines, scratch.get(), inverse));
  }

  // Some rows of one expert, whose table this is: gradients of x, and sums of the angles'.
  void backward(const T* y, const T* grad_y, T* grad_x, int64_t rows, Table<T> cosines,
                bool inverse) {
    if constexpr (std::is_same_v<T, float>)
      if (in_order) {
        AT_BEST_LEVEL(natural_back(plan, y, grad_y, grad_x, rows, cosines.cosine, cosines.sine,
                                   turned.get(), scratch.get(), inverse));
        return;
      }
    AT_BEST_LEVEL(backward<T>(plan, y, grad_y, grad_x, rows, cosines, scratch.get(), turned.get(),
                              inverse));
  }

  void flush() {
    for (int64_t i = 0; i < size; ++i) sum[i] += turned[i], turned[i] = 0;
  }

  // Add the sums to gradients in natural order, and start again from zero.
  template <typename G>
  void take(G* grad, bool inverse) {
    const int64_t pairs = plan.d / 2;
    for (int64_t i = 0; i < size; ++i) {
      const bool minus = (!in_order && plan.flipped[i]) != inverse;
      const int64_t to = in_order ? i : i / pairs * pairs + plan.angle[i];
      grad[to] += static_cast<G>(minus ? -sum[i] : sum[i]);
      sum[i] = 0;
    }
  }
};

// One thread's share of an expert's rows.
struct Share {
  int64_t expert, first, rows;
  bool whole;  // all rows of this expert
};

// Cut the rows into contiguous shares of about equal work; a table costs as much as some rows.
std::vector<std::vector<Share>> divide(const int64_t* counts, int64_t experts, int64_t threads) {
  int64_t total = 0;
  for (int64_t e = 0; e < experts; ++e) total += counts[e] ? counts[e] + kTableRows : 0;
  std::vector<std::vector<Share>> shares(threads);
  int64_t row = 0, work = 0;
  for (int64_t e = 0; e < experts; ++e) {
    if (!counts[e]) continue;
    work += kTableRows;
    int64_t from = 0;
    for (int64_t t = 0; t < threads; ++t) {
      const int64_t to = std::clamp<int64_t>(total * (t + 1) / threads - work, 0, counts[e]);
      if (from < to) shares[t].push_back({e, row + from, to - from, to - from == counts[e]});
      from = to;
    }
    row += counts[e];
    work += counts[e];
  }
  return shares;
}

int64_t useful_threads(const Plan& plan, int64_t rows, int64_t experts, int64_t asked) {
  const int64_t work = (rows + kTableRows * std::min(rows, experts)) * plan.d * plan.stages;
  return std::max<int64_t>(1, std::min(asked, work >> 19));  // less than that starts no thread
}

bool add_up(const int64_t* counts, int64_t experts, int64_t rows) {
  for (int64_t e = 0; e < experts; ++e) {
    if (counts[e] < 0) return false;
    rows -= counts[e];
  }
  return rows == 0;
}

template <typename T>
int rotate(const Plan& plan, const T* x, const T* angles, const int64_t* counts, T* y, int64_t rows,
           int64_t experts, int inverse, int64_t asked) {
  if (!add_up(counts, experts, rows)) return 1;
  if (rows == 0) return 0;
  const int64_t threads = useful_threads(plan, rows, experts, asked), d = plan.d;
  const auto shares = divide(counts, experts, threads);
  run(threads, [&](int64_t t) {
    if (shares[t].empty()) return;
    Desk<T> desk(plan, false);
    for (const Share& share : shares[t]) {
      desk.forward(x + share.first * d, y + share.first * d, share.rows, counts[share.expert],
                   angles + share.expert * desk.size, inverse != 0);
    }
  });
  return 0;
}

template <typename T>
int rotate_backward(const Plan& plan, const T* y, const T* grad_y, const T* angles,
                    const int64_t* counts, T* grad_x, T* grad_angles, int64_t rows, int64_t experts,
                    int inverse, int64_t asked) {
  if (!add_up(counts, experts, rows)) return 1;
  const int64_t size = plan.stages * (plan.d / 2), d = plan.d;
  std::fill(grad_angles, grad_angles + experts * size, T(0));
  if (rows == 0) return 0;
  const int64_t threads = useful_threads(plan, 2 * rows, experts, asked);
  const auto shares = divide(counts, experts, threads);
  struct Part {
    int64_t expert;
    std::vector<double> grad;
  };
  std::vector<std::vector<Part>> parts(threads);  // of experts that several threads share
  run(threads, [&](int64_t t) {
    if (shares[t].empty()) return;
    Desk<T> desk(plan, true);
    for (const Share& share : shares[t]) {
      const Table<T> table = desk.look_up(angles + share.expert * size);
      for (int64_t r = 0; r < share.rows; r += kFlush) {
        const int64_t at = (share.first + r) * d;
        desk.backward(y + at, grad_y + at, grad_x + at, std::min(kFlush, share.rows - r), table,
                      inverse != 0);
        desk.flush();
      }
      if (share.whole) {
        desk.take(grad_angles + share.expert * size, inverse != 0);
      } else {
        parts[t].push_back({share.expert, std::vector<double>(size)});
        desk.take(parts[t].back().grad.data(), inverse != 0);
      }
    }
  });
  std::vector<double> sum(size);
  int64_t expert = -1;
  const auto write = [&] {
    T* to = grad_angles + expert * size;
    for (int64_t i = 0; expert >= 0 && i < size; ++i) to[i] = static_cast<T>(sum[i]), sum[i] = 0;
  };
  for (const auto& of_thread : parts)
    for (const Part& part : of_thread) {  // parts of one expert follow one another
      if (part.expert != expert) write();
      expert = part.expert;
      for (int64_t i = 0; i < size; ++i) sum[i] += part.grad[i];
    }
  write();
  return 0;
}

}  // namespace

void rotate_rows(const Plan& plan, const float* x, float* y, int64_t rows, const float* angles,
                 bool inverse) {
  Desk<float> desk(plan, false);
  desk.forward(x, y, rows, rows, angles, inverse);
}

void widen(const uint16_t* from, float* to, int64_t n) { AT_BEST_LEVEL(widen(from, to, n)); }

}  // namespace bfmoe

// --- The interface. Change bfmoe_abi_version with it, here and in kernels/library.py. ---

EXPORT int bfmoe_abi_version() { return 2; }

// 0: the compiler's baseline (NEON on ARM), 1: AVX2, 2: AVX-512.
EXPORT int bfmoe_cpu_level() { return level(); }

// A network of width d >= 2, shared by all calls; made once and never freed.
EXPORT const void* bfmoe_plan(int64_t d, int64_t stages) { return make_plan(d, stages).release(); }

// y = B x per row, or B^T x. Contiguous: x, y (rows, d); angles (experts, stages, d / 2) in natural
// order; counts (experts). Returns 1 when the counts do not add up to the rows, else 0.
#define BFMOE_INTERFACE(NAME, T)                                                                  \
  EXPORT int bfmoe_rotate_##NAME(const void* plan, const T* x, const T* angles,                   \
                                 const int64_t* counts, T* y, int64_t rows, int64_t experts,      \
                                 int inverse, int64_t threads) {                                  \
    return rotate(*static_cast<const Plan*>(plan), x, angles, counts, y, rows, experts, inverse,  \
                  threads);                                                                       \
  }                                                                                               \
  /* From the output y and its gradient: gradients of x and of the angles. */                     \
  EXPORT int bfmoe_rotate_backward_##NAME(                                                        \
      const void* plan, const T* y, const T* grad_y, const T* angles, const int64_t* counts,      \
      T* grad_x, T* grad_angles, int64_t rows, int64_t experts, int inverse, int64_t threads) {   \
    return rotate_backward(*static_cast<const Plan*>(plan), y, grad_y, angles, counts, grad_x,    \
                           grad_angles, rows, experts, inverse, threads);                         \
  }

BFMOE_INTERFACE(f32, float)
BFMOE_INTERFACE(f64, double)
