// Fused RMSNorm; see llama_ops/rms_norm.h.
#include "cpu/rms_norm.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

constexpr int kUnroll = 4;               // vectors in flight, to hide the latency of sums
constexpr int64_t kStreamed = 24 << 20;  // bytes of output that do not wait in caches to be read
constexpr int64_t kSlabRows = 32;        // rows whose gradients of the weight are added up together
constexpr int64_t kMostSlabs = 64;

// What storing and loading again would make of these numbers.
inline Vec rounded(Vec x, const float*) { return x; }
inline Vec rounded(Vec x, const bf16*) {
  BitVec bits = (BitVec)x;
  return (Vec)((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

template <bool kStream, class T>
inline void put(T* to, Vec x) {
  kStream ? stream(to, x) : store(to, x);
}

inline bool aligned(const void* to) { return reinterpret_cast<uintptr_t>(to) % 64 == 0; }

// The sum of f(i, count) over the vectors of a row; count is kWidth but for the last.
template <class F>
inline float sum_of(int64_t size, const F& f) {
  const int64_t whole = size / kWidth * kWidth;
  const int64_t unrolled = size / (kUnroll * kWidth) * (kUnroll * kWidth);
  Vec sums[kUnroll] = {};
  int64_t i = 0;
  for (; i < unrolled; i += kUnroll * kWidth) {
    for (int u = 0; u < kUnroll; ++u) sums[u] += f(i + u * kWidth, kWidth);
  }
  for (; i < whole; i += kWidth) sums[0] += f(i, kWidth);
  if (i < size) sums[1] += f(i, static_cast<int>(size - i));
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
inline Vec take(const T* from, int count) {
  return count == kWidth ? load(from) : load_some(from, count);
}

template <class T, bool kStream>
void forward_row(const llama_ops_rms_norm_forward_args& a, int64_t row) {
  const int64_t size = a.size, whole = size / kWidth * kWidth;
  const int rest = static_cast<int>(size - whole);
  const T* x = static_cast<const T*>(a.x) + row * size;
  const T* weight = static_cast<const T*>(a.weight);
  T* out = static_cast<T*>(a.out) + row * size;
  float squares;
  if (a.residual != nullptr) {
    const T* residual = static_cast<const T*>(a.residual) + row * size;
    T* total = static_cast<T*>(a.sum) + row * size;
    squares = sum_of(size, [&](int64_t i, int count) {
      const Vec both = rounded(take(x + i, count) + take(residual + i, count), x);
      count == kWidth ? store(total + i, both) : store_some(total + i, both, count);
      return both * both;
    });
    x = total;
  } else {
    squares = sum_of(size, [&](int64_t i, int count) {
      const Vec one = take(x + i, count);
      return one * one;
    });
  }
  const float rstd = 1.0f / sqrtf(squares / static_cast<float>(size) + a.eps);
  // The row after this one travels from memory meanwhile.
  const bool more = row + 1 < a.rows;
  const T* next = static_cast<const T*>(a.x) + (row + more) * size;
  for (int64_t i = 0; i < whole; i += kWidth) {
    __builtin_prefetch(next + i, 0, 3);
    put<kStream>(out + i, rounded(load(x + i) * rstd, x) * load(weight + i));
  }
  if (rest > 0) {
    const Vec normed = rounded(load_some(x + whole, rest) * rstd, x);
    store_some(out + whole, normed * load_some(weight + whole, rest), rest);
  }
  if (a.rstd != nullptr) a.rstd[row] = rstd;
}

template <class T>
void forward_rows(const llama_ops_rms_norm_forward_args& a, Range rows) {
  const int64_t bytes = a.size * static_cast<int64_t>(sizeof(T));
  if (a.rows * bytes >= kStreamed && bytes % 64 == 0 && aligned(a.out)) {
    for (int64_t row = rows.begin; row < rows.end; ++row) forward_row<T, true>(a, row);
    fence();
  } else {
    for (int64_t row = rows.begin; row < rows.end; ++row) forward_row<T, false>(a, row);
  }
}

// Also adds the row's gradient of the weight to grad_weight.
template <class T, bool kStream>
void backward_row(const llama_ops_rms_norm_backward_args& a, int64_t row, float* grad_weight) {
  const int64_t size = a.size, whole = size / kWidth * kWidth;
  const T* x = static_cast<const T*>(a.x) + row * size;
  const T* weight = static_cast<const T*>(a.weight);
  const T* grad = static_cast<const T*>(a.grad_out) + row * size;
  const T* through =
      a.grad_sum == nullptr ? nullptr : static_cast<const T*>(a.grad_sum) + row * size;
  T* grad_x = static_cast<T*>(a.grad_x) + row * size;
  T* second = a.grad_residual == nullptr ? nullptr : static_cast<T*>(a.grad_residual) + row * size;
  const float rstd = a.rstd[row];
  const float along = rstd / static_cast<float>(size) * sum_of(size, [&](int64_t i, int count) {
    return take(grad + i, count) * take(weight + i, count) * take(x + i, count);
  });
  const int64_t next = row + 1 < a.rows ? size : 0;
  const auto change = [&](int64_t i, int count) {
    const Vec up = take(grad + i, count), normed = take(x + i, count) * rstd;
    Vec change = (up * take(weight + i, count) - normed * along) * rstd;
    if (through != nullptr) change += take(through + i, count);
    if (grad_weight != nullptr) {
      const Vec more = up * normed;
      if (count == kWidth) {
        store(grad_weight + i, load(grad_weight + i) + more);
      } else {
        store_some(grad_weight + i, load_some(grad_weight + i, count) + more, count);
      }
    }
    return change;
  };
  for (int64_t i = 0; i < whole; i += kWidth) {
    __builtin_prefetch(x + next + i, 0, 2);
    __builtin_prefetch(grad + next + i, 0, 2);
    const Vec found = change(i, kWidth);
    put<kStream>(grad_x + i, found);
    if (second != nullptr) put<kStream>(second + i, found);
  }
  const int rest = static_cast<int>(size - whole);
  if (rest > 0) {
    const Vec found = change(whole, rest);
    store_some(grad_x + whole, found, rest);
    if (second != nullptr) store_some(second + whole, found, rest);
  }
}

template <class T>
void backward_rows(const llama_ops_rms_norm_backward_args& a, Range rows, float* grad_weight) {
  const int64_t bytes = a.size * static_cast<int64_t>(sizeof(T));
  if (a.rows * bytes >= kStreamed && bytes % 64 == 0 && aligned(a.grad_x) &&
      aligned(a.grad_residual)) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      backward_row<T, true>(a, row, grad_weight);
    }
    fence();
  } else {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      backward_row<T, false>(a, row, grad_weight);
    }
  }
}

int64_t slabs_of(int64_t rows) {
  return larger<int64_t>(1, smaller(kMostSlabs, (rows + kSlabRows - 1) / kSlabRows));
}

template <class T>
void backward(const llama_ops_rms_norm_backward_args& a, float* partial, int thread, int threads) {
  // Slabs depend on the rows alone, so that sums are the same for any number of threads.
  const int64_t slabs = slabs_of(a.rows), size = a.size;
  const Range mine = share(slabs, 1, thread, threads);
  for (int64_t slab = mine.begin; slab < mine.end; ++slab) {
    float* sums = partial == nullptr ? nullptr : partial + slab * size;
    if (sums != nullptr) memset(sums, 0, size * sizeof(float));
    backward_rows<T>(a, share(a.rows, 1, static_cast<int>(slab), static_cast<int>(slabs)), sums);
  }
  if (partial == nullptr) return;
  if (threads > 1) {
#pragma omp barrier
  }
  T* grad_weight = static_cast<T*>(a.grad_weight);
  const Range columns = share(size, kWidth, thread, threads);
  for (int64_t i = columns.begin; i < columns.end; i += kWidth) {
    const int count = static_cast<int>(smaller<int64_t>(kWidth, columns.end - i));
    Vec total{};
    for (int64_t slab = 0; slab < slabs; ++slab) total += take(partial + slab * size + i, count);
    count == kWidth ? store(grad_weight + i, total) : store_some(grad_weight + i, total, count);
  }
}

}  // namespace

void rms_norm_forward_part(const llama_ops_rms_norm_forward_args& a, int thread, int threads) {
  const Range rows = share(a.rows, 1, thread, threads);
  a.dtype == LLAMA_OPS_F32 ? forward_rows<float>(a, rows) : forward_rows<bf16>(a, rows);
}

void rms_norm_forward(const llama_ops_rms_norm_forward_args& a) {
  on_threads(a.rows * a.size,
             [&](int thread, int threads) { rms_norm_forward_part(a, thread, threads); });
}

void rms_norm_backward(const llama_ops_rms_norm_backward_args& a) {
  const int64_t bytes = slabs_of(a.rows) * a.size * static_cast<int64_t>(sizeof(float));
  float* partial = a.grad_weight == nullptr ? nullptr : static_cast<float*>(scratch(0, bytes));
  on_threads(a.rows * a.size, [&](int thread, int threads) {
    a.dtype == LLAMA_OPS_F32 ? backward<float>(a, partial, thread, threads)
                             : backward<bf16>(a, partial, thread, threads);
  });
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
