// Float32 matrix products; see llama_ops/matmul.h. Blocks are copied into the order in which they are
// read (Goto and van de Geijn 2008): a tile of rows of X stays in the L1 cache while it meets all
// panels of a block of Y, which stays in the L2 cache.
#include "llama_ops/matmul.h"

#include <utility>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

// A tile's sums stay in registers: 14 x 2 of 32 vectors, or 6 x 2 of 16.
#if defined(__AVX512F__)
constexpr int kTall = 14;
#else
constexpr int kTall = 6;
#endif
constexpr int kBroad = 2 * kWidth;            // columns of a panel
constexpr int64_t kDeep = 256;                // a tile of X: 14 x 256 x 4 = 14 KiB of the L1 cache
constexpr int64_t kBlockColumns = 256;        // a block of Y: 256 x 256 x 4 = 256 KiB of the L2 cache
constexpr int64_t kBlockRows = 80 * kTall;    // of X, copied at a time
constexpr int kAhead = 12;                    // rows of a panel that are fetched before their turn
constexpr int kCopyX = 0, kCopyY = 1;         // scratch slots

template <int... kLanes>
inline void interleave(Vec a, Vec b, Vec* low, Vec* high, std::integer_sequence<int, kLanes...>) {
  *low = __builtin_shufflevector(a, b, (kLanes / 2 + kLanes % 2 * kWidth)...);
  *high = __builtin_shufflevector(a, b, (kWidth / 2 + kLanes / 2 + kLanes % 2 * kWidth)...);
}

