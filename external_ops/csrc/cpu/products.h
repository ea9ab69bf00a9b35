// Small matrix products whose operands lie in caches, blocked for registers.
#pragma once

#include <utility>

#include "cpu/simd.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

constexpr int kProductVecs = kWidth == 16 ? 4 : 2;  // vectors of a row that stay in registers

// c[m, n] = sum over k of A(m, k) * b[k, n], for kRows rows and kVecs vectors of columns.
// A(m, k) is a[k * lda + m] where kColumns, else a[m * lda + k].
template <int kRows, int kVecs, bool kColumns>
inline void product_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                          float* c, int64_t ldc) {
  // Unrolled by decree, or the sums would go through memory before and after the loop.
  Vec sums[kRows * kVecs];
#pragma GCC unroll 24
  for (int i = 0; i < kRows * kVecs; ++i) sums[i] = Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) row[v] = load(b + k * ldb + v * kWidth);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const float one = kColumns ? a[k * lda + m] : a[m * lda + k];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[m * kVecs + v] += one * row[v];
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kRows * kVecs; ++i) {
    store(c + i / kVecs * ldc + i % kVecs * kWidth, sums[i]);
  }
}

template <int kVecs, bool kColumns>
inline void product_panel(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows,
                          int64_t depth, float* c, int64_t ldc) {
  const int64_t step = kColumns ? 1 : lda;
  int64_t m = 0;
  for (; m + 6 <= rows; m += 6) {
    product_block<6, kVecs, kColumns>(a + m * step, lda, b, ldb, depth, c + m * ldc, ldc);
  }
  for (; m + 2 <= rows; m += 2) {
    product_block<2, kVecs, kColumns>(a + m * step, lda, b, ldb, depth, c + m * ldc, ldc);
  }
  if (m < rows) {
    product_block<1, kVecs, kColumns>(a + m * step, lda, b, ldb, depth, c + m * ldc, ldc);
  }
}

// The same for any number of rows and of columns; these are a multiple of kWidth.
template <bool kColumns>
inline void product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows,
                    int64_t columns, int64_t depth, float* c, int64_t ldc) {
  int64_t n = 0;
  for (; n + kProductVecs * kWidth <= columns; n += kProductVecs * kWidth) {
    product_panel<kProductVecs, kColumns>(a, lda, b + n, ldb, rows, depth, c + n, ldc);
  }
  for (; n < columns; n += kWidth) {
    product_panel<1, kColumns>(a, lda, b + n, ldb, rows, depth, c + n, ldc);
  }
}

// Where a lane comes from when the halves of two vectors' segments of length kLength are added.
template <int kLength>
constexpr int half_of(int lane, int second) {
  const int segment = lane / (kLength / 2), within = lane % (kLength / 2);
  return segment * kLength + within + second * (kLength / 2);
}

template <int kLength, int... kLanes>
inline Vec fold(Vec a, Vec b, std::integer_sequence<int, kLanes...>) {
  return __builtin_shufflevector(a, b, half_of<kLength>(kLanes, 0)...) +
         __builtin_shufflevector(a, b, half_of<kLength>(kLanes, 1)...);
}

// Sums of vectors: of kWidth of them, lane i is the sum of vector i.
template <int kCount = kWidth>
inline Vec sums_of_each(const Vec* vectors) {
  if constexpr (kCount == 1) {
    return vectors[0];
  } else {
    return fold<2 * kWidth / kCount>(sums_of_each<kCount / 2>(vectors),
                                     sums_of_each<kCount / 2>(vectors + kCount / 2),
                                     std::make_integer_sequence<int, kWidth>());
  }
}

// Exchanges the blocks beside the diagonal of squares of four, each kHalf wide, in two rows.
template <int kHalf, int... kLanes>
inline void exchange(Vec* a, Vec* b, std::integer_sequence<int, kLanes...>) {
  const Vec upper = __builtin_shufflevector(
      *a, *b, (kLanes & kHalf ? kWidth + kLanes - kHalf : kLanes)...);
  *b = __builtin_shufflevector(*a, *b, (kLanes & kHalf ? kWidth + kLanes : kLanes + kHalf)...);
  *a = upper;
}

// Turns kWidth rows into columns.
template <int kHalf = kWidth / 2>
inline void transpose(Vec* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if ((i & kHalf) == 0) {
      exchange<kHalf>(rows + i, rows + i + kHalf, std::make_integer_sequence<int, kWidth>());
    }
  }
  if constexpr (kHalf > 1) transpose<kHalf / 2>(rows);
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
