// fused_rms_norm_quant as GPUs have it: reference arithmetic, and the checks of the kernels.
//
// What is demanded, and where in Paddle (paddle/phi/kernels). The headers of 3.3.1 say
// RmsNormQuantKernel and RmsNormQuantGradKernel; the CUDA sources were read in releases that said
// RmsNormKernel and RmsNormGradKernel: that nothing has changed since is assumed.
//
// | demand                                 | by                                               |
// |----------------------------------------|--------------------------------------------------|
// | float32, float16 or bfloat16           | gpu/rms_norm_kernel.cu, PD_REGISTER_KERNEL       |
// | the weight in x's type, forward        | gpu/rms_norm_kernel.cu, RmsNormKernel:           |
// |                                        | norm_weight.data<T>()                            |
// | the weight also in float32, backward   | gpu/rms_norm_grad_kernel.cu, DISPATCH_SCALE_TYPE |
// | both gradients, wanted or not          | the same, cuda_rms_norm_gradient: Alloc of both  |
// | no bias, residual, scale with gradient | the same, RmsNormGradKernel                      |
// | dy in x's type, inv_var in float32     | the same, dy.data<T>(), invvar.data<float>()     |
// | one product per number, rounded once   | gpu/rms_norm_kernel.cu, AffineStore              |
// | the residual in x's type, the sum out  | the same, ResidualAddBiasLoad; that the sum is   |
// |                                        | rounded before it is normalised is assumed       |
#include <cmath>
#include <vector>

#include "numbers.h"
#include "register.h"

namespace rehearsal {
namespace {

using Optional = paddle::optional<DenseTensor>;

int64_t columns(const DenseTensor& x, int axis) {
  int64_t count = 1;
  for (int i = axis; i < x.dims().size(); ++i) count *= x.dims()[i];
  return count;
}

void rms_norm(const CPUContext& context, const DenseTensor& x, const Optional& bias,
              const Optional& residual, const DenseTensor& weight, const Optional& norm_bias,
              const float epsilon, const int axis, const float scale, const int, const float,
              const float, DenseTensor* out, DenseTensor* total, DenseTensor* inv_var) {
  PADDLE_ENFORCE_EQ(weight.dtype(), x.dtype(), phi::errors::InvalidArgument(
      "fused_rms_norm: norm_weight.data<T>() of a weight in %s, x is %s", weight.dtype(),
      x.dtype()));
  PADDLE_ENFORCE_EQ(bias || norm_bias || scale > 0, false, phi::errors::Unimplemented(
      "rehearsal device: fused_rms_norm with bias or scale"));
  const int64_t E = columns(x, axis), rows = x.numel() / E;
  const auto weights = numbers_of(weight);
  auto numbers = numbers_of(x);
  if (residual) {
    PADDLE_ENFORCE_EQ(residual->dtype(), x.dtype(), phi::errors::InvalidArgument(
        "fused_rms_norm: residual.data<T>() of %s, x is %s", residual->dtype(), x.dtype()));
    const auto added = numbers_of(*residual);
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] += added[i];
    write(context, numbers, x.dtype(), total);
    numbers = numbers_of(*total);
  }
  std::vector<double> result(x.numel()), inverse(rows);
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0;
    for (int64_t i = 0; i < E; ++i) squares += numbers[row * E + i] * numbers[row * E + i];
    inverse[row] = 1 / std::sqrt(squares / static_cast<double>(E) + epsilon);
    for (int64_t i = 0; i < E; ++i)
      result[row * E + i] = numbers[row * E + i] * inverse[row] * weights[i];
  }
  write(context, result, x.dtype(), out);
  write(context, inverse, DataType::FLOAT32, inv_var);
}

void check_grad(const DenseTensor& x, const DenseTensor& weight, const DenseTensor& inv_var,
                const DenseTensor& dy, const DenseTensor* dx, const DenseTensor* dweight) {
  PADDLE_ENFORCE_EQ(dx != nullptr && dweight != nullptr, true, phi::errors::InvalidArgument(
      "fused_rms_norm_quant_grad: the kernel writes the gradients of x and of the weight, wanted "
      "or not; of x it is %s, of the weight %s", dx ? "wanted" : "not wanted",
      dweight ? "wanted" : "not wanted"));
  PADDLE_ENFORCE_EQ(weight.dtype() == x.dtype() || weight.dtype() == DataType::FLOAT32, true,
                    phi::errors::InvalidArgument("fused_rms_norm_quant_grad: weight is %s, x %s",
                                                 weight.dtype(), x.dtype()));
  PADDLE_ENFORCE_EQ(dy.dtype() == x.dtype() && inv_var.dtype() == DataType::FLOAT32, true,
                    phi::errors::InvalidArgument(
                        "fused_rms_norm_quant_grad: x is %s, dy %s, inv_var %s", x.dtype(),
                        dy.dtype(), inv_var.dtype()));
}

void rms_norm_grad(const CPUContext& context, const DenseTensor& x, const Optional& bias,
                   const Optional& residual, const DenseTensor& weight, const Optional& norm_bias,
                   const DenseTensor& inv_var, const DenseTensor& dy, const float, const int axis,
                   const float scale, DenseTensor* dx, DenseTensor* dweight, DenseTensor*) {
  PADDLE_ENFORCE_EQ(bias || residual || norm_bias, false, phi::errors::Unimplemented(
      "bias or residual or norm_bias is not supported yet"));
  PADDLE_ENFORCE_LE(scale, 0, phi::errors::Unimplemented("quant is not supported yet"));
  check_grad(x, weight, inv_var, dy, dx, dweight);
  const int64_t E = columns(x, axis), rows = x.numel() / E;
  const auto numbers = numbers_of(x), weights = numbers_of(weight), grads = numbers_of(dy);
  const auto inverse = numbers_of(inv_var);
  std::vector<double> to_x(x.numel()), to_weight(E, 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    double along = 0;
    for (int64_t i = 0, at = row * E; i < E; ++i, ++at)
      along += grads[at] * weights[i] * numbers[at] * inverse[row] / static_cast<double>(E);
    for (int64_t i = 0, at = row * E; i < E; ++i, ++at) {
      const double normed = numbers[at] * inverse[row];
      to_x[at] = inverse[row] * (grads[at] * weights[i] - normed * along);
      to_weight[i] += grads[at] * normed;
    }
  }
  write(context, to_x, x.dtype(), dx);
  write(context, to_weight, weight.dtype(), dweight);
}

}  // namespace

void add_gpu_norm() {
  const auto cpu = phi::Backend::CPU;
  const auto bf16 = DataType::BFLOAT16, fp16 = DataType::FLOAT16, fp32 = DataType::FLOAT32;
  PUT_KERNEL("fused_rms_norm_quant", cpu, rms_norm, bf16, fp16, fp32);
  PUT_KERNEL("fused_rms_norm_quant_grad", cpu, rms_norm_grad, bf16, fp16, fp32);
}

}  // namespace rehearsal
