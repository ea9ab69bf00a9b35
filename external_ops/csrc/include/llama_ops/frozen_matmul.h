/* Products with matrices that do not train, as files hold them: bfloat16, or 8-bit and 4-bit integers
 * with scales. The matrix is widened a block at a time, so that it never lies in memory as float32.
 */
#ifndef LLAMA_OPS_FROZEN_MATMUL_H
#define LLAMA_OPS_FROZEN_MATMUL_H

#include "llama_ops/common.h"

enum llama_ops_frozen_kind {
  LLAMA_OPS_FROZEN_BF16 = 0,
  LLAMA_OPS_FROZEN_INT8 = 1,
  LLAMA_OPS_FROZEN_INT4 = 2 /* two in a byte, the even column in the lower half, both + 8 */
};

typedef struct llama_ops_frozen_matmul_args {
  const float* x;     /* [rows, height], or [rows, width] where transposed */
  const void* matrix; /* [height, width] of kind; INT4 [height, width / 2] bytes */
  const float* scale; /* [height, groups] of integers; null for BF16 */
  float* out;         /* x matrix [rows, width], or x matrix^T [rows, height] where transposed */
  int64_t rows;
  int64_t height;
  int64_t width;
  int64_t groups; /* divides width: neighbouring columns that share a scale; 1 for BF16 */
  int kind;       /* enum llama_ops_frozen_kind */
  int transposed;
} llama_ops_frozen_matmul_args;

LLAMA_OPS_API void llama_ops_frozen_matmul(const llama_ops_frozen_matmul_args* args);

#endif
