/* Root-mean-square normalisation (Zhang and Sennrich 2019), and the residual sum before it. */
#ifndef LLAMA_OPS_RMS_NORM_H
#define LLAMA_OPS_RMS_NORM_H

#include "llama_ops/common.h"

/* out = (x + residual) * rstd * weight, with rstd = 1 / sqrt(mean((x + residual)^2) + eps).
 * In bf16 the sum is rounded before its statistics and (x + residual) * rstd before the weight. */
typedef struct llama_ops_rms_norm_forward_args {
  const void* x;        /* [rows, size] of dtype */
  const void* residual; /* [rows, size] of dtype, or null */
  const void* weight;   /* [size] of dtype */
  void* sum;            /* [rows, size] of dtype: x + residual, may be either; null without one */
  void* out;            /* [rows, size] of dtype; may be x where there is no residual */
  float* rstd;          /* [rows], or null where no gradient will be wanted */
  int64_t rows;
  int64_t size;
  float eps;
  int dtype; /* enum llama_ops_dtype */
} llama_ops_rms_norm_forward_args;

LLAMA_OPS_API void llama_ops_rms_norm_forward(const llama_ops_rms_norm_forward_args* args);

/* With n = x * rstd and g = grad_out * weight: grad_x = rstd * (g - n * mean(g * n)) + grad_sum and
 * grad_weight = sum over rows of grad_out * n, the same whatever the number of threads. */
typedef struct llama_ops_rms_norm_backward_args {
  const void* x;        /* [rows, size] of dtype: what was normalised (the sum if there was one) */
  const void* weight;   /* [size] of dtype */
  const float* rstd;    /* [rows], of the forward pass */
  const void* grad_out; /* [rows, size] of dtype */
  const void* grad_sum; /* [rows, size] of dtype: gradient that the sum gets elsewhere; or null */
  void* grad_x;         /* [rows, size] of dtype */
  void* grad_residual;  /* [rows, size] of dtype, the same numbers; or null */
  void* grad_weight;    /* [size] of dtype, or null where it is not wanted */
  int64_t rows;
  int64_t size;
  int dtype; /* enum llama_ops_dtype */
} llama_ops_rms_norm_backward_args;

LLAMA_OPS_API void llama_ops_rms_norm_backward(const llama_ops_rms_norm_backward_args* args);

#endif
