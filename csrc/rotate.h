// Butterfly rotations of rows; see rotate.cpp.

#pragma once

#include <cstdint>
#include <memory>

namespace bfmoe {

// The network of one width: see stages.inc. Slot i of a deck holds coordinate deck[i].
struct Plan {
  int64_t d, stages, pitch;
  bool sorted;                         // the deck is back in order after the last stage
  bool natural;                        // d is a power of two: see natural.inc
  std::unique_ptr<int32_t[]> deck;     // after the last stage
  std::unique_ptr<int32_t[]> place;    // the inverse: coordinate -> slot
  std::unique_ptr<int32_t[]> angle;    // (stages, pairs): index of the angle of each neighbour pair
  std::unique_ptr<int8_t[]> flipped;   // the pair's larger coordinate lies in the left slot
};

// Rotate rows of one expert, y = B x or B^T x; x may be y. Scratch memory is the thread's own.
void rotate_rows(const Plan& plan, const float* x, float* y, int64_t rows, const float* angles,
                 bool inverse);

// Numbers of n halves (IEEE 16 bit).
void widen(const uint16_t* from, float* to, int64_t n);

}  // namespace bfmoe
