// y = diag(alpha) T x for a few rows x, from trits at about 2 bit. Plain C interface, no torch.
//
// Sums of a few columns are looked up, not multiplied: for three columns of x there are 27 sums
// t0 x0 + t1 x1 + t2 x2, which fit into two AVX-512 registers, and one instruction looks up the
// sums of 16 rows at once. Sums are formed in float32, chunk by chunk, and no activation is
// rounded. The layout of the matrix depends on the machine; it is made from the trits when a model
// is loaded and is never stored in a file:
//
//   AVX-512  lanes are 16 rows; a 32-bit lane holds 6 fields of 5 bit, a field is 3 columns
//   AVX2     lanes are 8 rows; a 32-bit lane holds 16 fields of 2 bit, a field is 1 column
//   else     a byte is 5 columns of one row, whose 243 sums stand in a table in memory
//
// Within a tile of rows the order is chunk of columns, group of rows, word, block of rows, lane: a
// thread reads its tiles from front to back.

#include "ternary.h"

#include <cstring>

#include "common.h"

namespace bfmoe {
namespace {

constexpr int64_t kTileRows = 256;
constexpr int kWords = 8;   // 32-bit words of a chunk
constexpr int kBlocks = 4;  // blocks of rows that share the load of a table
constexpr int64_t kAtOnce = 32;  // rows of x whose tables are in memory

struct Format {
  int64_t lanes, fields, columns;  // rows of a block; fields of a word; columns of a field
  int64_t table;                   // floats that a field of one row of x becomes
};

Format format() {
  switch (level()) {
    case 2: return {16, 6, 3, 32};
    case 1: return {8, 16, 1, 1};
    default: return {1, 4, 5, 243};  // a word of 4 bytes
  }
}

}  // namespace

Shape shape_of(int64_t d_out, int64_t d_in) {
  const Format f = format();
  const int64_t group = f.lanes * kBlocks, rows = (d_out + group - 1) / group * group;
  Shape shape;
  shape.tile = std::min(kTileRows, rows);
  shape.chunk = kWords * f.fields * f.columns;
  shape.bytes = shape.tile * kWords * 4;
  shape.table = kWords * f.fields * f.table;
  shape.tiles = (rows + shape.tile - 1) / shape.tile;
  shape.chunks = (d_in + shape.chunk - 1) / shape.chunk;
  return shape;
}

namespace {

// --- From trits to the layout. ---

void lay_out(const int8_t* trits, int64_t d_out, int64_t d_in, uint8_t* out) {
  const Shape shape = shape_of(d_out, d_in);
  const Format f = format();
  const int64_t group = f.lanes * kBlocks;
  const int bits = f.columns == 3 ? 5 : f.columns == 1 ? 2 : 8;
  auto* words = reinterpret_cast<uint32_t*>(out);
  const auto trit = [&](int64_t o, int64_t k) -> int32_t {
    return o < d_out && k < d_in ? trits[o * d_in + k] : 0;
  };
  for (int64_t tile = 0; tile < shape.tiles; ++tile)
    for (int64_t chunk = 0; chunk < shape.chunks; ++chunk)
      for (int64_t row = 0; row < shape.tile; row += group)
        for (int64_t word = 0; word < kWords; ++word)
          for (int64_t r = row; r < row + group; ++r) {
            uint32_t packed = 0;
            for (int64_t field = 0; field < f.fields; ++field) {
              const int64_t k = chunk * shape.chunk + (word * f.fields + field) * f.columns;
              uint32_t digit = 0, weight = 1;
              for (int64_t c = 0; c < f.columns; ++c, weight *= 3)
                digit += weight * static_cast<uint32_t>(trit(tile * shape.tile + r, k + c) + 1);
              packed |= digit << (field * bits);
            }
            *words++ = packed;
          }
}

// --- AVX-512: three columns a field, their 27 sums in two registers. ---

#if defined(__x86_64__)
TARGET_AVX512 void build_triples(const float* x, int64_t count, int64_t stride, float* tables) {
  alignas(64) float digits[3][32];
  for (int c = 0, weight = 1; c < 3; ++c, weight *= 3)
    for (int i = 0; i < 32; ++i)  // 27 sums; the last 5 entries are never looked up
      digits[c][i] = static_cast<float>(i / weight % 3 - 1);
  __m512 low[3], high[3];
  for (int c = 0; c < 3; ++c) {
    low[c] = _mm512_load_ps(digits[c]);
    high[c] = _mm512_load_ps(digits[c] + 16);
  }
  for (int64_t i = 0; i < count; ++i, x += 3, tables += stride) {
    const __m512 a = _mm512_set1_ps(x[0]), b = _mm512_set1_ps(x[1]), c = _mm512_set1_ps(x[2]);
    // products, not selections: 0 times NaN is NaN, as in a dense product
    const __m512 l = _mm512_fmadd_ps(low[1], b, _mm512_mul_ps(low[0], a));
    const __m512 h = _mm512_fmadd_ps(high[1], b, _mm512_mul_ps(high[0], a));
    _mm512_store_ps(tables, _mm512_fmadd_ps(low[2], c, l));
    _mm512_store_ps(tables + 16, _mm512_fmadd_ps(high[2], c, h));
  }
}

// Sums start anew with each word: the shorter the chain, the smaller the rounding error.
template <int R>
TARGET_AVX512 void chunk_avx512(const uint8_t* data, const float* tables, float* y, bool first) {
  __m512 sum[R][kBlocks];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b)
      sum[r][b] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(y + r * kTileRows + 16 * b);
  for (int word = 0; word < kWords; ++word, data += 64 * kBlocks) {
    __m512i code[kBlocks];
    __m512 part[R][kBlocks];
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      code[b] = _mm512_loadu_si512(data + 64 * b);
      _mm_prefetch(reinterpret_cast<const char*>(data + 4096 + 64 * b), _MM_HINT_T0);
    }
#pragma GCC unroll 6
    for (int field = 0; field < 6; ++field, tables += 32 * R) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512 low = _mm512_load_ps(tables + 32 * r);
        const __m512 high = _mm512_load_ps(tables + 32 * r + 16);
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) {  // the look-up reads the last 5 bits of a lane
          const __m512 found = _mm512_permutex2var_ps(low, code[b], high);
          part[r][b] = field ? _mm512_add_ps(part[r][b], found) : found;
        }
      }
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) code[b] = _mm512_srli_epi32(code[b], 5);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) sum[r][b] = _mm512_add_ps(sum[r][b], part[r][b]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) _mm512_storeu_ps(y + r * kTileRows + 16 * b, sum[r][b]);
}

