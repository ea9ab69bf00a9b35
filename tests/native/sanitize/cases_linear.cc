#include "cases.h"
#include "llama_ops/linear.h"

using cases::Array;
using cases::kUnwritten;
using cases::Numbers;

namespace {

constexpr int64_t kRows[] = {0, 1, 4, 8, 9, 33};

struct Weight {
  int64_t outputs, inputs, groups;
};
// Full and partial panels; inputs that are no multiple of 8; groups with and without dot products.
constexpr Weight kWeights[] = {{1, 8, 1}, {64, 66, 1}, {65, 640, 20}, {130, 48, 3}, {2, 1090, 1}};

int64_t panels_of(int64_t outputs) { return (outputs + 63) / 64; }

// Every output, the last ones first; so many that threads share them, and none.
void look_up(const llama_ops_linear_weight& weight) {
  for (int64_t rows : {int64_t{0}, weight.outputs, 65536 / weight.inputs + 1}) {
    Array<int64_t> ids(rows);
    for (int64_t i = 0; i < rows; ++i) ids[i] = weight.outputs - 1 - i % weight.outputs;
    Numbers out(rows * weight.inputs, LLAMA_OPS_F32, kUnwritten);
    llama_ops_linear_rows_args args{};
    args.weight = weight;
    args.ids = ids.data();
    args.out = out.floats();
    args.rows = rows;
    llama_ops_linear_rows(&args);
    out.require_written();
  }
}

void run(const Weight& shape, int kind, int scale_dtype) {
  const bool wide = kind <= LLAMA_OPS_LINEAR_BF16, four = kind >= LLAMA_OPS_LINEAR_INT4;
  const int64_t groups = wide ? 1 : shape.groups;
  Numbers numbers(shape.outputs * shape.inputs, LLAMA_OPS_F32);
  Array<uint8_t> integers(shape.outputs * shape.inputs / (four ? 2 : 1), 0x7f);
  Numbers scale(shape.outputs * groups, LLAMA_OPS_F32);
  Array<uint8_t> data(panels_of(shape.outputs) * llama_ops_linear_panel_bytes(kind, shape.inputs));
  Numbers packed_scale(panels_of(shape.outputs) * groups * 64, scale_dtype, kUnwritten);
  llama_ops_linear_pack_args pack{};
  pack.wide = wide ? numbers.floats() : nullptr;
  pack.integers = wide ? nullptr : integers.data();
  pack.scale = wide ? nullptr : scale.floats();
  pack.data = data.data();
  pack.packed_scale = packed_scale.data();
  pack.outputs = shape.outputs;
  pack.inputs = shape.inputs;
  pack.groups = groups;
  pack.kind = kind;
  pack.scale_dtype = scale_dtype;
  llama_ops_linear_pack(&pack);
  if (!wide) packed_scale.require_written();
  const llama_ops_linear_weight weight = {data.data(),  wide ? nullptr : packed_scale.data(),
                                          shape.outputs, shape.inputs, groups, kind, scale_dtype};
  look_up(weight);
  for (int64_t rows : kRows) {
    for (bool all : {false, true}) {
      Numbers x(rows * shape.inputs, LLAMA_OPS_F32), bias(shape.outputs, LLAMA_OPS_F32);
      Numbers residual(rows * shape.outputs, LLAMA_OPS_F32);
      Numbers out(rows * shape.outputs, LLAMA_OPS_F32, kUnwritten);
      llama_ops_linear_args args{};
      args.weight = weight;
      args.x = x.floats();
      args.bias = all ? bias.floats() : nullptr;
      args.residual = all ? residual.floats() : nullptr;
      args.out = out.floats();
      args.rows = rows;
      llama_ops_linear(&args);
      out.require_written();
    }
  }
}

}  // namespace

LLAMA_OPS_CASE(linear) {
  for (const Weight& shape : kWeights) {
    for (int kind = LLAMA_OPS_LINEAR_F32; kind <= LLAMA_OPS_LINEAR_INT4_WEIGHT_ONLY; ++kind) {
      for (int scale_dtype : {LLAMA_OPS_F32, LLAMA_OPS_BF16}) run(shape, kind, scale_dtype);
    }
  }
}
