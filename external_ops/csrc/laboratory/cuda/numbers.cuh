// Storage types: widening, rounding, pairs in 32-bit registers, and 16-byte vectors.
#pragma once

#include "laboratory/cuda/platform.cuh"

namespace llama_ops {
namespace cuda {

#ifndef LLAMA_OPS_CUDA_EMULATOR
using bf16 = __nv_bfloat16;
using f16 = __half;
#endif

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __bfloat162float(x); }
__device__ inline float widen(f16 x) { return __half2float(x); }

// To the nearest, ties to even.
template <class T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline f16 narrow<f16>(float x) { return __float2half_rn(x); }

// Two numbers in one register, the first in the lower half, as fragments of mma hold them.
template <class T>
__device__ uint32_t pack(float first, float second);

#ifndef LLAMA_OPS_CUDA_EMULATOR
template <>
__device__ inline uint32_t pack<bf16>(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ inline uint32_t pack<f16>(float first, float second) {
  const __half2 both = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Sums and products of pairs, each rounded once.
__device__ inline uint32_t add_pair(uint32_t a, uint32_t b, bf16) {
  const __nv_bfloat162 sum = __hadd2_rn(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                        *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&sum);
}
__device__ inline uint32_t add_pair(uint32_t a, uint32_t b, f16) {
  const __half2 sum =
      __hadd2_rn(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&sum);
}
__device__ inline uint32_t multiply_pair(uint32_t a, uint32_t b, bf16) {
  const __nv_bfloat162 product = __hmul2_rn(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                            *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&product);
}
__device__ inline uint32_t multiply_pair(uint32_t a, uint32_t b, f16) {
  const __half2 product =
      __hmul2_rn(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&product);
}
#endif

// kCount numbers that are read or written with one access.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T at[kCount];
};

template <class T>
constexpr int kPerVector = 16 / sizeof(T);

template <int kCount, class T>
__device__ inline Vector<T, kCount> load(const T* from) {
#ifdef LLAMA_OPS_CUDA_EMULATOR
  emulator::check_alignment(from, kCount * sizeof(T));
#endif
  return *reinterpret_cast<const Vector<T, kCount>*>(from);
}

template <int kCount, class T>
__device__ inline void store(T* to, const Vector<T, kCount>& value) {
#ifdef LLAMA_OPS_CUDA_EMULATOR
  emulator::check_alignment(to, kCount * sizeof(T));
#endif
  *reinterpret_cast<Vector<T, kCount>*>(to) = value;
}

// Sum over the lanes of a warp, the same bits in all of them.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

}  // namespace cuda
}  // namespace llama_ops
