// One matrix of the layer for a few rows, in one call: gain, rotation, ternary product, rotation,
// gain, bias. At this size the calls between the parts would cost as much as the parts.

#include <cstring>

#include "common.h"
#include "rotate.h"
#include "ternary.h"

namespace bfmoe {
namespace {

constexpr int64_t kUnitRows = 4;  // rows of one expert that one thread rotates at a time

struct Unit {
  int64_t expert, first, rows;
};

// Float32 or float16 numbers, a row an expert.
struct Numbers {
  const void* data;
  bool halves;
  int64_t size;  // of a row

  template <int kPlace>
  const float* of(int64_t expert) const {
    if (!halves) return static_cast<const float*>(data) + expert * size;
    float* wide = kept<float, kPlace>(size);
    widen(static_cast<const uint16_t*>(data) + expert * size, wide, size);
    return wide;
  }
};

std::vector<Unit> cut(const int64_t* expert, int64_t rows) {
  std::vector<Unit> units;
  for (int64_t r = 0; r < rows; ++r)
    if (units.empty() || units.back().expert != expert[r] || units.back().rows == kUnitRows)
      units.push_back({expert[r], r, 1});
    else
      ++units.back().rows;
  return units;
}

}  // namespace
}  // namespace bfmoe

using namespace bfmoe;

// y = diag(gain_out) B(angles_out) diag(alpha) T B(angles_in)^T diag(gain_in) x + bias, each row by
// its expert's gains and angles. Contiguous: x (rows, d_in), y (rows, d_out), expert (rows) with
// values below `experts`, angles (experts, stages, pairs), gains (experts, d), bias (d_out); gains
// and bias may be null. The bits of `halves` say which of angles_in, angles_out, gain_in, gain_out
// are float16. Returns 1 when an expert is out of range, else 0.
EXPORT int bfmoe_packed_linear(const uint8_t* data, const float* alpha, int64_t alpha_step,
                               const void* plan_in, const void* angles_in, const void* plan_out,
                               const void* angles_out, const void* gain_in, const void* gain_out,
                               const float* bias, int halves, const int64_t* expert,
                               const float* x, float* y, int64_t rows, int64_t experts,
                               int64_t threads) {
  for (int64_t r = 0; r < rows; ++r)
    if (expert[r] < 0 || expert[r] >= experts) return 1;
  const Plan &in = *static_cast<const Plan*>(plan_in), &out = *static_cast<const Plan*>(plan_out);
  const int64_t d_in = in.d, d_out = out.d;
  const Matrix matrix{data, alpha, alpha_step, d_out, d_in};
  const Shape shape = shape_of(d_out, d_in);
  const Numbers turn_in{angles_in, (halves & 1) != 0, in.stages * (d_in / 2)};
  const Numbers turn_out{angles_out, (halves & 2) != 0, out.stages * (d_out / 2)};
  const Numbers scale_in{gain_in, (halves & 4) != 0, d_in};
  const Numbers scale_out{gain_out, (halves & 8) != 0, d_out};
  const std::vector<Unit> units = cut(expert, rows);
  const int64_t count = static_cast<int64_t>(units.size());
  const int64_t pairs = (rows + kTogether - 1) / kTogether;
  float* rotated = kept<float, 2>(rows * d_in);
  float* tables = kept<float, 1>(rows * shape.chunks * shape.table);
  Together turn, build, multiply, turn_back;
  run(useful_threads(shape, matrix, rows, threads), [&](int64_t) {
    turn(count, [&](int64_t i) {
      const Unit& unit = units[i];
      float* to = rotated + unit.first * d_in;
      const float* from = x + unit.first * d_in;
      if (gain_in) {
        const float* gain = scale_in.of<3>(unit.expert);
        for (int64_t r = 0; r < unit.rows; ++r)
          for (int64_t k = 0; k < d_in; ++k) to[r * d_in + k] = from[r * d_in + k] * gain[k];
      } else {
        std::memcpy(to, from, unit.rows * d_in * sizeof(float));
      }
      rotate_rows(in, to, to, unit.rows, turn_in.of<4>(unit.expert), true);
    });
    build(pairs * kParts, [&](int64_t i) {
      build_tables(shape, rotated, rows, d_in, i / kParts * kTogether, i % kParts, tables);
    });
    multiply(shape.tiles, [&](int64_t i) { multiply_tile(shape, matrix, i, tables, rows, y); });
    turn_back(count, [&](int64_t i) {
      const Unit& unit = units[i];
      float* to = y + unit.first * d_out;
      rotate_rows(out, to, to, unit.rows, turn_out.of<4>(unit.expert), false);
      const float* gain = gain_out ? scale_out.of<3>(unit.expert) : nullptr;
      for (int64_t r = 0; r < unit.rows; ++r, to += d_out)
        for (int64_t k = 0; k < d_out; ++k)
          to[k] = (gain ? to[k] * gain[k] : to[k]) + (bias ? bias[k] : 0.f);
    });
  });
  return 0;
}
