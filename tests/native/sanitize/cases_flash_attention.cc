#include <cmath>

#include "cases.h"
#include "llama_ops/flash_attention.h"

using cases::Array;
using cases::kUnwritten;
using cases::Numbers;

namespace {

struct Shape {
  int64_t batch, queries, keys, heads, groups, size;
};

// Documents of 7 rows, padding at the end; keys before the queries are for everybody.
void fill(Array<int32_t>* segments, Array<int32_t>* key_segments, const Shape& s) {
  const int64_t prefix = s.keys - s.queries;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t i = 0; i < s.queries; ++i) {
      const bool padding = i + 3 > s.queries;
      (*segments)[b * s.queries + i] = padding ? -1 : static_cast<int32_t>(i / 7);
      (*key_segments)[b * s.keys + prefix + i] = (*segments)[b * s.queries + i];
    }
    for (int64_t i = 0; i < prefix; ++i) (*key_segments)[b * s.keys + i] = LLAMA_OPS_EVERY_SEGMENT;
  }
}

void attend(const Shape& s, int dtype, bool documents) {
  const int64_t rows = s.batch * s.queries * s.heads, columns = s.batch * s.keys * s.groups;
  Numbers q(rows * s.size, dtype), k(columns * s.size, dtype), v(columns * s.size, dtype);
  Numbers out(rows * s.size, dtype, kUnwritten), grad_out(rows * s.size, dtype);
  Numbers grad_q(rows * s.size, dtype, kUnwritten), grad_k(columns * s.size, dtype, kUnwritten);
  Numbers grad_v(columns * s.size, dtype, kUnwritten);
  Array<float> lse(rows), lse_rest(rows);
  Array<int32_t> segments(s.batch * s.queries), key_segments(s.batch * s.keys);
  fill(&segments, &key_segments, s);
  llama_ops_flash_attention_backward_args back{};
  llama_ops_flash_attention_forward_args& args = back.forward;
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  args.segments = documents ? segments.data() : nullptr;
  args.key_segments = documents ? key_segments.data() : nullptr;
  args.out = out.data();
  args.lse = lse.data();
  args.lse_rest = lse_rest.data();
  args.batch = s.batch;
  args.queries = s.queries;
  args.keys = s.keys;
  args.heads = s.heads;
  args.groups = s.groups;
  args.size = s.size;
  args.prefix = s.keys - s.queries;
  args.scale = 1.0f / std::sqrt(static_cast<float>(s.size));
  args.dtype = dtype;
  llama_ops_flash_attention_forward(&args);
  out.require_written();
  back.grad_out = grad_out.data();
  back.grad_q = grad_q.data();
  back.grad_k = grad_k.data();
  back.grad_v = grad_v.data();
  llama_ops_flash_attention_backward(&back);
  grad_q.require_written();
  grad_k.require_written();
  grad_v.require_written();
}

}  // namespace

LLAMA_OPS_CASE(flash_attention) {
  const Shape shapes[] = {{1, 1, 1, 1, 1, 64},   {2, 17, 17, 4, 2, 20}, {1, 70, 75, 4, 1, 80},
                          {1, 33, 33, 8, 1, 16}, {1, 1, 40, 2, 2, 64},  {1, 130, 130, 2, 1, 128},
                          {1, 5, 5, 3, 3, 7}};
  for (const Shape& shape : shapes) {
    for (int dtype : {LLAMA_OPS_F32, LLAMA_OPS_BF16}) {
      for (bool documents : {false, true}) attend(shape, dtype, documents);
    }
  }
}
