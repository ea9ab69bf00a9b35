// Paddle operators of llama_ops/rms_norm.h.
#include "llama_ops/rms_norm.h"

#include "paddle/checks.h"

namespace llama_ops {
namespace {

std::vector<paddle::Tensor> forward(const paddle::Tensor& x, const paddle::Tensor& weight, float eps) {
  constexpr const char* op = "llama_ops_rms_norm";
  const Shape shape = x.shape();
  LLAMA_OPS_CHECK(!shape.empty() && weight.shape() == Shape{shape.back()}, op, "weight ",
                  text(weight.shape()), " has to have the last axis of x ", text(shape));
  LLAMA_OPS_CHECK(weight.dtype() == x.dtype(), op, "x and weight differ in their types");
  paddle::Tensor out = paddle::empty_like(x);
  const int64_t size = shape.back(), rows = size == 0 ? 0 : x.numel() / size;
  paddle::Tensor rstd = paddle::empty({rows}, paddle::DataType::FLOAT32, x.place());
  llama_ops_rms_norm_forward_args args{};
  args.x = x.data();
  args.weight = weight.data();
  args.out = out.data();
  args.rstd = rstd.data<float>();
  args.rows = rows;
  args.size = size;
  args.eps = eps;
  args.dtype = dtype_of(x, op);
  llama_ops_rms_norm_forward(&args);
  return {out, rstd};
}

std::vector<Shape> shapes(const Shape& x, const Shape&, float) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.size(); ++i) rows = x[i] < 0 || rows < 0 ? -1 : rows * x[i];
  return {x, {rows}};
}

std::vector<paddle::DataType> dtypes(const paddle::DataType& x, const paddle::DataType&) {
  return {x, paddle::DataType::FLOAT32};
}

}  // namespace
}  // namespace llama_ops

PD_BUILD_OP(llama_ops_rms_norm)
    .Inputs({"X", "Weight"})
    .Outputs({"Out", "Rstd"})
    .Attrs({"eps: float"})
    .SetKernelFn(PD_KERNEL(llama_ops::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::dtypes));
