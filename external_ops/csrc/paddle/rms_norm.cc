// Paddle operators of llama_ops/rms_norm.h.
#include "llama_ops/rms_norm.h"

#include "paddle/device.h"

namespace llama_ops {
namespace {

using paddle::Tensor;

constexpr const char* kNorm = "llama_ops_rms_norm";
constexpr const char* kAddNorm = "llama_ops_add_rms_norm";

void check(const Tensor& x, const Tensor& weight, const char* op) {
  LLAMA_OPS_CHECK(x.shape().size() > 0 && weight.shape() == Shape{x.shape().back()}, op, "weight ",
                  text(weight.shape()), " has to have the last axis of x ", text(x.shape()));
  LLAMA_OPS_CHECK(weight.dtype() == x.dtype(), op, "x and weight differ in their types");
}

int64_t rows_of(const Tensor& x) {
  return x.numel() == 0 ? 0 : x.numel() / x.shape().back();
}

// Returns the normalised tensor, the sum (of no value without a residual) and rstd.
std::vector<Tensor> run_forward(const Tensor& x, const Tensor* residual, const Tensor& weight,
                                float eps, const char* op) {
  check(x, weight, op);
  Tensor out = paddle::empty_like(x), sum;
  Tensor rstd = paddle::empty({rows_of(x)}, paddle::DataType::FLOAT32, x.place());
  llama_ops_rms_norm_forward_args args{};
  args.x = x.data();
  if (residual != nullptr) {
    sum = paddle::empty_like(x);
    args.residual = residual->data();
    args.sum = sum.data();
  }
  args.weight = weight.data();
  args.out = out.data();
  args.rstd = rstd.data<float>();
  args.rows = rows_of(x);
  args.size = x.shape().back();
  args.eps = eps;
  args.dtype = dtype_of(x, op);
  LLAMA_OPS_RUN(rms_norm_forward, x, op, args);
  return {out, sum, rstd};
}

// Returns the gradients of what was normalised and of the weight; the first of them is also written
// to grad_residual where there is one.
std::vector<Tensor> run_backward(const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                 const Tensor& grad_out, const Tensor* grad_sum,
                                 Tensor* grad_residual, const char* op) {
  Tensor grad_x = paddle::empty_like(x), grad_weight = paddle::empty_like(weight);
  llama_ops_rms_norm_backward_args args{};
  args.x = x.data();
  args.weight = weight.data();
  args.rstd = rstd.data<float>();
  args.grad_out = grad_out.data();
  args.grad_sum = grad_sum == nullptr ? nullptr : grad_sum->data();
  args.grad_x = grad_x.data();
  args.grad_residual = grad_residual == nullptr ? nullptr : grad_residual->data();
  args.grad_weight = grad_weight.data();
  args.rows = rows_of(x);
  args.size = x.shape().back();
  args.dtype = dtype_of(x, op);
  LLAMA_OPS_RUN_WORKSPACE(rms_norm_backward, x, op, args);
  return {grad_x, grad_weight};
}

std::vector<Tensor> norm(const Tensor& x, const Tensor& weight, float eps) {
  std::vector<Tensor> made = run_forward(x, nullptr, weight, eps, kNorm);
  return {made[0], made[2]};
}

std::vector<Tensor> norm_backward(const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                  const Tensor& grad_out) {
  return run_backward(x, weight, rstd, grad_out, nullptr, nullptr, kNorm);
}

std::vector<Tensor> add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                             float eps) {
  LLAMA_OPS_CHECK(x.shape() == residual.shape() && x.dtype() == residual.dtype(), kAddNorm,
                  "x ", text(x.shape()), " and residual ", text(residual.shape()),
                  " have to have one shape and type");
  return run_forward(x, &residual, weight, eps, kAddNorm);
}

std::vector<Tensor> add_norm_backward(const Tensor& sum, const Tensor& weight, const Tensor& rstd,
                                      const Tensor& grad_out, const Tensor& grad_sum) {
  // Paddle leaves out the gradient of an output that nobody used.
  const Tensor known = grad_out.defined() ? grad_out : paddle::experimental::zeros_like(sum);
  const Tensor* through = grad_sum.defined() ? &grad_sum : nullptr;
  // Two tensors of the same numbers, since Paddle adds to gradients in place.
  Tensor residual = paddle::empty_like(sum);
  std::vector<Tensor> made =
      run_backward(sum, weight, rstd, known, through, &residual, kAddNorm);
  return {made[0], residual, made[1]};
}

Shape rows_shape(const Shape& x) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.size(); ++i) rows = x[i] < 0 || rows < 0 ? -1 : rows * x[i];
  return {rows};
}

std::vector<Shape> norm_shapes(const Shape& x, const Shape&, float) { return {x, rows_shape(x)}; }

std::vector<Shape> add_norm_shapes(const Shape& x, const Shape&, const Shape&, float) {
  return {x, x, rows_shape(x)};
}

using Type = paddle::DataType;

std::vector<Type> norm_types(const Type& x, const Type&) { return {x, Type::FLOAT32}; }

std::vector<Type> add_norm_types(const Type& x, const Type&, const Type&) {
  return {x, x, Type::FLOAT32};
}

}  // namespace
}  // namespace llama_ops

PD_BUILD_OP(llama_ops_rms_norm)
    .Inputs({"X", "Weight"})
    .Outputs({"Out", "Rstd"})
    .Attrs({"eps: float"})
    .SetKernelFn(PD_KERNEL(llama_ops::norm))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::norm_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::norm_types));

PD_BUILD_GRAD_OP(llama_ops_rms_norm)
    .Inputs({"X", "Weight", "Rstd", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Weight")})
    .SetKernelFn(PD_KERNEL(llama_ops::norm_backward));

PD_BUILD_OP(llama_ops_add_rms_norm)
    .Inputs({"X", "Residual", "Weight"})
    .Outputs({"Out", "Sum", "Rstd"})
    .Attrs({"eps: float"})
    .SetKernelFn(PD_KERNEL(llama_ops::add_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::add_norm_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::add_norm_types));

PD_BUILD_GRAD_OP(llama_ops_add_rms_norm)
    .Inputs({"Sum", "Weight", "Rstd", paddle::Grad("Out"), paddle::Grad("Sum")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Residual"), paddle::Grad("Weight")})
    .SetKernelFn(PD_KERNEL(llama_ops::add_norm_backward));
