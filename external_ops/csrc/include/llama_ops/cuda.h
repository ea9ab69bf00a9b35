/* The operations on CUDA devices, sm_80 and newer. Arguments are those of the CPU functions with
 * pointers into device memory; work is queued on `stream` (a cudaStream_t) of the current device.
 *
 * Each returns 0, a cudaError, or LLAMA_OPS_CUDA_UNSUPPORTED for shapes or types without a kernel;
 * nothing has been queued then. Equal inputs give equal bits on every run.
 */
#ifndef LLAMA_OPS_CUDA_H
#define LLAMA_OPS_CUDA_H

#include "llama_ops/flash_attention.h"
#include "llama_ops/rms_norm.h"
#include "llama_ops/rotary.h"

#define LLAMA_OPS_CUDA_UNSUPPORTED (-1)

/* float32, bf16, fp16; any rows and size. */
LLAMA_OPS_API int llama_ops_cuda_rms_norm_forward(const llama_ops_rms_norm_forward_args* args,
                                                  void* stream);

/* float32, bf16, fp16; size up to what fits shared memory in float32 (40960 on sm_80). */
LLAMA_OPS_API int llama_ops_cuda_rms_norm_backward(const llama_ops_rms_norm_backward_args* args,
                                                   void* workspace, void* stream);

/* Bytes of device memory that the function above needs as workspace, 16-byte aligned. */
LLAMA_OPS_API int64_t
llama_ops_cuda_rms_norm_backward_workspace(const llama_ops_rms_norm_backward_args* args);

/* Turns queries and keys in one launch; `k` may be null. Their types have to be the same. */
LLAMA_OPS_API int llama_ops_cuda_rotary(const llama_ops_rotary_args* q,
                                        const llama_ops_rotary_args* k, void* stream);

/* bf16 and fp16 of size 64 or 128; prefix not above keys; 16-byte aligned arrays. */
LLAMA_OPS_API int
llama_ops_cuda_flash_attention_forward(const llama_ops_flash_attention_forward_args* args,
                                       void* stream);

/* As above; the sums of a key's gradient run over all queries and heads in one block, in order. */
LLAMA_OPS_API int
llama_ops_cuda_flash_attention_backward(const llama_ops_flash_attention_backward_args* args,
                                        void* workspace, void* stream);

/* Bytes of device memory that the function above needs as workspace, 16-byte aligned. */
LLAMA_OPS_API int64_t
llama_ops_cuda_flash_attention_backward_workspace(const llama_ops_flash_attention_backward_args* args);

/* out = x W^T (+ bias) with integer weights as they lie in checkpoints (llm/llama/quantization); CPUs
 * take packed panels instead (llama_ops/linear.h). Weights are integer * scale, rounded to dtype where
 * groups > 1; sums are in float32. */
typedef struct llama_ops_cuda_linear_args {
  const void* x;      /* [rows, inputs] of dtype */
  const void* weight; /* int8 [outputs, inputs]; 4 bits: uint8 [outputs, inputs / 2], two a byte, the
                       * even input in the lower half, both + 8 */
  const float* scale; /* [outputs, groups] */
  const void* bias;   /* [outputs] of dtype, or null */
  void* out;          /* [rows, outputs] of dtype */
  int64_t rows, outputs, inputs, groups;
  int bits;  /* 8 or 4 */
  int dtype; /* bf16 or fp16; with fp16, weights have to stay below 4096 */
} llama_ops_cuda_linear_args;

/* Inputs divisible by 128 / bits; groups of a power of two inputs, 128 / bits at least; x and weight
 * 16-byte aligned. */
LLAMA_OPS_API int llama_ops_cuda_linear(const llama_ops_cuda_linear_args* args, void* stream);

#endif
