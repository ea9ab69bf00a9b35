// Fused RMSNorm; see llama_ops/rms_norm.h.
//
// A row belongs to a team of threads: a warp where rows are short, else the whole block. The team
// keeps the first kHeld vectors of each thread in registers between the two passes over its row and
// reads the rest again, from L1. Gradients of the weight are summed in two stages with a fixed order:
// each block sums its rows in shared memory, then columns are summed over blocks.
#include "laboratory/cuda/numbers.cuh"

namespace llama_ops {
namespace cuda {
namespace {

constexpr int kHeld = 4;
constexpr int kWarpBlock = 128;     // threads of a block whose rows belong to single warps
constexpr int kMostThreads = 512;   // of a block that has a row to itself
constexpr int64_t kPartials = 512;  // blocks of the gradient: a constant, so that bits do not depend
                                    // on the device

// Sum over the team, the same bits in all of its threads. `slots` is shared memory for 2 * 32 floats,
// used in turns, so that one barrier is enough.
template <bool kBlock>
__device__ inline float team_sum(float x, float* slots, int turn) {
  x = warp_sum(x);
  if (!kBlock) return x;
  float* mine = slots + turn * kWarp;
  if (threadIdx.x % kWarp == 0) mine[threadIdx.x / kWarp] = x;
  __syncthreads();
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  return warp_sum(lane < warps ? mine[lane] : 0.0f);
}

template <bool kBlock>
struct Team {
  int size = kBlock ? blockDim.x : kWarp;
  int member = threadIdx.x % size;
  int per_block = kBlock ? 1 : kWarpBlock / kWarp;
  int index = threadIdx.x / size;
};

template <class T, int kCount>
__device__ inline float squares(const Vector<T, kCount>& x) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) total += widen(x.at[i]) * widen(x.at[i]);
  return total;
}

// The vector of x at `at`; with a residual, their sum, which is stored too.
template <class T, int kCount>
__device__ inline Vector<T, kCount> summed(const llama_ops_rms_norm_forward_args& a, int64_t at) {
  Vector<T, kCount> x = load<kCount>(static_cast<const T*>(a.x) + at);
  if (a.residual == nullptr) return x;
  const auto residual = load<kCount>(static_cast<const T*>(a.residual) + at);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x.at[i] = narrow<T>(widen(x.at[i]) + widen(residual.at[i]));
  store(static_cast<T*>(a.sum) + at, x);
  return x;
}

template <class T, int kCount>
__device__ inline void normalise(const llama_ops_rms_norm_forward_args& a, int64_t row, int column,
                                 const Vector<T, kCount>& x, float rstd) {
  const auto weight = load<kCount>(static_cast<const T*>(a.weight) + column);
  Vector<T, kCount> out;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const T normed = narrow<T>(widen(x.at[i]) * rstd);
    out.at[i] = narrow<T>(widen(normed) * widen(weight.at[i]));
  }
  store(static_cast<T*>(a.out) + row * a.size + column, out);
}

template <class T, int kCount, bool kBlock>
__global__ void __launch_bounds__(kBlock ? kMostThreads : kWarpBlock)
    forward_kernel(llama_ops_rms_norm_forward_args a) {
  const Team<kBlock> team;
  float* slots = reinterpret_cast<float*>(shared_memory());
  const int64_t row = static_cast<int64_t>(blockIdx.x) * team.per_block + team.index;
  if (row >= a.rows) return;  // whole teams only
  const int64_t start = row * a.size;
  const int stride = team.size * kCount, size = static_cast<int>(a.size);
  Vector<T, kCount> held[kHeld];
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = i * stride + team.member * kCount;
    if (column < size) held[i] = summed<T, kCount>(a, start + column);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i * stride + team.member * kCount < size) total += squares(held[i]);
  }
  const int rest = kHeld * stride + team.member * kCount;
#pragma unroll 1
  for (int column = rest; column < size; column += stride) {
    total += squares(summed<T, kCount>(a, start + column));
  }
  const float mean = __fdividef(team_sum<kBlock>(total, slots, 0), static_cast<float>(a.size));
  const float rstd = rsqrtf(mean + a.eps);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = i * stride + team.member * kCount;
    if (column < size) normalise(a, row, column, held[i], rstd);
  }
  const T* again = static_cast<const T*>(a.residual == nullptr ? a.x : a.sum) + start;
