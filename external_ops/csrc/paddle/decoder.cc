// Paddle operator of llama_ops/decoder.h.
#include "llama_ops/decoder.h"

#include "paddle/large_pages.h"
#include "paddle/low_rank.h"
#include "paddle/paged_plan.h"

namespace llama_ops {
namespace {

using paddle::DataType;
using paddle::Tensor;

constexpr const char* kOp = "llama_ops_decoder";
constexpr const char* kAdapted = "llama_ops_adapted_decoder";

// Takes tensors one after the other, as external_ops/decoder.py lays them out.
class Reader {
 public:
  Reader(const std::vector<Tensor>& tensors, const std::vector<int>& kinds, const std::vector<int>& biases)
      : tensors_(tensors), kinds_(kinds), biases_(biases) {}

  const float* vector(int64_t size, const char* what) {
    const Tensor& one = next();
    LLAMA_OPS_CHECK(one.dtype() == DataType::FLOAT32 && one.numel() == size, kOp, what, " has ",
                    one.numel(), " numbers; ", size, " of float32 are needed");
    return one.data<float>();
  }

  llama_ops_linear_weight linear(int64_t outputs, int64_t inputs, const char* what, const float** bias) {
    LLAMA_OPS_CHECK(linear_ < kinds_.size() && linear_ < biases_.size(), kOp,
                    "kinds and biases need an entry for each linear");
    llama_ops_linear_weight weight{};
    weight.kind = kinds_[linear_];
    weight.outputs = outputs;
    weight.inputs = inputs;
    weight.groups = 1;
    const Tensor& data = next();
    const int64_t panels = (outputs + LLAMA_OPS_LINEAR_PANEL - 1) / LLAMA_OPS_LINEAR_PANEL;
    const int64_t bytes = panels * llama_ops_linear_panel_bytes(weight.kind, inputs);
    const int64_t got = data.numel() * static_cast<int64_t>(phi::SizeOf(data.dtype()));
    LLAMA_OPS_CHECK(got == bytes, kOp, what, " packed as ", got, " bytes; [", outputs, ", ", inputs,
                    "] takes ", bytes);
    weight.data = data.data();
    use_large_pages(weight.data, bytes, false);
    if (weight.kind != LLAMA_OPS_LINEAR_F32 && weight.kind != LLAMA_OPS_LINEAR_BF16) {
      const Tensor& scale = next();
      const Shape shape = scale.shape();
      LLAMA_OPS_CHECK(shape.size() == 3 && shape[0] == panels && shape[2] == LLAMA_OPS_LINEAR_PANEL,
                      kOp, what, " has scales ", text(shape), "; [", panels, ", groups, ",
                      LLAMA_OPS_LINEAR_PANEL, "] is needed");
      weight.scale = scale.data();
      weight.scale_dtype = dtype_of(scale, kOp);
      weight.groups = shape[1];
    }
    *bias = biases_[linear_] ? vector(outputs, what) : nullptr;
    ++linear_;
    return weight;
  }

  bool done() const { return tensor_ == tensors_.size(); }

 private:
  const Tensor& next() {
    LLAMA_OPS_CHECK(tensor_ < tensors_.size(), kOp, tensors_.size(), " weights are too few");
    return tensors_[tensor_++];
  }

