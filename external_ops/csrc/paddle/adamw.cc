// Paddle operators of llama_ops/adamw.h.
#include "llama_ops/adamw.h"

#include "paddle/checks.h"

namespace llama_ops {
namespace {

using paddle::DataType;
using paddle::Tensor;
using Tensors = std::vector<Tensor>;

// One of a parameter's state that is as large as it, or one number.
float* state(Tensor& tensor, int64_t size, const char* name, const char* op) {
  LLAMA_OPS_CHECK(tensor.numel() == size && tensor.dtype() == DataType::FLOAT32, op, name,
                  " has to be float32 with ", size, " numbers, not ", text(tensor.shape()));
  return tensor.data<float>();
}

Tensors update(Tensors& weights, const Tensors& gradients, Tensors& moments1, Tensors& moments2,
               Tensors& powers1, Tensors& powers2, const std::vector<float>& decays, float rate,
               float beta1, float beta2, float epsilon, float scale) {
  constexpr const char* op = "llama_ops_adamw";
  const size_t count = weights.size();
  for (size_t size : {gradients.size(), moments1.size(), moments2.size(), powers1.size(),
                      powers2.size(), decays.size()}) {
    LLAMA_OPS_CHECK(size == count, op, size, " tensors or decays of a kind for ", count, " weights");
  }
  std::vector<llama_ops_adamw_parameter> parameters(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t size = weights[i].numel();
    LLAMA_OPS_CHECK(gradients[i].numel() == size, op, "a gradient ", text(gradients[i].shape()),
                    " is not of its weight's shape ", text(weights[i].shape()));
    llama_ops_adamw_parameter& p = parameters[i];
    p.weight = state(weights[i], size, "weight", op);
    p.gradient = gradients[i].data();
    p.moment1 = state(moments1[i], size, "moment1", op);
    p.moment2 = state(moments2[i], size, "moment2", op);
    p.size = size;
    p.gradient_dtype = dtype_of(gradients[i], op);
    p.decay = decays[i];
    // Like Paddle's optimizer, these hold the power for the coming update.
    p.beta1_power = *state(powers1[i], 1, "beta1_pow", op);
    p.beta2_power = *state(powers2[i], 1, "beta2_pow", op);
  }
  const llama_ops_adamw_args args{parameters.data(), static_cast<int64_t>(count), rate, beta1,
                                  beta2, epsilon, scale};
  llama_ops_adamw(&args);
  for (size_t i = 0; i < count; ++i) {
    *powers1[i].data<float>() *= beta1;
    *powers2[i].data<float>() *= beta2;
  }
  return {};
}

Tensors squares(const Tensors& arrays) {
  const size_t count = arrays.size();
  std::vector<const void*> data(count);
  std::vector<int64_t> sizes(count);
  std::vector<int> dtypes(count);
  for (size_t i = 0; i < count; ++i) {
    data[i] = arrays[i].data();
    sizes[i] = arrays[i].numel();
    dtypes[i] = dtype_of(arrays[i], "llama_ops_squares");
  }
  Tensor total = paddle::empty({}, DataType::FLOAT64, paddle::CPUPlace());
  const llama_ops_squares_args args{data.data(), sizes.data(), dtypes.data(),
                                    static_cast<int64_t>(count), total.data<double>()};
  llama_ops_squares(&args);
  return {total};
}

std::vector<Shape> squares_shape(const std::vector<Shape>&) { return {{}}; }

std::vector<DataType> squares_dtype(const std::vector<DataType>&) { return {DataType::FLOAT64}; }

}  // namespace
}  // namespace llama_ops

PD_BUILD_OP(llama_ops_adamw)
    .Inputs({paddle::Vec("Weights"), paddle::Vec("Gradients"), paddle::Vec("Moments1"),
             paddle::Vec("Moments2"), paddle::Vec("Powers1"), paddle::Vec("Powers2")})
    .Outputs({paddle::Vec("WeightsOut"), paddle::Vec("Moments1Out"), paddle::Vec("Moments2Out"),
              paddle::Vec("Powers1Out"), paddle::Vec("Powers2Out")})
    .Attrs({"decays: std::vector<float>", "rate: float", "beta1: float", "beta2: float",
            "epsilon: float", "scale: float"})
    .SetInplaceMap({{paddle::Vec("Weights"), paddle::Vec("WeightsOut")},
                    {paddle::Vec("Moments1"), paddle::Vec("Moments1Out")},
                    {paddle::Vec("Moments2"), paddle::Vec("Moments2Out")},
                    {paddle::Vec("Powers1"), paddle::Vec("Powers1Out")},
                    {paddle::Vec("Powers2"), paddle::Vec("Powers2Out")}})
    .SetKernelFn(PD_KERNEL(llama_ops::update));

PD_BUILD_OP(llama_ops_squares)
    .Inputs({paddle::Vec("Arrays")})
    .Outputs({"Total"})
    .SetKernelFn(PD_KERNEL(llama_ops::squares))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::squares_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::squares_dtype));
