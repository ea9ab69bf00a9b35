// Rotary position embedding; see llama_ops/rotary.h.
#include "laboratory/cuda/numbers.cuh"

namespace llama_ops {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct RotaryArgs {
  llama_ops_rotary_args part[2];  // queries and keys
  int64_t vectors[2];             // of each, in one half of all heads
};

template <class Table, int kCount>
__device__ inline void load_angles(const void* table, int64_t at, float (&out)[kCount]) {
  const auto loaded = load<kCount>(static_cast<const Table*>(table) + at);
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = widen(loaded.at[i]);
}

// Turns kCount neighbouring numbers of one head's first half, and their partners.
template <class T, class Table, int kCount>
__device__ inline void turn(const llama_ops_rotary_args& a, int64_t index) {
  const int64_t per_head = a.half / kCount;
  const int64_t head = index / per_head, column = index % per_head * kCount;
  const int64_t row = head / a.heads / a.repeat % a.table_rows;
  const int64_t at = head * 2 * a.half + column;
  float cos[kCount], sin[kCount];
  load_angles<Table>(a.cos, row * a.half + column, cos);
  load_angles<Table>(a.sin, row * a.half + column, sin);
  const auto real = load<kCount>(static_cast<const T*>(a.x) + at);
  const auto imaginary = load<kCount>(static_cast<const T*>(a.x) + at + a.half);
  Vector<T, kCount> out_real, out_imaginary;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float x = widen(real.at[i]), y = widen(imaginary.at[i]);
    const float s = a.inverse ? -sin[i] : sin[i];
    out_real.at[i] = narrow<T>(x * cos[i] - y * s);
    out_imaginary.at[i] = narrow<T>(y * cos[i] + x * s);
  }
  store(static_cast<T*>(a.out) + at, out_real);
  store(static_cast<T*>(a.out) + at + a.half, out_imaginary);
}

template <class T, class Table, int kCount>
__global__ void __launch_bounds__(kThreads) rotary_kernel(RotaryArgs args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < args.vectors[0]) {
    turn<T, Table, kCount>(args.part[0], index);
  } else if (index - args.vectors[0] < args.vectors[1]) {
    turn<T, Table, kCount>(args.part[1], index - args.vectors[0]);
  }
}

template <class T, class Table>
int rotate(RotaryArgs& args, void* stream) {
  // Tables are read in vectors as long as those of x, so at most four float32 at once.
  constexpr int kMost = kPerVector<T> < kPerVector<Table> ? kPerVector<T> : kPerVector<Table>;
  bool vectors = true;
  int64_t total = 0;
  for (const llama_ops_rotary_args& part : args.part) {
    vectors = vectors && part.half % kMost == 0 && aligned16(part.x) && aligned16(part.out) &&
              aligned16(part.cos) && aligned16(part.sin);
  }
  for (int i = 0; i < 2; ++i) {
    const llama_ops_rotary_args& part = args.part[i];
    args.vectors[i] = part.rows * part.heads * part.half / (vectors ? kMost : 1);
    total += args.vectors[i];
  }
  if (total == 0) return 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(total, kThreads)));
  return vectors ? launch(rotary_kernel<T, Table, kMost>, grid, kThreads, 0, stream, args)
                 : launch(rotary_kernel<T, Table, 1>, grid, kThreads, 0, stream, args);
}

template <class T>
int rotate_by(int table_dtype, RotaryArgs& args, void* stream) {
  if (table_dtype == LLAMA_OPS_F32) return rotate<T, float>(args, stream);
  return LLAMA_OPS_CUDA_UNSUPPORTED;
}

}  // namespace
}  // namespace cuda
}  // namespace llama_ops

int llama_ops_cuda_rotary(const llama_ops_rotary_args* q, const llama_ops_rotary_args* k,
                          void* stream) {
  using namespace llama_ops::cuda;
  RotaryArgs args{{*q, k == nullptr ? *q : *k}, {0, 0}};
  if (k == nullptr) args.part[1].rows = 0;
  if (args.part[1].dtype != q->dtype || args.part[1].table_dtype != q->table_dtype) {
    return LLAMA_OPS_CUDA_UNSUPPORTED;
  }
  switch (q->dtype) {
    case LLAMA_OPS_F32:
      return rotate_by<float>(q->table_dtype, args, stream);
    case LLAMA_OPS_BF16:
      return q->table_dtype == LLAMA_OPS_BF16 ? rotate<bf16, bf16>(args, stream)
                                              : rotate_by<bf16>(q->table_dtype, args, stream);
    case LLAMA_OPS_F16:
      return q->table_dtype == LLAMA_OPS_F16 ? rotate<f16, f16>(args, stream)
                                             : rotate_by<f16>(q->table_dtype, args, stream);
    default:
      return LLAMA_OPS_CUDA_UNSUPPORTED;
  }
}