#pragma unroll 1
  for (int column = rest; column < size; column += stride) {
    normalise(a, row, column, load<kCount>(again + column), rstd);
  }
  if (team.member == 0 && a.rstd != nullptr) a.rstd[row] = rstd;
}

struct BackwardArgs {
  llama_ops_rms_norm_backward_args a;
  float* partials;  // [blocks, size], or null
};

// Sum of g * n over one vector.
template <class T, int kCount>
__device__ inline float along(const Vector<T, kCount>& x, const Vector<T, kCount>& grad,
                              const Vector<T, kCount>& weight, float rstd) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    total += widen(grad.at[i]) * widen(weight.at[i]) * (widen(x.at[i]) * rstd);
  }
  return total;
}

// sums += x, by 16 bytes where there are as many.
template <int kCount>
__device__ inline void accumulate(float* sums, const Vector<float, kCount>& x) {
  constexpr int kPart = kCount < 4 ? kCount : 4;
#pragma unroll
  for (int i = 0; i < kCount; i += kPart) {
    auto part = load<kPart>(sums + i);
#pragma unroll
    for (int j = 0; j < kPart; ++j) part.at[j] += x.at[i + j];
    store(sums + i, part);
  }
}

// Writes one vector of grad_x and adds its part to the sums of this team's columns.
template <class T, int kCount>
__device__ inline void differentiate(const llama_ops_rms_norm_backward_args& a, int64_t row,
                                     int column, const Vector<T, kCount>& x,
                                     const Vector<T, kCount>& grad, float rstd, float mean,
                                     float* sums) {
  const int64_t at = row * a.size + column;
  const auto weight = load<kCount>(static_cast<const T*>(a.weight) + column);
  Vector<T, kCount> out, grad_sum;
  Vector<float, kCount> weighted;
  if (a.grad_sum != nullptr) grad_sum = load<kCount>(static_cast<const T*>(a.grad_sum) + at);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float normed = widen(x.at[i]) * rstd, up = widen(grad.at[i]);
    float value = rstd * (up * widen(weight.at[i]) - normed * mean);
    if (a.grad_sum != nullptr) value += widen(grad_sum.at[i]);
    out.at[i] = narrow<T>(value);
    weighted.at[i] = up * normed;
  }
  store(static_cast<T*>(a.grad_x) + at, out);
  if (a.grad_residual != nullptr) store(static_cast<T*>(a.grad_residual) + at, out);
  if (sums != nullptr) accumulate(sums + column, weighted);
}

template <class T, int kCount, bool kBlock>
__device__ inline void backward_row(const llama_ops_rms_norm_backward_args& a, int64_t row,
                                    const Team<kBlock>& team, float* slots, int turn,
                                    float* sums) {
  const T* xs = static_cast<const T*>(a.x) + row * a.size;
  const T* grads = static_cast<const T*>(a.grad_out) + row * a.size;
  const T* weights = static_cast<const T*>(a.weight);
  const float rstd = a.rstd[row];
  const int stride = team.size * kCount, size = static_cast<int>(a.size);
  Vector<T, kCount> x[kHeld], grad[kHeld];
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = i * stride + team.member * kCount;
    if (column < size) {
      x[i] = load<kCount>(xs + column);
      grad[i] = load<kCount>(grads + column);
    }
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = i * stride + team.member * kCount;
    if (column < size) total += along(x[i], grad[i], load<kCount>(weights + column), rstd);
  }
  const int rest = kHeld * stride + team.member * kCount;
#pragma unroll 1
  for (int column = rest; column < size; column += stride) {
    total += along(load<kCount>(xs + column), load<kCount>(grads + column),
                   load<kCount>(weights + column), rstd);
  }
  const float mean = __fdividef(team_sum<kBlock>(total, slots, turn), static_cast<float>(a.size));
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = i * stride + team.member * kCount;
    if (column < size) differentiate(a, row, column, x[i], grad[i], rstd, mean, sums);
  }