// Transposes kWidth vectors: dealing the two halves together as often as halves can be made.
inline void transpose(Vec (&v)[kWidth]) {
#pragma GCC unroll 4
  for (int step = 1; step < kWidth; step *= 2) {
    Vec dealt[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      interleave(v[i], v[i + kWidth / 2], &dealt[2 * i], &dealt[2 * i + 1],
                 std::make_integer_sequence<int, kWidth>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) v[i] = dealt[i];
  }
}

// A panel [depth, kBroad] of Y's columns from `column`, those past the last being 0.
void copy_panel(const llama_ops_matmul_args& a, int64_t from, int64_t depth, int64_t column,
                float* to) {
  const int64_t columns = smaller<int64_t>(kBroad, a.columns - column);
  if (!a.transpose_y) {
    for (int64_t k = 0; k < depth; ++k) {
      const float* y = a.y + (from + k) * a.columns + column;
      float* row = to + k * kBroad;
      if (columns == kBroad) {
        store(row, load(y));
        store(row + kWidth, load(y + kWidth));
      } else {
        for (int64_t n = 0; n < kBroad; ++n) row[n] = n < columns ? y[n] : 0.0f;
      }
    }
    return;
  }
  const float* y = a.y + column * a.depth + from;
  const int64_t whole = columns == kBroad ? depth / kWidth * kWidth : 0;
  for (int64_t k = 0; k < whole; k += kWidth) {
    for (int half = 0; half < 2; ++half) {
      Vec block[kWidth];
      for (int n = 0; n < kWidth; ++n) block[n] = load(y + (half * kWidth + n) * a.depth + k);
      transpose(block);
      for (int i = 0; i < kWidth; ++i) store(to + (k + i) * kBroad + half * kWidth, block[i]);
    }
  }
  for (int64_t k = whole; k < depth; ++k) {
    for (int64_t n = 0; n < kBroad; ++n) {
      to[k * kBroad + n] = n < columns ? y[n * a.depth + k] : 0.0f;
    }
  }
}

// A tile of X: [kTall, kDeep], or where X comes transposed [depth, kTall]; either way the numbers
// that lie together stay together, since the tile's numbers are read one by one.
void copy_tile(const llama_ops_matmul_args& a, int64_t from, int64_t depth, int64_t row, int64_t rows,
               float* to) {
  if (a.transpose_x) {
    for (int64_t k = 0; k < depth; ++k) {
      const float* x = a.x + (from + k) * a.rows + row;
      for (int64_t r = 0; r < rows; ++r) to[k * kTall + r] = x[r];
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(to + r * kDeep, a.x + (row + r) * a.depth + from, depth * sizeof(float));
  }
}

// out [kRows, columns] (+)= tile times panel; the tile's number (r, k) is at x[r kRow + k kStep].
template <int kRows, int kRow, int kStep>
inline __attribute__((always_inline)) void multiply(const float* x, const float* panel,
                                                    int64_t depth, float* out, int64_t stride,
                                                    int64_t columns, bool add) {
  Vec sums[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = sums[r][1] = Vec{};
    __builtin_prefetch(out + r * stride);
    __builtin_prefetch(out + r * stride + kWidth);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec y0 = load(panel + k * kBroad), y1 = load(panel + k * kBroad + kWidth);
    __builtin_prefetch(panel + (k + kAhead) * kBroad);
    __builtin_prefetch(panel + (k + kAhead) * kBroad + kWidth);
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) {
      const Vec one = splat(x[r * kRow + k * kStep]);
      sums[r][0] += one * y0;
      sums[r][1] += one * y1;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 2; ++v) {
      float* to = out + r * stride + v * kWidth;
      const int64_t left = columns - v * kWidth;
      if (left >= kWidth) {
        store(to, add ? load(to) + sums[r][v] : sums[r][v]);
      } else if (left > 0) {
        store_some(to, add ? load_some(to, left) + sums[r][v] : sums[r][v], left);
      }
    }
  }
}

// The same for up to kTall rows.
template <int kRow, int kStep>
void multiply_rows(const float* x, int64_t rows, const float* panel, int64_t depth, float* out,
                   int64_t stride, int64_t columns, bool add) {
  if (rows == kTall) {
    multiply<kTall, kRow, kStep>(x, panel, depth, out, stride, columns, add);
    return;
  }
  for (; rows >= 4; rows -= 4, x += 4 * kRow, out += 4 * stride) {
    multiply<4, kRow, kStep>(x, panel, depth, out, stride, columns, add);
  }
  for (; rows >= 1; --rows, x += kRow, out += stride) {
    multiply<1, kRow, kStep>(x, panel, depth, out, stride, columns, add);
  }
}

struct Block {
  Range rows, columns;
  int64_t from, depth;  // of the sum
};

// Meets all tiles of a block's rows with a block of columns, both copied.
void multiply_block(const llama_ops_matmul_args& a, const Block& block, const float* tiles,
                    const float* panels) {
  const bool add = a.accumulate || block.from > 0;
  for (int64_t row = block.rows.begin; row < block.rows.end; row += kTall) {
    const float* x = tiles + (row - block.rows.begin) * kDeep;
    const int64_t rows = smaller<int64_t>(kTall, block.rows.end - row);
    for (int64_t column = block.columns.begin; column < block.columns.end; column += kBroad) {
      const float* panel = panels + (column - block.columns.begin) * kDeep;
      float* out = a.out + row * a.columns + column;
      const int64_t columns = block.columns.end - column;
      if (a.transpose_x) {
        multiply_rows<1, kTall>(x, rows, panel, block.depth, out, a.columns, columns, add);
      } else {
        multiply_rows<kDeep, 1>(x, rows, panel, block.depth, out, a.columns, columns, add);
      }
    }
  }
}

// Everything for some rows and columns of out.
void multiply_part(const llama_ops_matmul_args& a, Range rows, Range columns) {
  float* tiles = static_cast<float*>(scratch(kCopyX, kBlockRows * kDeep * sizeof(float)));
  float* panels = static_cast<float*>(scratch(kCopyY, kBlockColumns * kDeep * sizeof(float)));
  Block block;
  for (block.from = 0; block.from < a.depth; block.from += kDeep) {
    block.depth = smaller(kDeep, a.depth - block.from);
    for (int64_t row = rows.begin; row < rows.end; row += kBlockRows) {
      block.rows = {row, smaller(row + kBlockRows, rows.end)};
      for (int64_t at = row; at < block.rows.end; at += kTall) {
        copy_tile(a, block.from, block.depth, at, smaller<int64_t>(kTall, block.rows.end - at),
                  tiles + (at - row) * kDeep);
      }
      for (int64_t column = columns.begin; column < columns.end; column += kBlockColumns) {
        block.columns = {column, smaller(column + kBlockColumns, columns.end)};
        for (int64_t at = column; at < block.columns.end; at += kBroad) {
          copy_panel(a, block.from, block.depth, at, panels + (at - column) * kDeep);
        }
        multiply_block(a, block, tiles, panels);
      }
    }
  }
}

// How many of the threads share the rows; the others share the columns. Each copies the rows and
// columns of its part, so parts should be near to squares.
int row_threads(const llama_ops_matmul_args& a, int threads) {
  int best = 1;
  double least = INFINITY;
  for (int down = 1; down <= threads; ++down) {
    if (threads % down != 0) continue;
    const double edge = static_cast<double>(a.rows) / down +
                        static_cast<double>(a.columns) * down / threads;
    if (edge < least) best = down, least = edge;
  }
  return best;
}

}  // namespace

void matmul(const llama_ops_matmul_args& a) {
  if (a.depth == 0 && !a.accumulate) memset(a.out, 0, a.rows * a.columns * sizeof(float));
  on_threads(a.rows * a.columns * a.depth / kWidth, [&](int thread, int threads) {
    const int down = row_threads(a, threads), across = threads / down;
    multiply_part(a, share(a.rows, kTall, thread / across, down),
                  share(a.columns, kBroad, thread % across, across));
  });
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
