/* SwiGLU (Shazeer 2020): silu(gate) * up, with silu(x) = x / (1 + e^-x). */
#ifndef LLAMA_OPS_SWIGLU_H
#define LLAMA_OPS_SWIGLU_H

#include "llama_ops/common.h"

/* Rows of gate and up may lie apart, as they do when one product made both. */
typedef struct llama_ops_swiglu_forward_args {
  const void* gate; /* [rows, size] of dtype, rows gate_stride apart */
  const void* up;   /* [rows, size] of dtype, rows up_stride apart */
  void* out;        /* [rows, size] of dtype; may be gate or up where their rows lie close */
  int64_t rows;
  int64_t size;
  int64_t gate_stride; /* in numbers */
  int64_t up_stride;
  int dtype; /* enum llama_ops_dtype */
} llama_ops_swiglu_forward_args;

LLAMA_OPS_API void llama_ops_swiglu_forward(const llama_ops_swiglu_forward_args* args);

typedef struct llama_ops_swiglu_backward_args {
  const void* gate;     /* [count] of dtype */
  const void* up;       /* [count] of dtype */
  const void* grad_out; /* [count] of dtype */
  void* grad_gate;      /* [count] of dtype */
  void* grad_up;        /* [count] of dtype */
  int64_t count;
  int dtype; /* enum llama_ops_dtype */
} llama_ops_swiglu_backward_args;

LLAMA_OPS_API void llama_ops_swiglu_backward(const llama_ops_swiglu_backward_args* args);

#endif
