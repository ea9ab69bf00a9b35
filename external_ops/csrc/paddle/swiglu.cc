// Paddle operator of llama_ops/swiglu.h.
#include "llama_ops/swiglu.h"

#include "paddle/checks.h"

namespace llama_ops {
namespace {

using paddle::Tensor;

constexpr const char* kOp = "llama_ops_swiglu";

std::vector<Tensor> forward(const Tensor& gate, const Tensor& up) {
  LLAMA_OPS_CHECK(gate.shape() == up.shape() && gate.dtype() == up.dtype(), kOp, "gate ",
                  text(gate.shape()), " and up ", text(up.shape()),
                  " have to have one shape and type");
  Tensor out = paddle::empty_like(gate);
  llama_ops_swiglu_forward_args args{};
  args.gate = gate.data();
  args.up = up.data();
  args.out = out.data();
  args.rows = 1;
  args.size = args.gate_stride = args.up_stride = gate.numel();
  args.dtype = dtype_of(gate, kOp);
  llama_ops_swiglu_forward(&args);
  return {out};
}

std::vector<Tensor> backward(const Tensor& gate, const Tensor& up, const Tensor& grad) {
  Tensor grad_gate = paddle::empty_like(gate), grad_up = paddle::empty_like(up);
  llama_ops_swiglu_backward_args args{};
  args.gate = gate.data();
  args.up = up.data();
  args.grad_out = grad.data();
  args.grad_gate = grad_gate.data();
  args.grad_up = grad_up.data();
  args.count = gate.numel();
  args.dtype = dtype_of(gate, kOp);
  llama_ops_swiglu_backward(&args);
  return {grad_gate, grad_up};
}

std::vector<Shape> shapes(const Shape& gate, const Shape&) { return {gate}; }

using Type = paddle::DataType;

std::vector<Type> types(const Type& gate, const Type&) { return {gate}; }

}  // namespace
}  // namespace llama_ops

PD_BUILD_OP(llama_ops_swiglu)
    .Inputs({"Gate", "Up"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(llama_ops::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::types));

PD_BUILD_GRAD_OP(llama_ops_swiglu)
    .Inputs({"Gate", "Up", paddle::Grad("Out")})
    .Outputs({paddle::Grad("Gate"), paddle::Grad("Up")})
    .SetKernelFn(PD_KERNEL(llama_ops::backward));
