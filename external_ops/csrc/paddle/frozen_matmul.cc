// Paddle operator of llama_ops/frozen_matmul.h.
#include "llama_ops/frozen_matmul.h"

#include "paddle/checks.h"

namespace llama_ops {
namespace {

using paddle::DataType;
using paddle::Tensor;
using Maybe = paddle::optional<Tensor>;

constexpr const char* kOp = "llama_ops_frozen_matmul";

int kind_of(const Tensor& matrix) {
  switch (matrix.dtype()) {
    case DataType::BFLOAT16: return LLAMA_OPS_FROZEN_BF16;
    case DataType::INT8: return LLAMA_OPS_FROZEN_INT8;
    case DataType::UINT8: return LLAMA_OPS_FROZEN_INT4;
    default: PD_THROW(kOp, ": the matrix has to be bfloat16, int8, or uint8 with two in a byte");
  }
}

std::vector<Tensor> frozen_matmul(const Tensor& x, const Tensor& matrix, const Maybe& scale,
                                  bool transposed, int64_t columns) {
  llama_ops_frozen_matmul_args args{};
  const Shape sizes = matrix.shape();
  LLAMA_OPS_CHECK(sizes.size() == 2 && matrix.numel() > 0, kOp, "matrix ", text(sizes),
                  " has to be [height, width], neither of them 0");
  args.kind = kind_of(matrix);
  args.height = sizes[0];
  args.width = args.kind == LLAMA_OPS_FROZEN_INT4 ? 2 * sizes[1] : sizes[1];
  Shape shape = x.shape();
  const int64_t depth = transposed ? args.width : args.height;
  LLAMA_OPS_CHECK(x.dtype() == DataType::FLOAT32 && !shape.empty() && shape.back() == depth, kOp,
                  "x ", text(shape), " has to be float32 [..., ", std::to_string(depth), "]");
  const bool integers = args.kind != LLAMA_OPS_FROZEN_BF16;
  LLAMA_OPS_CHECK(integers == static_cast<bool>(scale), kOp,
                  "integers need a scale, bfloat16 has none");
  args.groups = 1;
  if (scale) {
    const Shape there = scale->shape();
    LLAMA_OPS_CHECK(scale->dtype() == DataType::FLOAT32 && there.size() == 2 &&
                        there[0] == args.height && there[1] > 0 && args.width % there[1] == 0,
                    kOp, "scale ", text(there), " has to be float32 [", std::to_string(args.height),
                    ", groups], and the groups have to divide ", std::to_string(args.width));
    args.groups = there[1];
    args.scale = scale->data<float>();
  }
  args.rows = x.numel() / depth;
  shape.back() = transposed ? args.height : args.width;
  LLAMA_OPS_CHECK(shape.back() == columns, kOp, std::to_string(columns), " columns asked for, ",
                  std::to_string(shape.back()), " there");
  Tensor out = paddle::empty(shape, DataType::FLOAT32, x.place());
  args.transposed = transposed;
  args.x = x.data<float>();
  args.matrix = matrix.data();
  args.out = out.data<float>();
  llama_ops_frozen_matmul(&args);
  return {out};
}

std::vector<Shape> frozen_matmul_shapes(const Shape& x, const Shape&, const paddle::optional<Shape>&,
                                        bool, int64_t columns) {
  Shape shape = x;
  shape.back() = columns;  // a matrix's shape does not say how many numbers are in a byte
  return {shape};
}

std::vector<DataType> frozen_matmul_dtypes(const DataType&, const DataType&,
                                           const paddle::optional<DataType>&) {
  return {DataType::FLOAT32};
}

}  // namespace
}  // namespace llama_ops

PD_BUILD_OP(llama_ops_frozen_matmul)
    .Inputs({"X", "Matrix", paddle::Optional("Scale")})
    .Outputs({"Out"})
    .Attrs({"transposed: bool", "columns: int64_t"})
    .SetKernelFn(PD_KERNEL(llama_ops::frozen_matmul))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::frozen_matmul_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::frozen_matmul_dtypes));
