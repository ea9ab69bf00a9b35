// Paddle operator of llama_ops/rotary.h.
#include "llama_ops/rotary.h"

#include "paddle/device.h"

namespace llama_ops {
namespace {

using paddle::Tensor;

constexpr const char* kOp = "llama_ops_rotary";

// Finds which rows of x share a row of the tables: those of leading axes (a table for all
// sequences of a batch), or of trailing ones. `lead` and `own` are the axes before heads, of x and
// of the tables.
bool broadcasts(const Shape& lead, const Shape& own, llama_ops_rotary_args* args) {
  if (lead.size() != own.size()) return false;
  size_t first = 0, end = own.size();
  while (first < end && own[first] == 1) ++first;
  while (end > first && own[end - 1] == 1) --end;
  args->table_rows = args->repeat = 1;
  for (size_t axis = 0; axis < lead.size(); ++axis) {
    if (axis >= end) args->repeat *= lead[axis];
    if (axis < first || axis >= end) continue;
    if (own[axis] != lead[axis]) return false;
    args->table_rows *= lead[axis];
  }
  return true;
}

std::vector<Tensor> turn(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  const Shape shape = x.shape(), table = cos.shape();
  const size_t axes = shape.size();
  LLAMA_OPS_CHECK(axes >= 2 && shape[axes - 1] % 2 == 0, kOp, "x ", text(shape),
                  " has to end in heads and an even head dimension");
  LLAMA_OPS_CHECK(sin.shape() == table && sin.dtype() == cos.dtype(), kOp, "cos ", text(table),
                  " and sin ", text(sin.shape()), " have to have one shape and type");
  llama_ops_rotary_args args{};
  const bool fits = table.size() == axes && table[axes - 2] == 1 &&
                    table[axes - 1] == shape[axes - 1] / 2 &&
                    broadcasts(Shape(shape.begin(), shape.end() - 2),
                               Shape(table.begin(), table.end() - 2), &args);
  LLAMA_OPS_CHECK(fits, kOp, "cos ", text(table), " has to be [..., 1, D/2] for x [..., H, D] ",
                  text(shape), ", with leading or trailing axes of 1 before that; expand it");
  Tensor out = paddle::empty_like(x);
  args.x = x.data();
  args.cos = cos.data();
  args.sin = sin.data();
  args.out = out.data();
  args.heads = shape[axes - 2];
  args.half = shape[axes - 1] / 2;
  args.rows = x.numel() == 0 ? 0 : x.numel() / (2 * args.heads * args.half);
  args.inverse = inverse;
  args.dtype = dtype_of(x, kOp);
  args.table_dtype = dtype_of(cos, kOp);
#ifdef LLAMA_OPS_WITH_CUDA
  if (x.is_gpu()) {
    check_status(llama_ops_cuda_rotary(&args, nullptr, stream_of(x)), kOp);
    return {out};
  }
#endif
  check_cpu(x, kOp);
  llama_ops_rotary(&args);
  return {out};
}

std::vector<Tensor> forward(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  return turn(x, cos, sin, false);
}

std::vector<Tensor> backward(const Tensor& cos, const Tensor& sin, const Tensor& grad) {
  return turn(grad, cos, sin, true);
}

std::vector<Shape> shapes(const Shape& x, const Shape&, const Shape&) { return {x}; }

using Type = paddle::DataType;

std::vector<Type> types(const Type& x, const Type&, const Type&) { return {x}; }

}  // namespace
}  // namespace llama_ops

PD_BUILD_OP(llama_ops_rotary)
    .Inputs({"X", "Cos", "Sin"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(llama_ops::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::types));

PD_BUILD_GRAD_OP(llama_ops_rotary)
    .Inputs({"Cos", "Sin", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X")})
    .SetKernelFn(PD_KERNEL(llama_ops::backward));
