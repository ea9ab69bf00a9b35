// Small matrix products whose operands lie in caches, blocked for registers.
#pragma once

#include <utility>

#include "cpu/simd.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

constexpr int kProductVecs = kWidth == 16 ? 4 : 2;  // vectors of a row that stay in registers

struct NothingAhead {
  void operator()(int64_t) const {}
};

// begin(r, v) gives the sums to start from, end(r, v, sum) takes them: kRows rows of kVecs vectors of
// left * right. `left` is [rows][depth] with left_stride between rows, or kTurned [depth][rows].
// ahead(i) is called in step i and may ask for memory that is read later.
template <int kRows, int kVecs, bool kTurned, class Begin, class End, class Ahead>
inline __attribute__((always_inline)) void multiply(const float* left, int64_t left_stride,
                                                    const float* right, int64_t right_stride,
                                                    int64_t depth, const Begin& begin,
                                                    const End& end, const Ahead& ahead) {
  if (depth == 0) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) end(r, v, begin(r, v));
    }
    return;
  }
  // Unrolled by decree, in a loop that runs at least once: or the sums would go through memory before
  // and after it.
  Vec sums[kRows][kVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[r][v] = begin(r, v);
  }
  int64_t i = 0;
  do {
    ahead(i);
    Vec columns[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) columns[v] = load(right + i * right_stride + v * kWidth);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const float one = kTurned ? left[i * left_stride + r] : left[r * left_stride + i];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] += columns[v] * one;
    }
  } while (++i < depth);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) end(r, v, sums[r][v]);
  }
}

// c[m, n] = sum over k of A(m, k) * b[k, n], for kRows rows and kVecs vectors of columns.
// A(m, k) is a[k * lda + m] where kColumns, else a[m * lda + k].
template <int kRows, int kVecs, bool kColumns>
inline void product_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                          float* c, int64_t ldc) {
  const auto begin = [](int, int) __attribute__((always_inline)) { return Vec{}; };
  const auto end = [=](int r, int v, Vec sum) __attribute__((always_inline)) {
    store(c + r * ldc + v * kWidth, sum);
  };
  multiply<kRows, kVecs, kColumns>(a, lda, b, ldb, depth, begin, end, NothingAhead());
}

template <int kVecs, bool kColumns>
inline void product_panel(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows,
                          int64_t depth, float* c, int64_t ldc) {
  const int64_t step = kColumns ? 1 : lda;
  int64_t m = 0;
  // Eight as two fours: two rows have too few sums to keep the multipliers busy.
  for (; m + 6 <= rows && m + 8 != rows; m += 6) {
    product_block<6, kVecs, kColumns>(a + m * step, lda, b, ldb, depth, c + m * ldc, ldc);
  }
  for (; m + 4 <= rows; m += 4) {
    product_block<4, kVecs, kColumns>(a + m * step, lda, b, ldb, depth, c + m * ldc, ldc);
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

// Exchanges the blocks beside the diagonal of squares of four, each kHalf wide, in two rows.
template <int kHalf, int... kLanes>
inline void exchange(Vec* a, Vec* b, std::integer_sequence<int, kLanes...>) {
  const Vec upper = __builtin_shufflevector(
      *a, *b, (kLanes & kHalf ? kWidth + kLanes - kHalf : kLanes)...);
  *b = __builtin_shufflevector(*a, *b, (kLanes & kHalf ? kWidth + kLanes : kLanes + kHalf)...);
  *a = upper;
}

typedef float Four __attribute__((vector_size(16)));

inline Four load_four(const void* from) {
  Four four;
  memcpy(&four, from, sizeof four);
  return four;
}

// A vector made of fours from(0), from(1), ...
template <class From>
inline __attribute__((always_inline)) Vec fours(const From& from) {
#if LLAMA_OPS_WIDTH == 4
  return from(0);
#elif LLAMA_OPS_WIDTH == 8
  return __builtin_shufflevector(from(0), from(1), 0, 1, 2, 3, 4, 5, 6, 7);
#else
  const auto low = __builtin_shufflevector(from(0), from(1), 0, 1, 2, 3, 4, 5, 6, 7);
  const auto high = __builtin_shufflevector(from(2), from(3), 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#endif
}

// Turns rows into columns in each four of four vectors.
inline __attribute__((always_inline)) void turn_fours(Vec (&rows)[4]) {
  constexpr auto lanes = std::make_integer_sequence<int, kWidth>();
  exchange<2>(rows, rows + 2, lanes);
  exchange<2>(rows + 1, rows + 3, lanes);
  exchange<1>(rows, rows + 1, lanes);
  exchange<1>(rows + 2, rows + 3, lanes);
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