#pragma unroll 1
  for (int column = rest; column < size; column += stride) {
    differentiate(a, row, column, load<kCount>(xs + column), load<kCount>(grads + column), rstd, mean,
                  sums);
  }
}

template <class T, int kCount, bool kBlock>
__global__ void __launch_bounds__(kBlock ? kMostThreads : kWarpBlock)
    backward_kernel(BackwardArgs args) {
  const llama_ops_rms_norm_backward_args& a = args.a;
  const Team<kBlock> team;
  float* slots = reinterpret_cast<float*>(shared_memory());
  float* columns = slots + 2 * kWarp;
  float* sums = nullptr;
  const int size = static_cast<int>(a.size);
  if (args.partials != nullptr) {
    // A thread adds to its own columns only, so no barrier is needed before the last sum.
    sums = columns + team.index * size;
    const int stride = team.size * kCount;
    for (int column = team.member * kCount; column < size; column += stride) {
      for (int i = 0; i < kCount; ++i) sums[column + i] = 0.0f;
    }
  }
  const int64_t first = blockIdx.x * team.per_block + team.index;
  int turn = 0;
  for (int64_t row = first; row < a.rows; row += gridDim.x * team.per_block) {
    backward_row<T, kCount, kBlock>(a, row, team, slots, turn, sums);
    turn ^= 1;
  }
  if (args.partials == nullptr) return;
  __syncthreads();
  for (int column = threadIdx.x; column < size; column += blockDim.x) {
    float total = 0.0f;
    for (int i = 0; i < team.per_block; ++i) total += columns[i * size + column];
    args.partials[blockIdx.x * a.size + column] = total;
  }
}

struct ColumnArgs {
  const float* partials;  // [count, size]
  void* out;              // [size]
  int64_t count, size;
};

constexpr int kColumnWarps = 8;

// Sums 32 columns: warp w takes partial rows w, w + 8, ..., then the warps' sums are added in order.
template <class T>
__global__ void __launch_bounds__(kColumnWarps * kWarp) column_kernel(ColumnArgs a) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  float total = 0.0f;
  if (column < a.size) {
    for (int64_t i = warp; i < a.count; i += kColumnWarps) total += a.partials[i * a.size + column];
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  if (warp > 0 || column >= a.size) return;
  for (int i = 1; i < kColumnWarps; ++i) total += sums[i * kWarp + lane];
  static_cast<T*>(a.out)[column] = narrow<T>(total);
}

// Threads of a block for rows of `vectors`: few enough that each holds two to four.
int block_threads(int64_t vectors) {
  const int64_t wanted = ceil_div(vectors, 2 * kWarp) * kWarp;
  return static_cast<int>(wanted > kMostThreads ? kMostThreads : wanted);
}

// Whether rows are short enough for a warp; rows read number by number are rare and always take a
// block, which saves a kernel.
template <int kCount>
constexpr bool by_warp(int64_t vectors) {
  return kCount > 1 && vectors <= kHeld * kWarp;
}

template <class T, int kCount>
int forward(const llama_ops_rms_norm_forward_args& a, void* stream) {
  const int64_t vectors = ceil_div(a.size, kCount), slots = 2 * kWarp * sizeof(float);
  if constexpr (kCount > 1) {
    if (by_warp<kCount>(vectors)) {
      const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kWarpBlock / kWarp)));
      return launch(forward_kernel<T, kCount, false>, grid, kWarpBlock, slots, stream, a);
    }
  }
  const dim3 grid(static_cast<unsigned>(a.rows));
  return launch(forward_kernel<T, kCount, true>, grid, block_threads(vectors), slots, stream, a);
}

