// The innermost loop of float32 products: a few rows by two vectors of outputs, held in registers.
#pragma once

#include "cpu/simd.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

// Rows and outputs of the largest tile: 14 x 2 (6 x 2) accumulators leave 32 (16) registers room for
// a row of b and a broadcast number.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileOutputs = 2 * kWidth;

// total[r][v] = sum over k of a[k][r] b[k][v], with a [depth, R] and b [depth, kTileOutputs] packed.
template <int R>
inline __attribute__((always_inline)) void multiply_tile(const float* a, const float* b,
                                                         int64_t depth, Vec (&total)[R][2]) {
  for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = load(b + k * kTileOutputs), b1 = load(b + k * kTileOutputs + kWidth);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const Vec x = splat(a[k * R + r]);
      total[r][0] += x * b0;
      total[r][1] += x * b1;
    }
  }
}

// Calls FUNCTION<R, ...>(arguments) for a number of rows known only now.
#define LLAMA_OPS_TILE_CASE(R, FUNCTION, ...) \
  case R:                                     \
    FUNCTION<R>(__VA_ARGS__);                 \
    break;
#if defined(__AVX512F__)
#define LLAMA_OPS_TILE_MORE(FUNCTION, ...)                                                     \
  LLAMA_OPS_TILE_CASE(7, FUNCTION, __VA_ARGS__) LLAMA_OPS_TILE_CASE(8, FUNCTION, __VA_ARGS__)   \
  LLAMA_OPS_TILE_CASE(9, FUNCTION, __VA_ARGS__) LLAMA_OPS_TILE_CASE(10, FUNCTION, __VA_ARGS__)  \
  LLAMA_OPS_TILE_CASE(11, FUNCTION, __VA_ARGS__) LLAMA_OPS_TILE_CASE(12, FUNCTION, __VA_ARGS__) \
  LLAMA_OPS_TILE_CASE(13, FUNCTION, __VA_ARGS__) LLAMA_OPS_TILE_CASE(14, FUNCTION, __VA_ARGS__)
#else
#define LLAMA_OPS_TILE_MORE(FUNCTION, ...)
#endif
#define LLAMA_OPS_FOR_TILE(ROWS, FUNCTION, ...)                                                 \
  switch (ROWS) {                                                                             \
    LLAMA_OPS_TILE_CASE(1, FUNCTION, __VA_ARGS__) LLAMA_OPS_TILE_CASE(2, FUNCTION, __VA_ARGS__) \
    LLAMA_OPS_TILE_CASE(3, FUNCTION, __VA_ARGS__) LLAMA_OPS_TILE_CASE(4, FUNCTION, __VA_ARGS__) \
    LLAMA_OPS_TILE_CASE(5, FUNCTION, __VA_ARGS__) LLAMA_OPS_TILE_CASE(6, FUNCTION, __VA_ARGS__) \
    LLAMA_OPS_TILE_MORE(FUNCTION, __VA_ARGS__)                                                \
  }

// Rows in equal tiles: tile i of `count` holds rows [begin(i), begin(i + 1)).
struct Tiles {
  int64_t rows, count;
  int64_t begin(int64_t tile) const { return rows * tile / count; }
  int size(int64_t tile) const { return static_cast<int>(begin(tile + 1) - begin(tile)); }
};
inline Tiles tiles_of(int64_t rows) { return {rows, (rows + kTileRows - 1) / kTileRows}; }

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