  const std::vector<Tensor>& tensors_;
  const std::vector<int>& kinds_;
  const std::vector<int>& biases_;
  size_t tensor_ = 0, linear_ = 0;
};

void take_tokens(llama_ops_decoder_args* a, const Tensor& table, const Tensor& sequence,
                 const Tensor& position) {
  for (const Tensor* one : {&table, &sequence, &position}) {
    LLAMA_OPS_CHECK(one->dtype() == DataType::INT32, kOp,
                    "block_table, sequence and position have to be int32");
  }
  LLAMA_OPS_CHECK(table.shape().size() == 2, kOp, "block_table ", text(table.shape()),
                  " has to have two axes");
  LLAMA_OPS_CHECK(sequence.numel() == a->tokens && position.numel() == a->tokens, kOp, "sequence ",
                  text(sequence.shape()), " and position ", text(position.shape()),
                  " have to have an entry for each of ", a->tokens, " tokens");
  a->block_table = table.data<int32_t>();
  a->table_width = table.shape()[1];
  a->sequence = sequence.data<int32_t>();
  a->position = position.data<int32_t>();
}

void take_caches(llama_ops_decoder_args* a, std::vector<Tensor>& caches,
                 std::vector<llama_ops_decoder_layer>* layers) {
  const Shape shape = caches[0].shape();
  LLAMA_OPS_CHECK(shape.size() == 4, kOp, "caches ", text(shape),
                  " have to be [blocks, block, groups, dim]");
  a->block = shape[1];
  a->groups = shape[2];
  const Stored stored = stored_in(caches[0], kOp);
  a->dim = stored.dim;
  a->cache_dtype = stored.dtype;
  LLAMA_OPS_CHECK(a->groups > 0 && a->dim > 0 && a->heads % a->groups == 0 && a->dim % 2 == 0, kOp, a->heads, " heads of ", a->dim,
                  " do not share ", a->groups, " of the cache");
  for (size_t i = 0; i < caches.size(); ++i) {
    LLAMA_OPS_CHECK(caches[i].shape() == shape && caches[i].dtype() == caches[0].dtype(), kOp,
                    "caches differ in shape or type");
    llama_ops_decoder_layer& layer = (*layers)[i / 2];
    (i % 2 ? layer.v_cache : layer.k_cache) = caches[i].data();
  }
}

// Puts beside each layer's linears, counted from layer to layer, what the step's adapters add.
void take_adapters(LowRankStep* step, std::vector<llama_ops_decoder_layer>* layers) {
  int64_t number = 0;
  for (llama_ops_decoder_layer& layer : *layers) {
    const llama_ops_linear_weight* all[] = {&layer.qkv, &layer.o, &layer.gate_up, &layer.down};
    for (int which = 0; which < 4; ++which) {
      layer.low_rank[which] = step->of(number++, all[which]->inputs, 0, all[which]->outputs);
    }
  }
}

std::vector<Tensor> run(const Tensor& x, const Tensor& frequency, const Tensor& table,
                        const Tensor& sequence, const Tensor& position,
                        const std::vector<Tensor>& weights, std::vector<Tensor>& caches,
                        const std::vector<int>& kinds, const std::vector<int>& biases, int heads,
                        int ffn, float eps, LowRankStep* step) {
  const Shape shape = x.shape();
  LLAMA_OPS_CHECK(shape.size() == 2 && x.dtype() == DataType::FLOAT32, kOp, "x ", text(shape),
                  " has to be float32 [tokens, hidden]");
  LLAMA_OPS_CHECK(!caches.empty() && caches.size() % 2 == 0, kOp, caches.size(),
                  " caches are not two for each layer");
  std::vector<llama_ops_decoder_layer> layers(caches.size() / 2);
  llama_ops_decoder_args args{};
  args.tokens = shape[0];
  args.hidden = shape[1];
  args.heads = heads;
  args.ffn = ffn;
  args.eps = eps;
  take_tokens(&args, table, sequence, position);
  take_caches(&args, caches, &layers);
  LLAMA_OPS_CHECK(frequency.dtype() == DataType::FLOAT32 && frequency.numel() == args.dim / 2, kOp,
                  "frequency ", text(frequency.shape()), " has to be float32 [", args.dim / 2, "]");
  args.frequency = frequency.data<float>();
  Reader read(weights, kinds, biases);
  for (llama_ops_decoder_layer& layer : layers) {
    const int64_t inner = args.heads * args.dim, outer = inner + 2 * args.groups * args.dim;
    layer.input_norm = read.vector(args.hidden, "input norm");
    layer.post_norm = read.vector(args.hidden, "post norm");
    layer.qkv = read.linear(outer, args.hidden, "qkv", &layer.qkv_bias);
    layer.o = read.linear(args.hidden, inner, "o", &layer.o_bias);
    layer.gate_up = read.linear(2 * args.ffn, args.hidden, "gate_up", &layer.gate_up_bias);
    layer.down = read.linear(args.hidden, args.ffn, "down", &layer.down_bias);
  }
  LLAMA_OPS_CHECK(read.done(), kOp, weights.size(), " weights are too many");
  if (step != nullptr) take_adapters(step, &layers);
  check_plan({args.block_table, args.sequence, args.position, args.tokens, table.shape()[0],
              args.table_width, args.block, caches[0].shape()[0]},
             kOp);
  Tensor out = paddle::empty_like(x);
  args.x = x.data<float>();
  args.out = out.data<float>();
  args.layers = layers.data();
  args.num_layers = static_cast<int64_t>(layers.size());
  llama_ops_decoder(&args);
  return {out};
}

std::vector<Tensor> decoder(const Tensor& x, const Tensor& frequency, const Tensor& table,
                            const Tensor& sequence, const Tensor& position,
                            const std::vector<Tensor>& weights, std::vector<Tensor>& caches,
                            std::vector<int> kinds, std::vector<int> biases, int heads, int ffn,
                            float eps) {
  return run(x, frequency, table, sequence, position, weights, caches, kinds, biases, heads, ffn, eps,
             nullptr);
}

std::vector<Tensor> adapted_decoder(const Tensor& x, const Tensor& frequency, const Tensor& table,
                                    const Tensor& sequence, const Tensor& position,
                                    const std::vector<Tensor>& weights, std::vector<Tensor>& caches,
                                    const Tensor& adapter, const std::vector<Tensor>& data,
                                    const std::vector<Tensor>& pieces,
                                    const std::vector<Tensor>& scales, std::vector<int> kinds,
                                    std::vector<int> biases, int heads, int ffn, float eps) {
  LowRankStep step(kAdapted, adapter, sequence.numel(), data, pieces, scales);
  return run(x, frequency, table, sequence, position, weights, caches, kinds, biases, heads, ffn, eps,
             &step);
}

std::vector<Shape> shapes(const Shape& x, const Shape&, const Shape&, const Shape&, const Shape&,
                          const std::vector<Shape>&, const std::vector<Shape>&, std::vector<int>,
                          std::vector<int>, int, int, float) {
  return {x};
}

std::vector<Shape> adapted_shapes(const Shape& x, const Shape&, const Shape&, const Shape&,
                                  const Shape&, const std::vector<Shape>&, const std::vector<Shape>&,
                                  const Shape&, const std::vector<Shape>&, const std::vector<Shape>&,
                                  const std::vector<Shape>&, std::vector<int>, std::vector<int>, int,
                                  int, float) {
  return {x};
}

std::vector<DataType> adapted_dtypes(const DataType& x, const DataType&, const DataType&,
                                     const DataType&, const DataType&, const std::vector<DataType>&,
                                     const std::vector<DataType>&, const DataType&,
                                     const std::vector<DataType>&, const std::vector<DataType>&,
                                     const std::vector<DataType>&) {
  return {x};
}

std::vector<DataType> dtypes(const DataType& x, const DataType&, const DataType&, const DataType&,
                             const DataType&, const std::vector<DataType>&,
                             const std::vector<DataType>&) {
  return {x};
}

}  // namespace
}  // namespace llama_ops

