// Paddle operators of llama_ops/cross_entropy.h. Gradients are external_ops/cross_entropy.py's.
#include "llama_ops/cross_entropy.h"

#include "paddle/checks.h"

namespace llama_ops {
namespace {

using paddle::DataType;
using paddle::Tensor;

void check_rows(const Tensor& logits, const Tensor& labels, const char* op) {
  LLAMA_OPS_CHECK(logits.shape().size() == 2 && logits.dtype() == DataType::FLOAT32, op,
                  "logits ", text(logits.shape()), " have to be float32 [rows, tokens]");
  LLAMA_OPS_CHECK(labels.shape() == Shape{logits.shape()[0]} && labels.dtype() == DataType::INT64,
                  op, "labels ", text(labels.shape()), " have to be int64, one a row of logits ",
                  text(logits.shape()));
}

std::vector<Tensor> statistics(const Tensor& logits, const Tensor& labels, int64_t first,
                               bool accuracy) {
  check_rows(logits, labels, "llama_ops_cross_entropy_statistics");
  const int64_t rows = logits.shape()[0];
  Tensor top = paddle::empty({rows}, DataType::FLOAT32, logits.place());
  Tensor sum = paddle::empty_like(top), target = paddle::empty_like(top);
  Tensor best = paddle::empty({accuracy ? rows : 0}, DataType::INT64, logits.place());
  llama_ops_cross_entropy_statistics_args args{};
  args.logits = logits.data<float>();
  args.labels = labels.data<int64_t>();
  args.top = top.data<float>();
  args.sum = sum.data<float>();
  args.target = target.data<float>();
  args.best = accuracy ? best.data<int64_t>() : nullptr;
  args.rows = rows;
  args.width = logits.shape()[1];
  args.first = first;
  llama_ops_cross_entropy_statistics(&args);
  return {top, sum, target, best};
}

std::vector<Shape> statistics_shapes(const Shape& logits, const Shape&, int64_t, bool accuracy) {
  const Shape rows = {logits[0]};
  return {rows, rows, rows, accuracy ? rows : Shape{0}};
}

std::vector<DataType> statistics_dtypes(const DataType&, const DataType&) {
  return {DataType::FLOAT32, DataType::FLOAT32, DataType::FLOAT32, DataType::INT64};
}

std::vector<Tensor> residual(Tensor& logits, const Tensor& labels, const Tensor& denominator,
                             const Tensor& scale, int64_t first) {
  constexpr const char* op = "llama_ops_cross_entropy_residual";
  check_rows(logits, labels, op);
  for (const Tensor* one : {&denominator, &scale}) {
    LLAMA_OPS_CHECK(one->shape() == labels.shape() && one->dtype() == DataType::FLOAT32, op,
                    "denominator and scale have to be float32, one a row of logits ",
                    text(logits.shape()), ", not ", text(one->shape()));
  }
  llama_ops_cross_entropy_residual_args args{};
  args.logits = logits.data<float>();
  args.labels = labels.data<int64_t>();
  args.denominator = denominator.data<float>();
  args.scale = scale.data<float>();
  args.rows = logits.shape()[0];
  args.width = logits.shape()[1];
  args.first = first;
  llama_ops_cross_entropy_residual(&args);
  return {};
}

}  // namespace
}  // namespace llama_ops

PD_BUILD_OP(llama_ops_cross_entropy_statistics)
    .Inputs({"Logits", "Labels"})
    .Outputs({"Top", "Sum", "Target", "Best"})
    .Attrs({"first: int64_t", "accuracy: bool"})
    .SetKernelFn(PD_KERNEL(llama_ops::statistics))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::statistics_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::statistics_dtypes));

PD_BUILD_OP(llama_ops_cross_entropy_residual)
    .Inputs({"Logits", "Labels", "Denominator", "Scale"})
    .Outputs({"Gradient"})
    .Attrs({"first: int64_t"})
    .SetInplaceMap({{"Logits", "Gradient"}})
    .SetKernelFn(PD_KERNEL(llama_ops::residual));
