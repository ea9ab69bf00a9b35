// Paddle operator of llama_ops/low_rank.h.
#include "paddle/low_rank.h"

namespace llama_ops {
namespace {

using paddle::DataType;
using paddle::Tensor;

constexpr const char* kOp = "llama_ops_low_rank";

std::vector<Tensor> low_rank(const Tensor& x, Tensor& out, const Tensor& adapter,
                             const std::vector<Tensor>& data, const std::vector<Tensor>& pieces,
                             const std::vector<Tensor>& scales, int64_t linear, int64_t first) {
  const Shape from = x.shape(), to = out.shape();
  LLAMA_OPS_CHECK(from.size() == 2 && to.size() == 2 && from[0] == to[0], kOp, "x ", text(from),
                  " and out ", text(to), " have to be [rows, inputs] and [rows, outputs]");
  LLAMA_OPS_CHECK(x.dtype() == DataType::FLOAT32 && out.dtype() == DataType::FLOAT32, kOp,
                  "x and out have to be float32");
  LowRankStep step(kOp, adapter, from[0], data, pieces, scales);
  llama_ops_low_rank_args args{};
  args.of = step.of(linear, from[1], first, to[1]);
  args.x = x.data<float>();
  args.out = out.data<float>();
  args.inputs = from[1];
  args.width = to[1];
  llama_ops_low_rank(&args);
  return {};  // the one output is an input
}

std::vector<Shape> shapes(const Shape&, const Shape& out, const Shape&, const std::vector<Shape>&,
                          const std::vector<Shape>&, const std::vector<Shape>&, int64_t, int64_t) {
  return {out};
}

std::vector<DataType> dtypes(const DataType&, const DataType& out, const DataType&,
                             const std::vector<DataType>&, const std::vector<DataType>&,
                             const std::vector<DataType>&) {
  return {out};
}

}  // namespace
}  // namespace llama_ops

PD_BUILD_OP(llama_ops_low_rank)
    .Inputs({"X", "Out", "Adapter", paddle::Vec("Data"), paddle::Vec("Pieces"), paddle::Vec("Scales")})
    .Outputs({"Sum"})
    .SetInplaceMap({{"Out", "Sum"}})
    .Attrs({"linear: int64_t", "first: int64_t"})
    .SetKernelFn(PD_KERNEL(llama_ops::low_rank))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::dtypes));
