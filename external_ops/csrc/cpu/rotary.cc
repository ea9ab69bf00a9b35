// Rotary position embedding; see llama_ops/rotary.h.
#include "cpu/rotary.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

constexpr int64_t kStreamed = 24 << 20;  // bytes of output that no longer wait in caches to be read

// Turns all heads of one row.
template <class T, class Table, bool kStream>
void turn_row(const llama_ops_rotary_args& a, int64_t row) {
  const int64_t half = a.half, whole = half / kWidth * kWidth;
  const int64_t entry = row / a.repeat % a.table_rows * half;
  const Table* cos = static_cast<const Table*>(a.cos) + entry;
  const Table* sin = static_cast<const Table*>(a.sin) + entry;
  const float direction = a.inverse ? -1.0f : 1.0f;
  const T* x = static_cast<const T*>(a.x) + row * a.heads * 2 * half;
  T* out = static_cast<T*>(a.out) + row * a.heads * 2 * half;
  // The row after this one travels from memory meanwhile.
  const int64_t next = row + 1 < a.rows ? a.heads * 2 * half : 0;
  for (int64_t head = 0; head < a.heads; ++head, x += 2 * half, out += 2 * half) {
    for (int64_t i = 0; i < whole; i += kWidth) {
      __builtin_prefetch(x + next + i, 0, 3);
      __builtin_prefetch(x + next + half + i, 0, 3);
      const Vec real = load(x + i), imaginary = load(x + half + i);
      const Vec c = load(cos + i), s = load(sin + i) * direction;
      const Vec turned = real * c - imaginary * s, other = imaginary * c + real * s;
      kStream ? stream(out + i, turned) : store(out + i, turned);
      kStream ? stream(out + half + i, other) : store(out + half + i, other);
    }
    for (int64_t i = whole; i < half; ++i) {
      const float real = widen(x[i]), imaginary = widen(x[half + i]);
      const float c = widen(cos[i]), s = widen(sin[i]) * direction;
      narrow(real * c - imaginary * s, out + i);
      narrow(imaginary * c + real * s, out + half + i);
    }
  }
}

template <class T, class Table>
void turn_rows(const llama_ops_rotary_args& a, Range rows) {
  const int64_t bytes = a.half * static_cast<int64_t>(sizeof(T));
  if (a.rows * a.heads * 2 * bytes >= kStreamed && bytes % 64 == 0 &&
      reinterpret_cast<uintptr_t>(a.out) % 64 == 0) {
    for (int64_t row = rows.begin; row < rows.end; ++row) turn_row<T, Table, true>(a, row);
    fence();
  } else {
    for (int64_t row = rows.begin; row < rows.end; ++row) turn_row<T, Table, false>(a, row);
  }
}

template <class T>
void turn(const llama_ops_rotary_args& a, Range rows) {
  a.table_dtype == LLAMA_OPS_F32 ? turn_rows<T, float>(a, rows) : turn_rows<T, bf16>(a, rows);
}

}  // namespace

void rotary_part(const llama_ops_rotary_args& a, int thread, int threads) {
  const Range rows = share(a.rows, 1, thread, threads);
  a.dtype == LLAMA_OPS_F32 ? turn<float>(a, rows) : turn<bf16>(a, rows);
}

void rotary(const llama_ops_rotary_args& a) {
  on_threads(a.rows * a.heads * a.half * 2,
             [&](int thread, int threads) { rotary_part(a, thread, threads); });
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
