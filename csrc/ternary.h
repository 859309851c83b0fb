// The product of a packed ternary matrix with a few rows; see ternary.cpp.

#pragma once

#include <cstdint>

namespace bfmoe {

// A ternary matrix as the machine reads it, made by `bfmoe_ternary_lay_out`.
struct Matrix {
  const uint8_t* data;
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

// The tables of rows rows of x, (chunks, rows, table) floats: shape_of(..).chunks * rows * .table.
void build_tables(const Shape& shape, const float* x, int64_t pitch, int64_t rows, int64_t d_in,
                  float* tables);

// Row sums of one tile: y[r * pitch + o] = sum over k of T[o, k] x[r, k] for the tile's rows o.
// y has room for shape.tile numbers behind each row's start.
void multiply_tile(const Shape& shape, const uint8_t* data, int64_t tile, const float* tables,
                   int64_t rows, float* y, int64_t pitch);

constexpr int64_t kMostRows = 2;  // of one call of build_tables and multiply_tile: more would spill

}  // namespace bfmoe
