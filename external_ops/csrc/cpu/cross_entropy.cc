// Cross-entropy from logits; see llama_ops/cross_entropy.h.
#include "llama_ops/cross_entropy.h"

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

float row_sum(const float* x, int64_t size, float top) {
  Vec found[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kWidth <= size; i += kChains * kWidth) {
    for (int c = 0; c < kChains; ++c) found[c] += exp(load(x + i + c * kWidth) - top);
  }
  for (; i + kWidth <= size; i += kWidth) found[0] += exp(load(x + i) - top);
  float rest[kWidth] = {};
  const int64_t left = size - i;
  store(rest, exp(load_some(x + i, left) - top));
  float total = sum((found[0] + found[1]) + (found[2] + found[3]));
  for (int64_t j = 0; j < left; ++j) total += rest[j];
  return total;
}

int64_t first_equal(const float* x, int64_t size, float value) {
  for (int64_t i = 0; i < size; ++i) {
    if (x[i] == value) return i;
  }
  return 0;  // all are NaN
}

void residual_row(float* x, int64_t size, float denominator, float scale) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) store(x + i, exp(load(x + i) - denominator) * scale);
  const int64_t left = size - i;
  store_some(x + i, exp(load_some(x + i, left) - denominator) * scale, left);
}

}  // namespace

void cross_entropy_statistics(const llama_ops_cross_entropy_statistics_args& a) {
  on_threads(a.rows * a.width, [&](int thread, int threads) {
    const Range rows = share(a.rows, 1, thread, threads);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const float* x = a.logits + row * a.width;
      // A row of a usual vocabulary stays in the second-level cache for the second look.
      a.top[row] = row_top(x, a.width);
      a.sum[row] = row_sum(x, a.width, a.top[row]);
      const int64_t column = a.labels[row] - a.first;
      a.target[row] = column >= 0 && column < a.width ? x[column] : 0.0f;
      if (a.best != nullptr) a.best[row] = first_equal(x, a.width, a.top[row]);
    }
  });
}

void cross_entropy_residual(const llama_ops_cross_entropy_residual_args& a) {
  on_threads(a.rows * a.width, [&](int thread, int threads) {
    const Range rows = share(a.rows, 1, thread, threads);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float* x = a.logits + row * a.width;
      if (a.scale[row] == 0.0f) {
        memset(x, 0, a.width * sizeof(float));
        continue;
      }
      residual_row(x, a.width, a.denominator[row], a.scale[row]);
      const int64_t column = a.labels[row] - a.first;
      if (column >= 0 && column < a.width) x[column] -= a.scale[row];
    }
  });
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