// The rows; fills the partial sums where they are wanted.
template <class T, int kCount>
int backward_rows(const BackwardArgs& args, int64_t blocks, void* stream) {
  const int64_t vectors = ceil_div(args.a.size, kCount), slots = 2 * kWarp * sizeof(float);
  const int64_t sums = args.partials == nullptr ? 0 : args.a.size * sizeof(float);
  const dim3 grid(static_cast<unsigned>(blocks));
  if constexpr (kCount > 1) {
    if (by_warp<kCount>(vectors)) {
      const int64_t shared = slots + kWarpBlock / kWarp * sums;
      return launch(backward_kernel<T, kCount, false>, grid, kWarpBlock, shared, stream, args);
    }
  }
  return launch(backward_kernel<T, kCount, true>, grid, block_threads(vectors), slots + sums, stream,
                args);
}

template <class T, int kCount>
int backward(const BackwardArgs& args, void* stream) {
  const llama_ops_rms_norm_backward_args& a = args.a;
  const int64_t blocks = a.rows < kPartials ? a.rows : kPartials;
  const int failed = blocks == 0 ? 0 : backward_rows<T, kCount>(args, blocks, stream);
  if (failed || a.grad_weight == nullptr) return failed;
  const ColumnArgs columns{args.partials, a.grad_weight, blocks, a.size};
  const dim3 grid(static_cast<unsigned>(ceil_div(a.size, kWarp)));
  const int64_t shared = kColumnWarps * kWarp * sizeof(float);
  return launch(column_kernel<T>, grid, kColumnWarps * kWarp, shared, stream, columns);
}

template <class T>
int forward_any(const llama_ops_rms_norm_forward_args& a, void* stream) {
  const bool vectors = a.size % kPerVector<T> == 0 && aligned16(a.x) && aligned16(a.residual) &&
                       aligned16(a.weight) && aligned16(a.sum) && aligned16(a.out);
  return vectors ? forward<T, kPerVector<T>>(a, stream) : forward<T, 1>(a, stream);
}

template <class T>
int backward_any(const BackwardArgs& args, void* stream) {
  const llama_ops_rms_norm_backward_args& a = args.a;
  const bool vectors = a.size % kPerVector<T> == 0 && aligned16(a.x) && aligned16(a.weight) &&
                       aligned16(a.grad_out) && aligned16(a.grad_sum) && aligned16(a.grad_x) &&
                       aligned16(a.grad_residual);
  return vectors ? backward<T, kPerVector<T>>(args, stream) : backward<T, 1>(args, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace llama_ops

using llama_ops::cuda::bf16;
using llama_ops::cuda::f16;

int llama_ops_cuda_rms_norm_forward(const llama_ops_rms_norm_forward_args* args, void* stream) {
  if (args->rows == 0 || args->size == 0) return 0;
  switch (args->dtype) {
    case LLAMA_OPS_F32:
      return llama_ops::cuda::forward_any<float>(*args, stream);
    case LLAMA_OPS_BF16:
      return llama_ops::cuda::forward_any<bf16>(*args, stream);
    case LLAMA_OPS_F16:
      return llama_ops::cuda::forward_any<f16>(*args, stream);
    default:
      return LLAMA_OPS_CUDA_UNSUPPORTED;
  }
}

int64_t llama_ops_cuda_rms_norm_backward_workspace(const llama_ops_rms_norm_backward_args* args) {
  if (args->grad_weight == nullptr) return 0;
  const int64_t blocks = args->rows < llama_ops::cuda::kPartials ? args->rows
                                                                 : llama_ops::cuda::kPartials;
  return blocks * args->size * static_cast<int64_t>(sizeof(float));
}

int llama_ops_cuda_rms_norm_backward(const llama_ops_rms_norm_backward_args* args, void* workspace,
                                     void* stream) {
  if (args->size == 0 || (args->rows == 0 && args->grad_weight == nullptr)) return 0;
  float* partials = args->grad_weight == nullptr ? nullptr : static_cast<float*>(workspace);
  const llama_ops::cuda::BackwardArgs both{*args, partials};
  switch (args->dtype) {
    case LLAMA_OPS_F32:
      return llama_ops::cuda::backward_any<float>(both, stream);
    case LLAMA_OPS_BF16:
      return llama_ops::cuda::backward_any<bf16>(both, stream);
    case LLAMA_OPS_F16:
      return llama_ops::cuda::backward_any<f16>(both, stream);
    default:
      return LLAMA_OPS_CUDA_UNSUPPORTED;
  }
}
