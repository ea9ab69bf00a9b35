// Products with matrices in bfloat16 and integers, in float32; see llama_ops/frozen_matmul.h.
//
// x is brought into tiles of rows. A thread widens a block of the matrix, kDepth deep and kColumns of
// the result wide, and multiplies it with all tiles while it lies in the second-level cache. Widening
// is paid for by the rows: with hundreds of them it is a few percent.
#include "llama_ops/frozen_matmul.h"

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/products.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

using Args = llama_ops_frozen_matmul_args;

constexpr int kBlockScratch = 0, kTilesScratch = 1;
constexpr int kColumns = 64;            // of the result, in a block
constexpr int64_t kDepth = 256;         // of a block
constexpr int64_t kSlab = 16 * kDepth;  // of x, in tiles at a time: a vocabulary is deeper than memory
constexpr int64_t kTilesTogether = 72;  // that share a widened block
constexpr int kStrips = kColumns / kTileOutputs;

int64_t depth_of(const Args& a) { return a.transposed ? a.width : a.height; }
int64_t columns_of(const Args& a) { return a.transposed ? a.height : a.width; }

// The numbers of two vectors in turn, from their lower or their upper halves.
template <int kHalf, int... kLanes>
Vec in_turn(Vec even, Vec odd, std::integer_sequence<int, kLanes...>) {
  return __builtin_shufflevector(
      even, odd, (kLanes % 2 * kWidth + kHalf * kWidth / 2 + kLanes / 2)...);
}

// Each kind: columns [begin, begin + count) of a row, unscaled.
struct Bf16Stored {
  static constexpr bool kScaled = false;
  static void widen_row(const Args& a, int64_t row, int64_t begin, int64_t count, float* to) {
    const bf16* from = static_cast<const bf16*>(a.matrix) + row * a.width + begin;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
    for (; i < count; ++i) to[i] = widen(from[i]);
  }
};

struct Int8Stored {
  static constexpr bool kScaled = true;
  static void widen_row(const Args& a, int64_t row, int64_t begin, int64_t count, float* to) {
    const int8_t* from = static_cast<const int8_t*>(a.matrix) + row * a.width + begin;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      store(to + i, __builtin_convertvector(load_bytes(from + i), Vec));
    }
    for (; i < count; ++i) to[i] = from[i];
  }
};

struct Int4Stored {
  static constexpr bool kScaled = true;
  static void widen_row(const Args& a, int64_t row, int64_t begin, int64_t count, float* to) {
    const int8_t* from = static_cast<const int8_t*>(a.matrix) + (row * a.width + begin) / 2;
    constexpr auto lanes = std::make_integer_sequence<int, kWidth>();
    int64_t i = 0;
    for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
      const IntVec bytes = load_bytes(from + i / 2);
      const Vec even = __builtin_convertvector((bytes & 15) - 8, Vec);
      const Vec odd = __builtin_convertvector((bytes >> 4 & 15) - 8, Vec);
      store(to + i, in_turn<0>(even, odd, lanes));
      store(to + i + kWidth, in_turn<1>(even, odd, lanes));
    }
    for (; i < count; ++i) to[i] = (from[i / 2] >> (i % 2 * 4) & 15) - 8;
  }
};

template <class K>
void widen_scaled(const Args& a, int64_t row, int64_t begin, int64_t count, float* to) {
  K::widen_row(a, row, begin, count, to);
  if constexpr (K::kScaled) {
    const int64_t group = a.width / a.groups;
    for (int64_t i = 0, end; i < count; i = end) {
      const int64_t number = (begin + i) / group;
      end = smaller(count, (number + 1) * group - begin);
      const float scale = a.scale[row * a.groups + number];
      for (; i + kWidth <= end; i += kWidth) store(to + i, load(to + i) * scale);
      for (; i < end; ++i) to[i] *= scale;
    }
  }
}

// Where vector v of a block's columns lies at depth k.
inline float* place(float* block, int64_t depth, int v, int64_t k) {
  return block + (v / 2 * depth + k) * kTileOutputs + v % 2 * kWidth;
}

// Rows `first` ... of the matrix are the block's depth, columns from `column` on its columns.
template <class K>
void widen_block(const Args& a, int64_t first, int64_t depth, int64_t column, float* block) {
  float line[kColumns] = {};
  const int64_t count = smaller<int64_t>(kColumns, a.width - column);
  for (int64_t k = 0; k < depth; ++k) {
    widen_scaled<K>(a, first + k, column, count, line);
    for (int v = 0; v < kColumns / kWidth; ++v) {
      store(place(block, depth, v, k), load(line + v * kWidth));
    }
  }
}

// Columns `first` ... of the matrix are the block's depth, rows from `column` on its columns.
template <class K>
void widen_block_transposed(const Args& a, int64_t first, int64_t depth, int64_t column,
                            float* block) {
  float lines[kWidth][kDepth] = {};
  for (int v = 0; v < kColumns / kWidth; ++v) {
    for (int j = 0; j < kWidth; ++j) {
      const int64_t row = column + v * kWidth + j;
      if (row < a.height) {
        widen_scaled<K>(a, row, first, depth, lines[j]);
      } else {
        memset(lines[j], 0, sizeof lines[j]);
      }
    }
    for (int64_t k = 0; k < depth; k += kWidth) {
      Vec square[kWidth];
      for (int j = 0; j < kWidth; ++j) square[j] = load(lines[j] + k);
      transpose(square);
      const int64_t there = smaller<int64_t>(kWidth, depth - k);
      for (int64_t i = 0; i < there; ++i) store(place(block, depth, v, k + i), square[i]);
    }
  }
}

