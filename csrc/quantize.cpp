// Blend a latent matrix towards its ternary form, in two walks over each row instead of some twenty
// passes over the matrix. Same numbers, bit by bit, as functional.quantize_ternary(scale="lstsq"):
// sums in double, everything else rounded where PyTorch rounds, so no products are fused here.

#include <cmath>

#include "common.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#define NO_FUSED_PRODUCTS
#elif defined(__x86_64__) && !defined(__FMA__)
#define NO_FUSED_PRODUCTS  // there is no instruction to fuse them
#else
#define NO_FUSED_PRODUCTS __attribute__((optimize("fp-contract=off")))
#endif

namespace bfmoe {
namespace {

constexpr int kRows = 4;  // summed together: one sum waits for itself

// The scale and the smallest magnitude that is kept, from a row's magnitudes in ascending order.
template <int R>
NO_FUSED_PRODUCTS void least_squares(const float* sorted, int64_t n, float* alpha,
                                     float* threshold) {
  double sum[R];
  float best[R], total[R];
  int64_t at[R];
  for (int r = 0; r < R; ++r) sum[r] = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float count = static_cast<float>(i + 1);
    for (int r = 0; r < R; ++r) {
      sum[r] += sorted[r * n + n - 1 - i];
      const float so_far = static_cast<float>(sum[r]);
      const float gain = so_far * so_far / count;  // NaN, which sorts last, stays the first best
      if (i == 0 || gain > best[r]) best[r] = gain, total[r] = so_far, at[r] = i;
    }
  }
  for (int r = 0; r < R; ++r) {
    alpha[r] = total[r] / static_cast<float>(at[r] + 1);
    threshold[r] = sorted[r * n + n - 1 - at[r]];
  }
}

// What a row becomes, where kept(w) says which numbers are not zero in T.
template <typename Kept>
NO_FUSED_PRODUCTS void blend_row(const float* __restrict weight, float* __restrict out, int64_t n,
                                 float alpha, float blend, const Kept& kept) {
  const float zero = alpha * 0.f;  // NaN where alpha is not finite
  for (int64_t i = 0; i < n; ++i) {
    const float w = weight[i], signed_alpha = w > 0 ? alpha : w < 0 ? -alpha : zero;
    const float target = kept(w) ? signed_alpha : zero;
    const float step = blend * (target - w);
    out[i] = blend >= 1 ? target : w + step;
  }
}

}  // namespace
}  // namespace bfmoe

using namespace bfmoe;

// out = weight + blend (alpha T - weight), exactly alpha T from blend 1 on, with the least-squares
// alpha and T of each row. `sorted` holds the rows' magnitudes in ascending order, NaN last.
EXPORT void bfmoe_quantize(const float* weight, const float* sorted, float* out, int64_t rows,
                           int64_t n, float blend, int64_t threads) {
  const int64_t items = (rows + kRows - 1) / kRows;
  Together together;
  run(std::max<int64_t>(1, std::min(threads, rows * n >> 18)), [&](int64_t) {
    together(items, [&](int64_t item) {
      const int64_t first = item * kRows, count = std::min<int64_t>(kRows, rows - first);
      float alpha[kRows], threshold[kRows];
      if (count == kRows) {
        least_squares<kRows>(sorted + first * n, n, alpha, threshold);
      } else {
        for (int64_t r = 0; r < count; ++r)
          least_squares<1>(sorted + (first + r) * n, n, alpha + r, threshold + r);
      }
      for (int64_t r = 0; r < count; ++r)
        blend_row(weight + (first + r) * n, out + (first + r) * n, n, alpha[r], blend,
                  [&](float w) { return std::fabs(w) >= threshold[r]; });
    });
  });
}

// The same with given scales, one a row, and T = round(weight / alpha) cut to -1 .. 1.
EXPORT void bfmoe_quantize_scaled(const float* weight, const float* alpha, float* out,
                                  int64_t rows, int64_t n, float blend, int64_t threads) {
  Together together;
  run(std::max<int64_t>(1, std::min(threads, rows * n >> 18)), [&](int64_t) {
    together(rows, [&](int64_t r) {
      blend_row(weight + r * n, out + r * n, n, alpha[r], blend,
                [&](float w) { return std::fabs(w / alpha[r]) > 0.5f; });  // 0.5 rounds to 0
    });
  });
}
