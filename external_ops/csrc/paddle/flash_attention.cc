// Paddle operators of llama_ops/flash_attention.h.
#include "llama_ops/flash_attention.h"

#include <cmath>

#include "paddle/device.h"

namespace llama_ops {
namespace {

using paddle::DataType;
using paddle::Tensor;
using Maybe = paddle::optional<Tensor>;
using MaybeShape = paddle::optional<Shape>;
using MaybeType = paddle::optional<DataType>;

constexpr const char* kOp = "llama_ops_flash_attention";

const int32_t* check_segments(const Maybe& segments, const char* name, const Shape& expected) {
  if (!segments) return nullptr;
  LLAMA_OPS_CHECK(segments->shape() == expected && segments->dtype() == DataType::INT32, kOp, name,
                  " ", text(segments->shape()), " have to be int32 ", text(expected));
  return segments->data<int32_t>();
}

llama_ops_flash_attention_forward_args arguments(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Maybe& segments, const Maybe& key_segments,
                                                 bool causal) {
  const Shape queries = q.shape(), keys = k.shape();
  LLAMA_OPS_CHECK(queries.size() == 4 && keys.size() == 4 && v.shape() == keys &&
                      queries[0] == keys[0] && queries[3] == keys[3] && queries[3] > 0,
                  kOp, "q ", text(queries), " has to be [B, S, H, D], k ", text(keys), " and v ",
                  text(v.shape()), " [B, K, G, D]");
  LLAMA_OPS_CHECK(keys[2] > 0 && queries[2] % keys[2] == 0, kOp, std::to_string(queries[2]),
                  " query heads are no multiple of ", std::to_string(keys[2]), " key heads");
  LLAMA_OPS_CHECK(!causal || keys[1] >= queries[1], kOp, std::to_string(queries[1]),
                  " queries look back at only ", std::to_string(keys[1]), " keys");
  LLAMA_OPS_CHECK(k.dtype() == q.dtype() && v.dtype() == q.dtype(), kOp,
                  "q, k and v differ in their types");
  LLAMA_OPS_CHECK(static_cast<bool>(segments) == static_cast<bool>(key_segments), kOp,
                  "segments of queries and of keys come together or not at all");
  llama_ops_flash_attention_forward_args args{};
  args.dtype = dtype_of(q, kOp);
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  args.segments = check_segments(segments, "segments", {queries[0], queries[1]});
  args.key_segments = check_segments(key_segments, "key segments", {keys[0], keys[1]});
  args.batch = queries[0];
  args.queries = queries[1];
  args.keys = keys[1];
  args.heads = queries[2];
  args.groups = keys[2];
  args.size = queries[3];
  args.prefix = causal ? keys[1] - queries[1] : keys[1];
  args.scale = 1.0f / std::sqrt(static_cast<float>(queries[3]));
  return args;
}

std::vector<Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                            const Maybe& segments, const Maybe& key_segments, bool causal) {
  auto args = arguments(q, k, v, segments, key_segments, causal);
  Tensor out = paddle::empty_like(q);
  Tensor lse = paddle::empty({args.batch, args.heads, args.queries}, DataType::FLOAT32, q.place());
  Tensor rest = paddle::empty_like(lse);
  args.out = out.data();
  args.lse = lse.data<float>();
  args.lse_rest = rest.data<float>();
  LLAMA_OPS_RUN(flash_attention_forward, q, kOp, args);
  return {out, lse, rest};
}

std::vector<Tensor> backward(const Tensor& q, const Tensor& k, const Tensor& v,
                             const Maybe& segments, const Maybe& key_segments, const Tensor& out,
                             const Tensor& lse, const Tensor& rest, const Tensor& grad_out,
                             bool causal) {
  LLAMA_OPS_CHECK(grad_out.shape() == q.shape() && grad_out.dtype() == q.dtype(), kOp,
                  "gradient ", text(grad_out.shape()), " has to have the shape and type of q ",
                  text(q.shape()));
  llama_ops_flash_attention_backward_args args{};
  args.forward = arguments(q, k, v, segments, key_segments, causal);
  args.forward.out = const_cast<void*>(out.data());
  args.forward.lse = const_cast<float*>(lse.data<float>());
  args.forward.lse_rest = const_cast<float*>(rest.data<float>());
  Tensor grad_q = paddle::empty_like(q), grad_k = paddle::empty_like(k);
  Tensor grad_v = paddle::empty_like(v);
  args.grad_out = grad_out.data();
  args.grad_q = grad_q.data();
  args.grad_k = grad_k.data();
  args.grad_v = grad_v.data();
  LLAMA_OPS_RUN_WORKSPACE(flash_attention_backward, q, kOp, args);
  return {grad_q, grad_k, grad_v};
}

std::vector<Shape> shapes(const Shape& q, const Shape&, const Shape&, const MaybeShape&,
                          const MaybeShape&, bool) {
  return {q, {q[0], q[2], q[1]}, {q[0], q[2], q[1]}};
}

std::vector<DataType> dtypes(const DataType& q, const DataType&, const DataType&, const MaybeType&,
                             const MaybeType&) {
  return {q, DataType::FLOAT32, DataType::FLOAT32};
}

}  // namespace
}  // namespace llama_ops

PD_BUILD_OP(llama_ops_flash_attention)
    .Inputs({"Q", "K", "V", paddle::Optional("Segments"), paddle::Optional("KeySegments")})
    .Outputs({"Out", "Lse", "LseRest"})
    .Attrs({"causal: bool"})
    .SetKernelFn(PD_KERNEL(llama_ops::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::dtypes));

PD_BUILD_GRAD_OP(llama_ops_flash_attention)
    .Inputs({"Q", "K", "V", paddle::Optional("Segments"), paddle::Optional("KeySegments"), "Out",
             "Lse", "LseRest", paddle::Grad("Out")})
    .Outputs({paddle::Grad("Q"), paddle::Grad("K"), paddle::Grad("V")})
    .Attrs({"causal: bool"})
    .SetKernelFn(PD_KERNEL(llama_ops::backward));
