// What kernels over rows of logits share.
#pragma once

#include "cpu/simd.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

constexpr int kChains = 4;  // independent sums, since each addition waits for the one before

inline float row_top(const float* x, int64_t size) {
  Vec found[kChains];
  for (Vec& one : found) one = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kChains * kWidth <= size; i += kChains * kWidth) {
    for (int c = 0; c < kChains; ++c) found[c] = maximum(load(x + i + c * kWidth), found[c]);
  }
  for (; i + kWidth <= size; i += kWidth) found[0] = maximum(load(x + i), found[0]);
  float top = largest(maximum(maximum(found[0], found[1]), maximum(found[2], found[3])));
  for (; i < size; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
