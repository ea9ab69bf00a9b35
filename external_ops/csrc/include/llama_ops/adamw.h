/* AdamW (Loshchilov and Hutter 2019) over many parameters at once, and the norm that clips them. */
#ifndef LLAMA_OPS_ADAMW_H
#define LLAMA_OPS_ADAMW_H

#include "llama_ops/common.h"

/* One parameter. */
typedef struct llama_ops_adamw_parameter {
  float* weight;        /* [size] */
  const void* gradient; /* [size] of gradient_dtype */
  float* moment1;       /* [size] */
  float* moment2;       /* [size] */
  int64_t size;
  int gradient_dtype; /* LLAMA_OPS_F32 or LLAMA_OPS_BF16 */
  float decay;        /* the weight first becomes (1 - rate * decay) of itself */
  float beta1_power;  /* beta1 to the number of this update, counted from 1 */
  float beta2_power;
} llama_ops_adamw_parameter;

/* With g = scale * gradient:
 *   moment1 = beta1 moment1 + (1 - beta1) g
 *   moment2 = beta2 moment2 + (1 - beta2) g^2
 *   weight -= rate * moment1 / (1 - beta1_power) / (sqrt(moment2 / (1 - beta2_power)) + epsilon) */
typedef struct llama_ops_adamw_args {
  const llama_ops_adamw_parameter* parameters; /* [count] */
  int64_t count;
  float rate;
  float beta1;
  float beta2;
  float epsilon;
  float scale;
} llama_ops_adamw_args;

LLAMA_OPS_API void llama_ops_adamw(const llama_ops_adamw_args* args);

/* Squares of many arrays, added up in float64, in an order that no thread count changes. */
typedef struct llama_ops_squares_args {
  const void* const* arrays; /* [count] */
  const int64_t* sizes;      /* [count] */
  const int* dtypes;         /* [count] of LLAMA_OPS_F32 or LLAMA_OPS_BF16 */
  int64_t count;
  double* total; /* [1] */
} llama_ops_squares_args;

LLAMA_OPS_API void llama_ops_squares(const llama_ops_squares_args* args);

#endif
