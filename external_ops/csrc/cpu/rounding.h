// Rows of numbers rounded to 8 bits, with one scale for each row.
#pragma once

#include "cpu/simd.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

// The scale of a row rounded to 8 bits: its largest number becomes 127. NaN where one is not finite.
inline float rounding_scale(const float* x, int64_t size) {
  const int64_t whole = size / kWidth * kWidth;
  // As integers, since that order also puts infinity and NaN above all numbers.
  BitVec most = (BitVec)load_some(x + whole, size - whole) & 0x7fffffffu;
  for (int64_t i = 0; i < whole; i += kWidth) {
    const BitVec bits = (BitVec)load(x + i) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  uint32_t bits[kWidth], top = 0;
  memcpy(bits, &most, sizeof most);
  for (int i = 0; i < kWidth; ++i) top = larger(top, bits[i]);
  if (top >= 0x7f800000u) return NAN;
  float largest;
  memcpy(&largest, &top, 4);
  return larger(largest / 127.0f, 1e-30f);
}

// The integers of a row, still in float32: x / scale to the nearest, ties to even. Infinity and NaN
// become 0; the row's scale is NaN then. `to` may be x.
inline void round_row(const float* x, int64_t size, float scale, float* to) {
  const float to_nearest = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float divisor = scale == scale ? scale : INFINITY;
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    const Vec rounded = load(x + i) / divisor + to_nearest - to_nearest;
    store(to + i, rounded == rounded ? rounded : Vec{});
  }
  for (; i < size; ++i) {
    const float rounded = x[i] / divisor + to_nearest - to_nearest;
    to[i] = rounded == rounded ? rounded : 0.0f;
  }
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
