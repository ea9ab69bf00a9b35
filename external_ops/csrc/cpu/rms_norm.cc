// Fused RMSNorm; see llama_ops/rms_norm.h.
#include "llama_ops/rms_norm.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

template <class T>
void forward_row(const llama_ops_rms_norm_forward_args& a, int64_t row) {
  const int64_t size = a.size, whole = size / kWidth * kWidth;
  const T* x = static_cast<const T*>(a.x) + row * size;
  const T* weight = static_cast<const T*>(a.weight);
  T* out = static_cast<T*>(a.out) + row * size;
  if (a.residual != nullptr) {
    const T* residual = static_cast<const T*>(a.residual) + row * size;
    T* total = static_cast<T*>(a.sum) + row * size;
    for (int64_t i = 0; i < whole; i += kWidth) store(total + i, load(x + i) + load(residual + i));
    for (int64_t i = whole; i < size; ++i) narrow(widen(x[i]) + widen(residual[i]), total + i);
    x = total;
  }
  Vec squares{};
  for (int64_t i = 0; i < whole; i += kWidth) squares += load(x + i) * load(x + i);
  Vec rest = load_some(x + whole, size - whole);
  const float mean = sum(squares + rest * rest) / static_cast<float>(size);
  const float rstd = 1.0f / sqrtf(mean + a.eps);
  for (int64_t i = 0; i < whole; i += kWidth) store(out + i, load(x + i) * rstd * load(weight + i));
  for (int64_t i = whole; i < size; ++i) narrow(widen(x[i]) * rstd * widen(weight[i]), out + i);
  if (a.rstd != nullptr) a.rstd[row] = rstd;
}

}  // namespace

void rms_norm_forward(const llama_ops_rms_norm_forward_args& a) {
  on_threads(a.rows * a.size, [&](int thread, int threads) {
    const Range rows = share(a.rows, 1, thread, threads);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      a.dtype == LLAMA_OPS_F32 ? forward_row<float>(a, row) : forward_row<bf16>(a, row);
    }
  });
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
