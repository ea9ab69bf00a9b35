// Paddle operator of llama_ops/sample.h.
#include "llama_ops/sample.h"

#include "paddle/checks.h"

namespace llama_ops {
namespace {

using paddle::DataType;
using paddle::Tensor;

constexpr const char* kOp = "llama_ops_sample";
constexpr int64_t kSettings = sizeof(llama_ops_sample_settings) / sizeof(double);

std::vector<Tensor> sample(const Tensor& logits, const Tensor& edited, const Tensor& edit,
                           const Tensor& settings) {
  LLAMA_OPS_CHECK(logits.shape().size() == 2 && logits.shape()[1] > 0 &&
                      logits.dtype() == DataType::FLOAT32,
                  kOp, "logits ", text(logits.shape()), " have to be float32 [rows, tokens]");
  const int64_t rows = logits.shape()[0], width = logits.shape()[1];
  LLAMA_OPS_CHECK(edited.shape().size() == 2 && edited.shape()[1] == width &&
                      edited.dtype() == DataType::FLOAT32,
                  kOp, "edited scores ", text(edited.shape()), " have to be float32 [any, ", width,
                  "]");
  LLAMA_OPS_CHECK(edit.shape() == Shape{rows} && edit.dtype() == DataType::INT64, kOp, "edit ",
                  text(edit.shape()), " has to be int64 [", rows, "]");
  LLAMA_OPS_CHECK((settings.shape() == Shape{rows, kSettings}) &&
                      settings.dtype() == DataType::FLOAT64,
                  kOp, "settings ", text(settings.shape()), " have to be float64 [", rows, ", ",
                  kSettings, "]");
  for (int64_t row = 0; row < rows; ++row) {
    LLAMA_OPS_CHECK(edit.data<int64_t>()[row] < edited.shape()[0], kOp, "edit ",
                    edit.data<int64_t>()[row], " is outside the ", edited.shape()[0],
                    " rows of edited scores");
  }
  Tensor tokens = paddle::empty({rows}, DataType::INT64, logits.place());
  Tensor logprobs = paddle::empty({rows}, DataType::FLOAT64, logits.place());
  llama_ops_sample_args args{};
  args.logits = logits.data<float>();
  args.edited = edited.data<float>();
  args.edit = edit.data<int64_t>();
  args.settings = reinterpret_cast<const llama_ops_sample_settings*>(settings.data<double>());
  args.tokens = tokens.data<int64_t>();
  args.logprobs = logprobs.data<double>();
  args.rows = rows;
  args.width = width;
  llama_ops_sample(&args);
  return {tokens, logprobs};
}

std::vector<Shape> shapes(const Shape& logits, const Shape&, const Shape&, const Shape&) {
  return {{logits[0]}, {logits[0]}};
}

std::vector<DataType> dtypes(const DataType&, const DataType&, const DataType&, const DataType&) {
  return {DataType::INT64, DataType::FLOAT64};
}

}  // namespace
}  // namespace llama_ops

PD_BUILD_OP(llama_ops_sample)
    .Inputs({"Logits", "Edited", "Edit", "Settings"})
    .Outputs({"Tokens", "Logprobs"})
    .SetKernelFn(PD_KERNEL(llama_ops::sample))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::dtypes));