// --- AVX2: a column a field; the trit itself is looked up, and multiplied. ---

template <int R>
TARGET_AVX2 void chunk_avx2(const uint8_t* data, const float* x, float* y, bool first) {
  // the look-up reads 3 bits of a lane: this field's 2, and one of the next that does not matter
  const __m256 trits = _mm256_setr_ps(-1, 0, 1, 0, -1, 0, 1, 0);
  for (int r = 0; r < R && first; ++r)
    for (int b = 0; b < kBlocks; ++b) _mm256_storeu_ps(y + r * kTileRows + 8 * b, _mm256_setzero_ps());
  for (int word = 0; word < kWords; ++word, data += 32 * kBlocks) {
    __m256i code[kBlocks];
    __m256 part[R][kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
      code[b] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + 32 * b));
      for (int r = 0; r < R; ++r) part[r][b] = _mm256_setzero_ps();
    }
    for (int field = 0; field < 16; ++field, x += R) {
      __m256 value[R];
      for (int r = 0; r < R; ++r) value[r] = _mm256_broadcast_ss(x + r);
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        const __m256 trit = _mm256_permutevar8x32_ps(trits, code[b]);
        code[b] = _mm256_srli_epi32(code[b], 2);
        for (int r = 0; r < R; ++r) part[r][b] = _mm256_fmadd_ps(trit, value[r], part[r][b]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < kBlocks; ++b) {
        float* to = y + r * kTileRows + 8 * b;
        _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), part[r][b]));
      }
  }
}
#endif

// --- Everywhere: five columns a byte, their 243 sums in memory. ---

void build_fives(const float* x, int64_t count, int64_t stride, float* tables) {
  for (int64_t i = 0; i < count; ++i, x += 5, tables += stride) {
    for (int t = 0; t < 3; ++t) tables[t] = static_cast<float>(t - 1) * x[0];
    for (int c = 1, filled = 3; c < 5; ++c, filled *= 3)
      for (int t = 2; t >= 0; --t)  // the last block first: the first one is what all start from
        for (int j = 0; j < filled; ++j)
          tables[t * filled + j] = tables[j] + static_cast<float>(t - 1) * x[c];
  }
}

template <int R>
void chunk_base(const uint8_t* data, const float* tables, float* y, bool first) {
  constexpr int kBytes = 4 * kWords;
  for (int b = 0; b < kBlocks; ++b) {
    const uint8_t* code = data + 4 * b;
    for (int r = 0; r < R; ++r) {
      float sum[4] = {0, 0, 0, 0};
      const float* table = tables + 243 * r;
      for (int word = 0; word < kWords; ++word)
        for (int j = 0; j < 4; ++j, table += 243 * R)
          sum[j] += table[code[4 * kBlocks * word + j]];
      const float total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      y[r * kTileRows + b] = first ? total : y[r * kTileRows + b] + total;
    }
  }
  static_assert(kBytes == 32, "a chunk of bytes is 8 words");
}