template <int R>
void tile_into(const float* x, const float* block, int64_t depth, float* total) {
  for (int n = 0; n < kStrips; ++n, block += depth * kTileOutputs) {
    Vec sum[R][2];
    multiply_tile<R>(x, block, depth, sum);
    for (int r = 0; r < R; ++r) {
      float* to = total + r * kColumns + n * kTileOutputs;
      store(to, load(to) + sum[r][0]);
      store(to + kWidth, load(to + kWidth) + sum[r][1]);
    }
  }
}

// Tiles [first, last) of a slab, x at depth `begin` of all and `size` deep, into columns of `out`.
template <class K>
void multiply_panel(const Args& a, const float* x, Tiles tiles, int64_t first, int64_t last,
                    int64_t begin, int64_t size, int64_t column, float* block) {
  const int64_t first_row = tiles.begin(first), rows = tiles.begin(last) - first_row;
  float* total = block + kDepth * kColumns;
  memset(total, 0, rows * kColumns * sizeof *total);
  for (int64_t k = 0; k < size; k += kDepth) {
    const int64_t depth = smaller(kDepth, size - k);
    a.transposed ? widen_block_transposed<K>(a, begin + k, depth, column, block)
                 : widen_block<K>(a, begin + k, depth, column, block);
    for (int64_t tile = first; tile < last; ++tile) {
      const int tall = tiles.size(tile);
      const float* from = x + tiles.begin(tile) * size + k * tall;
      float* to = total + (tiles.begin(tile) - first_row) * kColumns;
      LLAMA_OPS_FOR_TILE(tall, tile_into, from, block, depth, to)
    }
  }
  const int64_t columns = columns_of(a), count = smaller<int64_t>(kColumns, columns - column);
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = total + row * kColumns;
    float* to = a.out + (first_row + row) * columns + column;
    if (begin == 0) {
      memcpy(to, from, count * sizeof *to);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] += from[i];
    }
  }
}

// Writes this thread's share of a slab of x as tiles [size, rows of the tile], one after another.
void arrange(const Args& a, Tiles tiles, int64_t begin, int64_t size, int thread, int threads,
             float* to) {
  const int64_t depth = depth_of(a), blocks = (size + kDepth - 1) / kDepth;
  const Range mine = share(tiles.count * blocks, 1, thread, threads);
  for (int64_t item = mine.begin; item < mine.end; ++item) {
    const int64_t tile = item / blocks, k = item % blocks * kDepth;
    const int64_t tall = tiles.size(tile), count = smaller(kDepth, size - k);
    float* place = to + tiles.begin(tile) * size + k * tall;
    for (int64_t r = 0; r < tall; ++r) {
      const float* from = a.x + (tiles.begin(tile) + r) * depth + begin + k;
      for (int64_t i = 0; i < count; ++i) place[i * tall + r] = from[i];
    }
  }
}

template <class K>
void multiply_slab(const Args& a, const float* x, Tiles tiles, int64_t begin, int64_t size,
                   int thread, int threads) {
  const int64_t parts = (tiles.count + kTilesTogether - 1) / kTilesTogether;
  const int64_t panels = (columns_of(a) + kColumns - 1) / kColumns;
  const int64_t rows = smaller(a.rows, kTilesTogether * kTileRows);
  float* block = static_cast<float*>(scratch(kBlockScratch, (kDepth + rows) * kColumns * 4));
  const Range items = share(panels * parts, 1, thread, threads);
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t part = item % parts, column = item / parts * kColumns;
    multiply_panel<K>(a, x, tiles, tiles.count * part / parts, tiles.count * (part + 1) / parts,
                      begin, size, column, block);
  }
}

template <class K>
void multiply_all(const Args& a) {
  const int64_t depth = depth_of(a);
  const Tiles tiles = tiles_of(a.rows);
  float* x = static_cast<float*>(scratch(kTilesScratch, a.rows * smaller(depth, kSlab) * 4));
  on_threads(a.rows * a.height * a.width / kWidth, [&](int thread, int threads) {
    for (int64_t begin = 0; begin < depth; begin += kSlab) {
      const int64_t size = smaller(kSlab, depth - begin);
      arrange(a, tiles, begin, size, thread, threads, x);
      if (threads > 1) {
#pragma omp barrier
      }
      multiply_slab<K>(a, x, tiles, begin, size, thread, threads);
      if (threads > 1) {
#pragma omp barrier
      }
    }
  });
}

}  // namespace

void frozen_matmul(const llama_ops_frozen_matmul_args& a) {
  if (a.rows == 0 || columns_of(a) == 0) return;
  switch (a.kind) {
    case LLAMA_OPS_FROZEN_BF16: return multiply_all<Bf16Stored>(a);
    case LLAMA_OPS_FROZEN_INT8: return multiply_all<Int8Stored>(a);
    default: return multiply_all<Int4Stored>(a);
  }
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
