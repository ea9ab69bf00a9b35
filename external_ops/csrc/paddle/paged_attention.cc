// Paddle operator of llama_ops/paged_attention.h.
#include "llama_ops/paged_attention.h"

#include "paddle/paged_plan.h"

namespace llama_ops {
namespace {

using paddle::Tensor;

constexpr const char* kOp = "llama_ops_paged_attention";

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                  const Tensor& v_cache) {
  const Shape queries = q.shape(), keys = k.shape(), cache = k_cache.shape();
  LLAMA_OPS_CHECK(queries.size() == 3 && keys.size() == 3 && keys[0] == queries[0] &&
                      keys[2] == queries[2] && keys[1] > 0 && queries[1] % keys[1] == 0,
                  kOp, "keys ", text(keys), " have to be [T, G, D] for queries [T, H, D] ",
                  text(queries), ", H a multiple of G");
  LLAMA_OPS_CHECK(v.shape() == keys, kOp, "values ", text(v.shape()), " and keys ", text(keys),
                  " have to have one shape");
  LLAMA_OPS_CHECK(cache.size() == 4 && cache[2] == keys[1] && cache[1] > 0 &&
                      stored_in(k_cache, kOp).dim == keys[2],
                  kOp, "the cache ", text(cache), " has to be [blocks, block, G, D] for keys ",
                  text(keys), ", [blocks, block, G, D + ", LLAMA_OPS_SCALE_BYTES, "] of int8");
  LLAMA_OPS_CHECK(v_cache.shape() == cache && v_cache.dtype() == k_cache.dtype(), kOp,
                  "the caches of keys ", text(cache), " and values ", text(v_cache.shape()),
                  " have to have one shape and type");
  for (const Tensor* one : {&q, &k, &v}) {
    LLAMA_OPS_CHECK(one->dtype() == paddle::DataType::FLOAT32, kOp,
                    "queries, keys and values have to be float32; cast them (the cache may be "
                    "bfloat16 or int8)");
  }
}

std::vector<Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& k_cache,
                           Tensor& v_cache, const Tensor& block_table, const Tensor& sequence,
                           const Tensor& position) {
  check_shapes(q, k, v, k_cache, v_cache);
  const Shape shape = q.shape(), table = block_table.shape(), tokens{shape[0]};
  LLAMA_OPS_CHECK(table.size() == 2 && sequence.shape() == tokens && position.shape() == tokens,
                  kOp, "the block table ", text(table), ", sequence ", text(sequence.shape()),
                  " and position ", text(position.shape()), " have to be [N, M], [T] and [T] for ",
                  shape[0], " tokens");
  for (const Tensor* one : {&block_table, &sequence, &position}) {
    LLAMA_OPS_CHECK(one->dtype() == paddle::DataType::INT32, kOp,
                    "block table, sequence and position have to be int32; cast them");
  }
  Tensor out = paddle::empty_like(q);
  llama_ops_paged_attention_args args{};
  args.q = q.data<float>();
  args.k = k.data<float>();
  args.v = v.data<float>();
  args.k_cache = k_cache.data();
  args.v_cache = v_cache.data();
  args.block_table = block_table.data<int32_t>();
  args.sequence = sequence.data<int32_t>();
  args.position = position.data<int32_t>();
  args.out = out.data<float>();
  args.tokens = shape[0];
  args.heads = shape[1];
  args.groups = k.shape()[1];
  args.dim = shape[2];
  args.q_stride = args.heads * args.dim;
  args.k_stride = args.v_stride = args.groups * args.dim;
  args.block = k_cache.shape()[1];
  args.table_width = table[1];
  args.cache_dtype = stored_in(k_cache, kOp).dtype;
  check_plan({args.block_table, args.sequence, args.position, args.tokens, table[0],
              args.table_width, args.block, k_cache.shape()[0]},
             kOp);
  llama_ops_paged_attention(&args);
  return {out};
}

std::vector<Shape> shapes(const Shape& q, const Shape&, const Shape&, const Shape& k_cache,
                          const Shape& v_cache, const Shape&, const Shape&, const Shape&) {
  return {q, k_cache, v_cache};
}

using Type = paddle::DataType;

std::vector<Type> types(const Type& q, const Type&, const Type&, const Type& k_cache,
                        const Type& v_cache, const Type&, const Type&, const Type&) {
  return {q, k_cache, v_cache};
}

}  // namespace
}  // namespace llama_ops

PD_BUILD_OP(llama_ops_paged_attention)
    .Inputs({"Q", "K", "V", "KCache", "VCache", "BlockTable", "Sequence", "Position"})
    .Outputs({"Out", "KCacheOut", "VCacheOut"})
    .SetInplaceMap({{"KCache", "KCacheOut"}, {"VCache", "VCacheOut"}})
    .SetKernelFn(PD_KERNEL(llama_ops::attend))
    .SetInferShapeFn(PD_INFER_SHAPE(llama_ops::shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(llama_ops::types));
