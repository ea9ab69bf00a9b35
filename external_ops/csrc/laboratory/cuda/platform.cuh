// What the kernels need of CUDA: its headers, the launch, and how failures are reported.
//
// The same sources also compile as plain C++ against tests/native/cuda_emulator.h, which is included
// ahead of everything and runs kernels on the CPU; it defines LLAMA_OPS_CUDA_EMULATOR.
#pragma once

#include <stdint.h>

#include "llama_ops/cuda.h"

#ifndef LLAMA_OPS_CUDA_EMULATOR
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace llama_ops {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The block's dynamic shared memory; kernels use no other kind.
__device__ inline unsigned char* shared_memory() {
#ifdef LLAMA_OPS_CUDA_EMULATOR
  return emulator::shared_memory();
#else
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
#endif
}

// Starts kernel(args) with `shared` bytes of dynamic shared memory; returns 0 or a cudaError.
template <class Args>
int launch(void (*kernel)(Args), dim3 grid, int block, int64_t shared, void* stream, const Args& args) {
#ifdef LLAMA_OPS_CUDA_EMULATOR
  return emulator::launch([=] { kernel(args); }, grid, block, shared);
#else
  constexpr int64_t kFreely = 48 << 10;  // more has to be asked for
  if (shared > kFreely) {
    const cudaError_t set = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (set != cudaSuccess) {
      cudaGetLastError();
      return LLAMA_OPS_CUDA_UNSUPPORTED;
    }
  }
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
#endif
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether 16-byte accesses to an array are allowed; null counts as such.
inline bool aligned16(const void* array) { return reinterpret_cast<uintptr_t>(array) % 16 == 0; }

}  // namespace cuda
}  // namespace llama_ops