// The row sums of one tile, for R rows of x.
template <int R>
void multiply(const Shape& shape, const uint8_t* data, const float* tables, float* sums) {
  const int64_t group = format().lanes * kBlocks, bytes = group * kWords * 4;
  for (int64_t chunk = 0; chunk < shape.chunks; ++chunk, tables += R * shape.table)
    for (int64_t row = 0; row < shape.tile; row += group, data += bytes) {
      const bool first = chunk == 0;
#if defined(__x86_64__)
      if (level() == 2) {
        chunk_avx512<R>(data, tables, sums + row, first);
        continue;
      }
      if (level() == 1) {
        chunk_avx2<R>(data, tables, sums + row, first);
        continue;
      }
#endif
      chunk_base<R>(data, tables, sums + row, first);
    }
}

}  // namespace

void build_tables(const Shape& shape, const float* x, int64_t rows, int64_t d_in, int64_t r,
                  int64_t part, float* tables) {
  const Format f = format();
  const int64_t some = std::min(kTogether, rows - r);
  const int64_t from = shape.chunks * part / kParts, to = shape.chunks * (part + 1) / kParts;
  const int64_t first = from * shape.chunk, width = (to - from) * shape.chunk;
  if (width == 0) return;
  float* padded = kept<float, 0>(width);
  for (int64_t i = 0; i < some; ++i) {
    const int64_t real = std::min(d_in - first, width), stride = some * f.table;
    std::memcpy(padded, x + (r + i) * d_in + first, real * sizeof(float));
    std::memset(padded + real, 0, (width - real) * sizeof(float));
    float* out = tables + r * shape.chunks * shape.table + from * some * shape.table + i * f.table;
    const int64_t fields = width / f.columns;
#if defined(__x86_64__)
    if (level() == 2) {
      build_triples(padded, fields, stride, out);
      continue;
    }
    if (level() == 1) {
      for (int64_t j = 0; j < fields; ++j) out[j * stride] = padded[j];
      continue;
    }
#endif
    build_fives(padded, fields, stride, out);
  }
}

void multiply_tile(const Shape& shape, const Matrix& matrix, int64_t tile, const float* tables,
                   int64_t rows, float* y) {
  const uint8_t* data = matrix.data + tile * shape.chunks * shape.bytes;
  const int64_t first = tile * shape.tile, count = std::min(shape.tile, matrix.d_out - first);
  const float* alpha = matrix.alpha + first * matrix.alpha_step;
  alignas(64) float sums[kTogether * kTileRows];
  for (int64_t r = 0; r < rows; r += kTogether) {
    const int64_t some = std::min(kTogether, rows - r);
    const float* of_rows = tables + r * shape.chunks * shape.table;
    if (some == 1)
      multiply<1>(shape, data, of_rows, sums);
    else
      multiply<2>(shape, data, of_rows, sums);
    for (int64_t i = 0; i < some; ++i) {
      float* out = y + (r + i) * matrix.d_out + first;
      for (int64_t o = 0; o < count; ++o)
        out[o] = alpha[o * matrix.alpha_step] * sums[i * kTileRows + o];
    }
  }
}

int64_t useful_threads(const Shape& shape, const Matrix& matrix, int64_t rows, int64_t asked) {
  const int64_t work = rows * matrix.d_out * matrix.d_in;
  return std::max<int64_t>(1, std::min({asked, work >> 22, shape.tiles}));
}

}  // namespace bfmoe

using namespace bfmoe;

// Bytes of the layout of a (d_out, d_in) matrix on this machine.
EXPORT int64_t bfmoe_ternary_bytes(int64_t d_out, int64_t d_in) {
  const Shape shape = shape_of(d_out, d_in);
  return shape.tiles * shape.chunks * shape.bytes;
}

// Lay out trits -1, 0, 1 of a contiguous (d_out, d_in) matrix, into bfmoe_ternary_bytes bytes.
EXPORT void bfmoe_ternary_lay_out(const int8_t* trits, int64_t d_out, int64_t d_in, uint8_t* out) {
  lay_out(trits, d_out, d_in, out);
}

// y[r, o] = alpha[o * alpha_step] * sum over k of T[o, k] x[r, k]. Contiguous: x (rows, d_in),
// y (rows, d_out).
EXPORT void bfmoe_ternary_linear(const uint8_t* data, const float* alpha, int64_t alpha_step,
                                 const float* x, float* y, int64_t rows, int64_t d_out,
                                 int64_t d_in, int64_t threads) {
  const Matrix matrix{data, alpha, alpha_step, d_out, d_in};
  const Shape shape = shape_of(d_out, d_in);
  float* tables = kept<float, 1>(std::min(rows, kAtOnce) * shape.chunks * shape.table);
  for (int64_t r = 0; r < rows; r += kAtOnce, x += kAtOnce * d_in, y += kAtOnce * d_out) {
    const int64_t some = std::min(kAtOnce, rows - r), pairs = (some + kTogether - 1) / kTogether;
    Together build, multiply;
    run(useful_threads(shape, matrix, some, threads), [&](int64_t) {
      build(pairs * kParts, [&](int64_t i) {
        build_tables(shape, x, some, d_in, i / kParts * kTogether, i % kParts, tables);
      });
      multiply(shape.tiles, [&](int64_t i) { multiply_tile(shape, matrix, i, tables, some, y); });
    });
  }
}
