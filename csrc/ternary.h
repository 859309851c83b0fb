// The product of a packed ternary matrix with a few rows; see ternary.cpp.

#pragma once

#include <cstdint>

namespace bfmoe {

// A ternary matrix as the machine reads it, made by `bfmoe_ternary_lay_out`.
struct Matrix {
  const uint8_t* data;
  const float* alpha;
  int64_t alpha_step;  // 0: one scale for all rows
  int64_t d_out, d_in;
};

// How a ternary matrix is cut, in rows and columns; a tile is what a thread takes at a time.
struct Shape {
  int64_t tile;     // rows
  int64_t chunk;    // columns whose table stays in the first-level cache
  int64_t bytes;    // of one tile and chunk
  int64_t table;    // floats that one chunk of one row of x becomes
  int64_t tiles, chunks;
};

Shape shape_of(int64_t d_out, int64_t d_in);

constexpr int64_t kTogether = 2;  // rows of x that share a walk through the matrix
constexpr int64_t kParts = 4;     // in which the tables of such rows may be built

// Part of the tables of x (rows, d_in), for the pair of rows that starts at row r.
// `tables` holds shape.chunks * shape.table floats for each row of x.
void build_tables(const Shape& shape, const float* x, int64_t rows, int64_t d_in, int64_t r,
                  int64_t part, float* tables);

// y[r, o] = alpha[o * alpha_step] * sum over k of T[o, k] x[r, k] for all rows r of x and the rows o
// of one tile, y (rows, d_out).
void multiply_tile(const Shape& shape, const Matrix& matrix, int64_t tile, const float* tables,
                   int64_t rows, float* y);

// Threads that are worth their start.
int64_t useful_threads(const Shape& shape, const Matrix& matrix, int64_t rows, int64_t asked);

}  // namespace bfmoe
