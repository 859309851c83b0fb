// The rows of a token's experts, weighted and added up, and the way back. Rows lie sorted by expert:
// row r is slot order[r] of the (tokens, k) choice.

#include "common.h"

namespace bfmoe {
namespace {

constexpr int64_t kTokens = 64;  // that a thread takes at a time
constexpr int kSums = 16;        // partial sums of a dot product

// Rows by slot instead of slots by row; false when `order` is no permutation.
bool invert(const int64_t* order, int64_t rows, int64_t* row_of) {
  std::fill(row_of, row_of + rows, -1);
  for (int64_t r = 0; r < rows; ++r) {
    if (order[r] < 0 || order[r] >= rows || row_of[order[r]] >= 0) return false;
    row_of[order[r]] = r;
  }
  return true;
}

float dot(const float* __restrict a, const float* __restrict b, int64_t n) {
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int j = 0; j < kSums; ++j) sums[j] += a[i + j] * b[i + j];
  float total = 0;
  for (; i < n; ++i) total += a[i] * b[i];
  for (int j = 0; j < kSums; ++j) total += sums[j];
  return total;
}

template <typename Work>
void by_tokens(int64_t tokens, int64_t numbers, int64_t threads, const Work& work) {
  Together together;
  run(std::max<int64_t>(1, std::min(threads, numbers >> 20)), [&](int64_t) {
    together((tokens + kTokens - 1) / kTokens, [&](int64_t item) {
      const int64_t end = std::min(tokens, (item + 1) * kTokens);
      for (int64_t t = item * kTokens; t < end; ++t) work(t);
    });
  });
}

}  // namespace
}  // namespace bfmoe

using namespace bfmoe;

// y[t] = sum over j of weights[t, j] * rows[row of slot t k + j]. Contiguous: rows (tokens k, d),
// weights (tokens, k), y (tokens, d). Returns 1 when `order` is no permutation, else 0.
EXPORT int bfmoe_combine(const float* rows, const float* weights, const int64_t* order, float* y,
                         int64_t tokens, int64_t k, int64_t d, int64_t threads) {
  int64_t* row_of = kept<int64_t, 5>(tokens * k);
  if (!invert(order, tokens * k, row_of)) return 1;
  by_tokens(tokens, tokens * k * d, threads, [&](int64_t t) {
    float* __restrict out = y + t * d;
    for (int64_t j = 0; j < k; ++j) {
      const float weight = weights[t * k + j];
      const float* __restrict from = rows + row_of[t * k + j] * d;
      if (j == 0)
        for (int64_t i = 0; i < d; ++i) out[i] = weight * from[i];
      else
        for (int64_t i = 0; i < d; ++i) out[i] += weight * from[i];
    }
  });
  return 0;
}

// From the gradient of y: those of the rows and of the weights.
EXPORT int bfmoe_combine_backward(const float* grad, const float* rows, const float* weights,
                                  const int64_t* order, float* grad_rows, float* grad_weights,
                                  int64_t tokens, int64_t k, int64_t d, int64_t threads) {
  int64_t* row_of = kept<int64_t, 5>(tokens * k);
  if (!invert(order, tokens * k, row_of)) return 1;
  by_tokens(tokens, 2 * tokens * k * d, threads, [&](int64_t t) {
    const float* __restrict from = grad + t * d;
    for (int64_t slot = t * k; slot < (t + 1) * k; ++slot) {
      const float weight = weights[slot];
      float* __restrict to = grad_rows + row_of[slot] * d;
      for (int64_t i = 0; i < d; ++i) to[i] = weight * from[i];
      grad_weights[slot] = dot(rows + row_of[slot] * d, from, d);
    }
  });
  return 0;
}
