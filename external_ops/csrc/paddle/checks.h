// Input checks and shape helpers of the Paddle bindings.
#pragma once

#include <string>
#include <vector>

#include "llama_ops/common.h"
// Not paddle/extension.h: its Python parts take longer to compile than everything else here, and need
// headers of PyTorch compatibility in builds with CUDA.
#include "paddle/phi/api/all.h"

namespace llama_ops {

using Shape = std::vector<int64_t>;

// Raises ValueError in Python: "OP: what is wrong".
#define LLAMA_OPS_CHECK(CONDITION, OP, ...) PD_CHECK(CONDITION, OP, ": ", __VA_ARGS__)

inline int dtype_of(const paddle::Tensor& x, const char* op) {
  switch (x.dtype()) {
    case paddle::DataType::FLOAT32:
      return LLAMA_OPS_F32;
    case paddle::DataType::BFLOAT16:
      return LLAMA_OPS_BF16;
    case paddle::DataType::FLOAT16:
      if (x.is_gpu()) return LLAMA_OPS_F16;
      [[fallthrough]];
    default:
      PD_THROW(op, ": inputs have to be float32 or bfloat16; cast them, or choose the reference");
  }
}

inline std::string text(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

}  // namespace llama_ops
