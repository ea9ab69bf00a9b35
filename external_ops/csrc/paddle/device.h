// Runs an operation where its tensors are: on the CPU, or on a GPU in a build with CUDA.
#pragma once

#include "paddle/checks.h"

#ifdef LLAMA_OPS_WITH_CUDA
#include "llama_ops/cuda.h"
#endif

namespace llama_ops {

// Raises ValueError for a tensor on a device without kernels.
inline void check_cpu(const paddle::Tensor& x, const char* op) {
  LLAMA_OPS_CHECK(x.is_cpu(), op, "no kernel of this build runs where the input is; move it to the ",
                  "CPU, or choose the reference");
}

#ifdef LLAMA_OPS_WITH_CUDA

inline void check_status(int status, const char* op) {
  LLAMA_OPS_CHECK(status != LLAMA_OPS_CUDA_UNSUPPORTED, op, "no CUDA kernel takes this shape or ",
                  "type (llama_ops/cuda.h lists them); choose the reference");
  LLAMA_OPS_CHECK(status == 0, op, "the launch failed with cudaError ", std::to_string(status));
}

inline void* stream_of(const paddle::Tensor& x) { return reinterpret_cast<void*>(x.stream()); }

// A workspace that outlives the call: Paddle frees memory in the order of the stream.
inline paddle::Tensor workspace_for(const paddle::Tensor& x, int64_t bytes) {
  return paddle::empty({bytes}, paddle::DataType::UINT8, x.place());
}

// LLAMA_OPS_RUN(name, x, op, args): llama_ops_name(&args) on the device of x; ..._WORKSPACE for those
// that take one on a GPU.
#define LLAMA_OPS_RUN(NAME, X, OP, ARGS)                              \
  if ((X).is_gpu()) {                                                 \
    check_status(llama_ops_cuda_##NAME(&(ARGS), stream_of(X)), OP);   \
  } else {                                                            \
    check_cpu(X, OP);                                                 \
    llama_ops_##NAME(&(ARGS));                                        \
  }
#define LLAMA_OPS_RUN_WORKSPACE(NAME, X, OP, ARGS)                                              \
  if ((X).is_gpu()) {                                                                           \
    paddle::Tensor space = workspace_for(X, llama_ops_cuda_##NAME##_workspace(&(ARGS)));        \
    check_status(llama_ops_cuda_##NAME(&(ARGS), space.data(), stream_of(X)), OP);               \
  } else {                                                                                      \
    check_cpu(X, OP);                                                                           \
    llama_ops_##NAME(&(ARGS));                                                                  \
  }

#else

#define LLAMA_OPS_RUN(NAME, X, OP, ARGS) \
  check_cpu(X, OP);                      \
  llama_ops_##NAME(&(ARGS));
#define LLAMA_OPS_RUN_WORKSPACE LLAMA_OPS_RUN

#endif

}  // namespace llama_ops