PD_BUILD_OP(llama_ops_decoder)
    .Inputs({"X", "Frequency", "BlockTable", "Sequence", "Position", paddle::Vec("Weights"),
             paddle::Vec("Caches")})
    .Outputs({"Out", paddle::Vec("CachesOut")})
    .SetInplaceMap({{paddle::Vec("Caches"), paddle::Vec("CachesOut")}})
    .Attrs({"kinds: std::vector<int>", "biases: std::vector<int>", "heads: int", "ffn: int",
            "eps: float"})
    .SetKernelFn(PD_KERNEL(llama_ops::decoder))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::dtypes));

// Apart from the other, whose signature exported programs hold.
PD_BUILD_OP(llama_ops_adapted_decoder)
    .Inputs({"X", "Frequency", "BlockTable", "Sequence", "Position", paddle::Vec("Weights"),
             paddle::Vec("Caches"), "Adapter", paddle::Vec("Data"), paddle::Vec("Pieces"),
             paddle::Vec("Scales")})
    .Outputs({"Out", paddle::Vec("CachesOut")})
    .SetInplaceMap({{paddle::Vec("Caches"), paddle::Vec("CachesOut")}})
    .Attrs({"kinds: std::vector<int>", "biases: std::vector<int>", "heads: int", "ffn: int",
            "eps: float"})
    .SetKernelFn(PD_KERNEL(llama_ops::adapted_decoder))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::adapted_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::adapted_dtypes));
