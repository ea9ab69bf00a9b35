// Paddle operators of llama_ops/matmul.h.
#include "llama_ops/matmul.h"

#include "paddle/checks.h"

namespace llama_ops {
namespace {

using paddle::DataType;
using paddle::Tensor;

Tensor multiply(const Tensor& x, const Tensor& y, bool transpose_x, bool transpose_y) {
  constexpr const char* op = "llama_ops_matmul";
  const Shape first = x.shape(), second = y.shape();
  LLAMA_OPS_CHECK(first.size() == 2 && second.size() == 2 && x.dtype() == DataType::FLOAT32 &&
                      y.dtype() == DataType::FLOAT32,
                  op, "needs float32 matrices, not ", text(first), " and ", text(second));
  const int64_t depth = first[transpose_x ? 0 : 1];
  LLAMA_OPS_CHECK(second[transpose_y ? 1 : 0] == depth, op, text(first), " and ", text(second),
                  " do not fit: ", depth, " columns need as many rows");
  llama_ops_matmul_args args{};
  args.rows = first[transpose_x ? 1 : 0];
  args.columns = second[transpose_y ? 0 : 1];
  args.depth = depth;
  Tensor out = paddle::empty({args.rows, args.columns}, DataType::FLOAT32, x.place());
  args.x = x.data<float>();
  args.y = y.data<float>();
  args.out = out.data<float>();
  args.transpose_x = transpose_x;
  args.transpose_y = transpose_y;
  llama_ops_matmul(&args);
  return out;
}

std::vector<Tensor> forward(const Tensor& x, const Tensor& y, bool transpose_x, bool transpose_y) {
  return {multiply(x, y, transpose_x, transpose_y)};
}

std::vector<Tensor> backward(const Tensor& x, const Tensor& y, const Tensor& grad, bool transpose_x,
                             bool transpose_y) {
  return {transpose_x ? multiply(y, grad, transpose_y, true) : multiply(grad, y, false, !transpose_y),
          transpose_y ? multiply(grad, x, true, transpose_x) : multiply(x, grad, !transpose_x, false)};
}

std::vector<Shape> shape(const Shape& x, const Shape& y, bool transpose_x, bool transpose_y) {
  return {{x[transpose_x ? 1 : 0], y[transpose_y ? 0 : 1]}};
}

std::vector<DataType> dtype(const DataType& x, const DataType&) { return {x}; }

}  // namespace
}  // namespace llama_ops

PD_BUILD_OP(llama_ops_matmul)
    .Inputs({"X", "Y"})
    .Outputs({"Out"})
    .Attrs({"transpose_x: bool", "transpose_y: bool"})
    .SetKernelFn(PD_KERNEL(llama_ops::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::dtype));

PD_BUILD_GRAD_OP(llama_ops_matmul)
    .Inputs({"X", "Y", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Y")})
    .Attrs({"transpose_x: bool", "transpose_y: bool"})
    .SetKernelFn(PD_KERNEL(llama_ops::backward));
