// Paddle operators of llama_ops/linear.h.
#include "llama_ops/linear.h"

#include "paddle/checks.h"
#include "paddle/large_pages.h"

namespace llama_ops {
namespace {

using paddle::DataType;
using paddle::Tensor;
using Maybe = paddle::optional<Tensor>;
using MaybeShape = paddle::optional<Shape>;

constexpr const char* kPack = "llama_ops_linear_pack";
constexpr const char* kRows = "llama_ops_linear_rows";
constexpr const char* kLinear = "llama_ops_linear";
constexpr int64_t kPanel = LLAMA_OPS_LINEAR_PANEL;

bool is_wide(int kind) { return kind == LLAMA_OPS_LINEAR_F32 || kind == LLAMA_OPS_LINEAR_BF16; }
bool is_int4(int kind) { return kind >= LLAMA_OPS_LINEAR_INT4; }

int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

void check_kind(int kind, const char* op) {
  LLAMA_OPS_CHECK(kind >= 0 && kind <= LLAMA_OPS_LINEAR_INT4_WEIGHT_ONLY, op, "kind ",
                  std::to_string(kind), " is none of 0 to 5");
}

// How many inputs an output of unpacked weights has.
int64_t inputs_of(const Shape& weight, int kind) {
  return is_int4(kind) && weight[1] > 0 ? weight[1] * 2 : weight[1];
}

// The shape of a weight as [outputs, inputs].
Shape oriented(const Shape& weight, bool transposed) {
  return transposed ? Shape{weight[1], weight[0]} : weight;
}

void check_groups(int64_t inputs, int64_t groups, const char* op) {
  LLAMA_OPS_CHECK(groups >= 1 && inputs % groups == 0, op, std::to_string(groups),
                  " groups do not divide ", std::to_string(inputs), " inputs");
  LLAMA_OPS_CHECK(groups == 1 || inputs / groups % LLAMA_OPS_LINEAR_STEP == 0, op, "groups of ",
                  std::to_string(inputs / groups), " inputs; they have to be multiples of 8");
}

std::vector<Tensor> pack(const Tensor& weight, const Maybe& scale, int kind, bool short_scale,
                         bool transposed) {
  check_kind(kind, kPack);
  const DataType given = weight.dtype(), integers = is_int4(kind) ? DataType::UINT8 : DataType::INT8;
  const bool fits = is_wide(kind) ? given == DataType::FLOAT32 || given == DataType::BFLOAT16
                                  : given == integers;
  LLAMA_OPS_CHECK(weight.shape().size() == 2 && weight.numel() > 0, kPack, "weight ",
                  text(weight.shape()), " has to be [outputs, inputs], neither of them 0");
  LLAMA_OPS_CHECK(fits, kPack, "weight of another type than kind ", std::to_string(kind),
                  " takes (float32 or bfloat16; int8; uint8 with two integers a byte)");
  LLAMA_OPS_CHECK(is_wide(kind) || !transposed, kPack, "integers have to be [outputs, inputs]");
  LLAMA_OPS_CHECK(is_wide(kind) != static_cast<bool>(scale), kPack,
                  "integer kinds need a scale, the others have none");
  llama_ops_linear_pack_args args{};
  args.kind = kind;
  const Shape sides = oriented(weight.shape(), transposed);
  args.outputs = sides[0];
  args.inputs = inputs_of(sides, kind);
  args.groups = 1;
  args.scale_dtype = short_scale ? LLAMA_OPS_BF16 : LLAMA_OPS_F32;
  if (is_wide(kind)) {
    args.wide = weight.data();
    args.wide_dtype = dtype_of(weight, kPack);
    args.transposed = transposed;
  } else {
    const Shape shape = scale->shape();
    LLAMA_OPS_CHECK(shape.size() == 2 && shape[0] == args.outputs, kPack, "scale ", text(shape),
                    " has to be [", std::to_string(args.outputs), ", groups]");
    LLAMA_OPS_CHECK(scale->dtype() == DataType::FLOAT32, kPack, "scale has to be float32");
    check_groups(args.inputs, shape[1], kPack);
    args.groups = shape[1];
    args.integers = weight.data();
    args.scale = scale->data<float>();
  }
  const int64_t panels = panels_of(args.outputs);
  const int64_t bytes = llama_ops_linear_panel_bytes(kind, args.inputs);
  Tensor data = paddle::empty({panels, bytes}, DataType::UINT8, weight.place());
  Tensor packed_scale =
      paddle::empty({is_wide(kind) ? 0 : panels, args.groups, kPanel},
                    short_scale ? DataType::BFLOAT16 : DataType::FLOAT32, weight.place());
  args.data = data.data();
  args.packed_scale = packed_scale.data();
  llama_ops_linear_pack(&args);
  use_large_pages(args.data, data.numel(), true);
  return {data, packed_scale};
}

std::vector<Shape> pack_shapes(const Shape& given, const MaybeShape& scale, int kind, bool,
                               bool transposed) {
  const Shape weight = oriented(given, transposed);
  const int64_t panels = panels_of(weight[0]), inputs = inputs_of(weight, kind);
  const int64_t groups = scale ? scale.get()[1] : 1;
  return {{panels, llama_ops_linear_panel_bytes(kind, inputs)},
          {is_wide(kind) ? 0 : panels, groups, kPanel}};
}

std::vector<DataType> pack_dtypes(const DataType&, const paddle::optional<DataType>&, int,
                                  bool short_scale, bool) {
  return {DataType::UINT8, short_scale ? DataType::BFLOAT16 : DataType::FLOAT32};
}

// Fills in the packed weight after checking that it is what `pack` made.
llama_ops_linear_weight weight_of(int64_t inputs, const Tensor& data, const Maybe& scale, int kind,
                                  int64_t outputs) {
  llama_ops_linear_weight weight{};
  weight.kind = kind;
  weight.inputs = inputs;
  weight.outputs = outputs;
  weight.groups = 1;
  const Shape expected{panels_of(outputs), llama_ops_linear_panel_bytes(kind, inputs)};
  LLAMA_OPS_CHECK(data.dtype() == DataType::UINT8 && data.shape() == expected, kLinear,
                  "packed weight ", text(data.shape()), " is not uint8 ", text(expected),
                  ", which x with ", std::to_string(inputs), " inputs, ", std::to_string(outputs),
                  " outputs and kind ", std::to_string(kind), " need");
  weight.data = data.data();
  use_large_pages(weight.data, data.numel(), false);
  LLAMA_OPS_CHECK(is_wide(kind) != static_cast<bool>(scale), kLinear,
                  "integer kinds need a scale, the others have none");
  if (scale) {
    const Shape shape = scale->shape();
    LLAMA_OPS_CHECK(shape.size() == 3 && shape[0] == expected[0] && shape[2] == kPanel, kLinear,
                    "packed scale ", text(shape), " has to be [", std::to_string(expected[0]),
                    ", groups, 64]");
    weight.groups = shape[1];
    check_groups(inputs, shape[1], kLinear);
    weight.scale_dtype = dtype_of(*scale, kLinear);
    weight.scale = scale->data();
  }
  return weight;
}

Tensor widened(const Tensor& x) {
  const DataType type = x.dtype();
  if (type == DataType::FLOAT32) return x;
  LLAMA_OPS_CHECK(type == DataType::BFLOAT16 || type == DataType::FLOAT16, kLinear,
                  "x has to be float32, bfloat16 or float16; cast it");
  return paddle::experimental::cast(x, DataType::FLOAT32);
}

std::vector<Tensor> linear(const Tensor& given, const Tensor& data, const Maybe& scale,
                           const Maybe& bias, const Maybe& residual, int kind, int64_t outputs) {
  check_kind(kind, kLinear);
  Shape shape = given.shape();
  LLAMA_OPS_CHECK(!shape.empty() && shape.back() > 0 && outputs > 0, kLinear, "x ", text(shape),
                  " and ", std::to_string(outputs), " outputs need at least one number each");
  const Tensor x = widened(given);
  llama_ops_linear_args args{};
  args.weight = weight_of(shape.back(), data, scale, kind, outputs);
  args.rows = x.numel() / shape.back();
  shape.back() = outputs;
  if (bias) {
    LLAMA_OPS_CHECK(bias->dtype() == DataType::FLOAT32 && bias->shape() == Shape{outputs}, kLinear,
                    "bias ", text(bias->shape()), " has to be float32 [", std::to_string(outputs),
                    "]");
    args.bias = bias->data<float>();
  }
  if (residual) {
    LLAMA_OPS_CHECK(residual->dtype() == DataType::FLOAT32 && residual->shape() == shape, kLinear,
                    "residual ", text(residual->shape()), " has to be float32 ", text(shape));
    args.residual = residual->data<float>();
  }
  Tensor out = paddle::empty(shape, DataType::FLOAT32, x.place());
  args.x = x.data<float>();
  args.out = out.data<float>();
  llama_ops_linear(&args);
  return {out};
}

std::vector<Shape> linear_shapes(const Shape& x, const Shape&, const MaybeShape&, const MaybeShape&,
                                 const MaybeShape&, int, int64_t outputs) {
  Shape shape = x;
  shape.back() = outputs;
  return {shape};
}

std::vector<DataType> linear_dtypes(const DataType&, const DataType&,
                                    const paddle::optional<DataType>&,
                                    const paddle::optional<DataType>&,
                                    const paddle::optional<DataType>&) {
  return {DataType::FLOAT32};
}

std::vector<Tensor> rows(const Tensor& ids, const Tensor& data, const Maybe& scale, int kind,
                         int64_t outputs, int64_t inputs) {
  check_kind(kind, kRows);
  LLAMA_OPS_CHECK(ids.dtype() == DataType::INT64, kRows, "ids have to be int64");
  LLAMA_OPS_CHECK(outputs > 0 && inputs > 0, kRows, "outputs and inputs have to be at least 1");
  const int64_t* wanted = ids.data<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    LLAMA_OPS_CHECK(wanted[i] >= 0 && wanted[i] < outputs, kRows, "id ", std::to_string(wanted[i]),
                    " is not one of 0 to ", std::to_string(outputs - 1));
  }
  Shape shape = ids.shape();
  shape.push_back(inputs);
  Tensor out = paddle::empty(shape, DataType::FLOAT32, ids.place());
  llama_ops_linear_rows_args args{};
  args.weight = weight_of(inputs, data, scale, kind, outputs);
  args.ids = wanted;
  args.out = out.data<float>();
  args.rows = ids.numel();
  llama_ops_linear_rows(&args);
  return {out};
}

std::vector<Shape> rows_shapes(const Shape& ids, const Shape&, const MaybeShape&, int, int64_t,
                               int64_t inputs) {
  Shape shape = ids;
  shape.push_back(inputs);
  return {shape};
}

std::vector<DataType> rows_dtypes(const DataType&, const DataType&,
                                  const paddle::optional<DataType>&) {
  return {DataType::FLOAT32};
}

}  // namespace
}  // namespace llama_ops

PD_BUILD_OP(llama_ops_linear_pack)
    .Inputs({"Weight", paddle::Optional("Scale")})
    .Outputs({"Data", "PackedScale"})
    .Attrs({"kind: int", "short_scale: bool", "transposed: bool"})
    .SetKernelFn(PD_KERNEL(llama_ops::pack))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::pack_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::pack_dtypes));

PD_BUILD_OP(llama_ops_linear)
    .Inputs({"X", "Data", paddle::Optional("Scale"), paddle::Optional("Bias"),
             paddle::Optional("Residual")})
    .Outputs({"Out"})
    .Attrs({"kind: int", "outputs: int64_t"})
    .SetKernelFn(PD_KERNEL(llama_ops::linear))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::linear_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::linear_dtypes));

PD_BUILD_OP(llama_ops_linear_rows)
    .Inputs({"Ids", "Data", paddle::Optional("Scale")})
    .Outputs({"Out"})
    .Attrs({"kind: int", "outputs: int64_t", "inputs: int64_t"})
    .SetKernelFn(PD_KERNEL(llama_ops::rows))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::rows_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::rows_dtypes));
