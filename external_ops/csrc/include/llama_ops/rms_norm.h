/* Root-mean-square normalisation (Zhang and Sennrich 2019), fused with the residual sum before it. */
#ifndef LLAMA_OPS_RMS_NORM_H
#define LLAMA_OPS_RMS_NORM_H

#include "llama_ops/common.h"

/* out = (x + residual) * rstd * weight, with rstd = 1 / sqrt(mean((x + residual)^2) + eps). */
typedef struct llama_ops_rms_norm_forward_args {
  const void* x;        /* [rows, size] of dtype */
  const void* residual; /* [rows, size] of dtype, or null */
  const void* weight;   /* [size] of dtype */
  void* sum;            /* [rows, size] of dtype: x + residual; null where residual is */
  void* out;            /* [rows, size] of dtype */
  float* rstd;          /* [rows], or null where no gradient will be wanted */
  int64_t rows;
  int64_t size;
  float eps;
  int dtype; /* enum llama_ops_dtype */
} llama_ops_rms_norm_forward_args;

LLAMA_OPS_API void llama_ops_rms_norm_forward(const llama_ops_rms_norm_forward_args* args);

#endif
