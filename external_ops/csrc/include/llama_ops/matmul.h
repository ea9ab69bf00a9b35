/* Float32 matrix products of training: forward x w, and the gradients dy w^T and x^T dy. */
#ifndef LLAMA_OPS_MATMUL_H
#define LLAMA_OPS_MATMUL_H

#include "llama_ops/common.h"

/* out = X Y, or out += X Y. The order of sums depends on the sizes alone. */
typedef struct llama_ops_matmul_args {
  const float* x; /* X: [rows, depth]; with transpose_x, its transpose [depth, rows] */
  const float* y; /* Y: [depth, columns]; with transpose_y, its transpose [columns, depth] */
  float* out;     /* [rows, columns], apart from x and y */
  int64_t rows;
  int64_t columns;
  int64_t depth;
  int transpose_x;
  int transpose_y;
  int accumulate; /* whether the product is added to what out holds */
} llama_ops_matmul_args;

LLAMA_OPS_API void llama_ops_matmul(const llama_ops_matmul_args* args);

#endif
