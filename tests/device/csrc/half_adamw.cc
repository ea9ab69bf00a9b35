// adamw for parameters in half precision as GPUs have it: arithmetic on a master weight in float32.
//
// Other devices' kernels take the same, so it is there in both roles.
//
// What is demanded, and where in Paddle 3.3.1 (paddle/phi/kernels/gpu/adamw_kernel.cu):
//
// | demand                                 | by                                                   |
// |----------------------------------------|------------------------------------------------------|
// | a float32 master with multi_precision  | AdamwDenseKernel: master_param->data<MPDType>()      |
// | the gradient in float32 or the type    | AdamwDenseKernel: grad.data<float>(), grad.data<T>() |
// | moments in float32, or both bfloat16   | AdamwDenseKernel: LAUNCH_ADAMW_KERNEL                |
// | the learning rate in float32           | AdamwDenseKernel: learning_rate.data<MPDType>()      |
// | skip_update leaves everything as it is | AdamwDenseKernel                                     |
// | beta powers grow unless global         | AdamwDenseKernel: UpdateBetaPowKernel                |
#include <cmath>
#include <vector>

#include "numbers.h"
#include "register.h"

namespace rehearsal {
namespace {

using Optional = paddle::optional<DenseTensor>;

void check(const DenseTensor& param, const DenseTensor& grad, const DenseTensor& rate,
           const DenseTensor& moment1, const DenseTensor& moment2, const Optional& master,
           bool multi_precision) {
  const DataType fp32 = DataType::FLOAT32;
  PADDLE_ENFORCE_EQ(grad.dtype() == param.dtype() || grad.dtype() == fp32, true,
                    phi::errors::InvalidArgument("adamw: the parameter is %s, its gradient %s",
                                                 param.dtype(), grad.dtype()));
  PADDLE_ENFORCE_EQ(!multi_precision || (master && master->dtype() == fp32), true,
                    phi::errors::InvalidArgument("adamw: no master weight in float32"));
  const bool bf16 = moment1.dtype() == DataType::BFLOAT16 && moment2.dtype() == DataType::BFLOAT16;
  PADDLE_ENFORCE_EQ((moment1.dtype() == fp32 && moment2.dtype() == fp32) || bf16, true,
                    phi::errors::InvalidArgument("adamw: moments are %s and %s", moment1.dtype(),
                                                 moment2.dtype()));
  PADDLE_ENFORCE_EQ(rate.dtype(), fp32, phi::errors::InvalidArgument(
      "adamw: the learning rate is %s, not float32", rate.dtype()));
}

void adamw(const CPUContext& context, const DenseTensor& param, const DenseTensor& grad,
           const DenseTensor& rate, const DenseTensor& moment1, const DenseTensor& moment2,
           const Optional&, const DenseTensor& power1, const DenseTensor& power2,
           const Optional& master, const Optional& skip, const phi::Scalar& beta1,
           const phi::Scalar& beta2, const phi::Scalar& epsilon, float rate_ratio, float decay,
           bool with_decay, bool, int64_t, bool multi_precision, bool global_powers, bool amsgrad,
           DenseTensor* param_out, DenseTensor* moment1_out, DenseTensor* moment2_out,
           DenseTensor*, DenseTensor* power1_out, DenseTensor* power2_out,
           DenseTensor* master_out) {
  check(param, grad, rate, moment1, moment2, master, multi_precision);
  PADDLE_ENFORCE_EQ(amsgrad, false, phi::errors::Unimplemented("rehearsal device: amsgrad"));
  auto p = numbers_of(multi_precision ? *master : param);
  auto m = numbers_of(moment1), v = numbers_of(moment2);
  const auto g = numbers_of(grad);
  const bool skipped = skip && skip->data<bool>()[0];
  const double b1 = beta1.to<float>(), b2 = beta2.to<float>(), eps = epsilon.to<float>();
  const double p1 = numbers_of(power1)[0], p2 = numbers_of(power2)[0];
  const double lr = numbers_of(rate)[0] * rate_ratio;
  for (size_t i = 0; i < p.size() && !skipped; ++i) {
    if (with_decay) p[i] *= 1 - lr * decay;
    m[i] = b1 * m[i] + (1 - b1) * g[i];
    v[i] = b2 * v[i] + (1 - b2) * g[i] * g[i];
    p[i] -= lr / (1 - p1) * m[i] / (std::sqrt(v[i] / (1 - p2)) + eps);
  }
  write(context, m, moment1.dtype(), moment1_out);
  write(context, v, moment2.dtype(), moment2_out);
  if (multi_precision) write(context, p, DataType::FLOAT32, master_out);
  write(context, p, param.dtype(), param_out);
  if (global_powers) return;
  write(context, {skipped ? p1 : p1 * b1}, DataType::FLOAT32, power1_out);
  write(context, {skipped ? p2 : p2 * b2}, DataType::FLOAT32, power2_out);
}

}  // namespace

void add_half_adamw() {
  PUT_KERNEL("adamw", phi::Backend::CPU, adamw, DataType::BFLOAT16, DataType::FLOAT16);
}

}  // namespace rehearsal
