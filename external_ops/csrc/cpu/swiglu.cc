// SwiGLU; see llama_ops/swiglu.h.
#include "cpu/swiglu.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

constexpr int64_t kStreamed = 24 << 20;  // bytes of output that no longer wait in caches to be read

inline bool aligned(const void* to) { return reinterpret_cast<uintptr_t>(to) % 64 == 0; }

// Asks for numbers that will be wanted soon; with three arrays or more in turn, processors do not
// guess far enough ahead. Past the end of an array nothing happens.
template <class T>
inline void ahead(const T* from) {
  __builtin_prefetch(from + 512, 0, 3);
}

// 1 + e^-x is infinite for very negative x; dividing by it gives the right 0, or NaN of -infinity.
inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

template <class T>
inline Vec take(const T* from, int count) {
  return count == kWidth ? load(from) : load_some(from, count);
}

template <class T>
inline void put(T* to, Vec x, int count, bool streams) {
  if (count < kWidth) {
    store_some(to, x, count);
  } else {
    streams ? stream(to, x) : store(to, x);
  }
}

template <class T>
void forward_row(const llama_ops_swiglu_forward_args& a, int64_t row, Range columns, bool streams) {
  const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
  const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
  T* out = static_cast<T*>(a.out) + row * a.size;
  for (int64_t i = columns.begin; i < columns.end; i += kWidth) {
    ahead(gate + i);
    ahead(up + i);
    const int count = static_cast<int>(smaller<int64_t>(kWidth, columns.end - i));
    put(out + i, silu(take(gate + i, count)) * take(up + i, count), count, streams);
  }
}

template <class T>
void forward(const llama_ops_swiglu_forward_args& a, Range rows, Range columns) {
  const int64_t bytes = a.size * static_cast<int64_t>(sizeof(T));
  const bool streams = a.rows * bytes >= kStreamed && bytes % 64 == 0 && aligned(a.out);
  for (int64_t row = rows.begin; row < rows.end; ++row) forward_row<T>(a, row, columns, streams);
  if (streams) fence();
}

// With s = 1 / (1 + e^-gate): d silu / d gate = s * (1 + gate * (1 - s)).
template <class T>
void backward(const llama_ops_swiglu_backward_args& a, Range range) {
  const T* gate = static_cast<const T*>(a.gate);
  const T* up = static_cast<const T*>(a.up);
  const T* grad = static_cast<const T*>(a.grad_out);
  T* grad_gate = static_cast<T*>(a.grad_gate);
  T* grad_up = static_cast<T*>(a.grad_up);
  const bool streams = a.count * static_cast<int64_t>(sizeof(T)) >= kStreamed &&
                       aligned(grad_gate) && aligned(grad_up);
  for (int64_t i = range.begin; i < range.end; i += kWidth) {
    ahead(gate + i);
    ahead(up + i);
    ahead(grad + i);
    const int count = static_cast<int>(smaller<int64_t>(kWidth, range.end - i));
    const Vec x = take(gate + i, count), from = take(grad + i, count);
    const Vec sigmoid = 1.0f / (1.0f + exp(-x));
    const Vec slope = sigmoid * (1.0f + x * (1.0f - sigmoid));
    put(grad_gate + i, from * take(up + i, count) * slope, count, streams);
    put(grad_up + i, from * (x * sigmoid), count, streams);
  }
  if (streams) fence();
}

}  // namespace

void swiglu_forward_part(const llama_ops_swiglu_forward_args& a, int thread, int threads) {
  const bool wide = a.rows < threads;
  const Range rows = wide ? Range{0, a.rows} : share(a.rows, 1, thread, threads);
  const Range columns = wide ? share(a.size, kWidth, thread, threads) : Range{0, a.size};
  a.dtype == LLAMA_OPS_F32 ? forward<float>(a, rows, columns) : forward<bf16>(a, rows, columns);
}

void swiglu_forward(const llama_ops_swiglu_forward_args& a) {
  // An exponential costs as much as some ten simple operations.
  on_threads(10 * a.rows * a.size,
             [&](int thread, int threads) { swiglu_forward_part(a, thread, threads); });
}

void swiglu_backward(const llama_ops_swiglu_backward_args& a) {
  on_threads(10 * a.count, [&](int thread, int threads) {
    const Range range = share(a.count, kWidth, thread, threads);
    a.dtype == LLAMA_OPS_F32 ? backward<float>(a, range) : backward<bf16>(a, range);
  });
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
