#include "cases.h"
#include "llama_ops/paged_attention.h"

using cases::Array;
using cases::Cache;
using cases::kUnwritten;
using cases::Numbers;

namespace {

struct Span {
  int32_t done, more;  // tokens in the cache, and tokens of the step
};

struct Step {
  std::initializer_list<Span> spans;
  int64_t heads, groups, dim, block;
};

// Queries, keys and values are parts of one product; the last token is padding.
void attend(const Step& step, int dtype, bool rotated) {
  int64_t tokens = 1, blocks = 0, width = 1, row = 0;
  for (const Span& span : step.spans) {
    const int64_t used = (span.done + span.more + step.block - 1) / step.block;
    tokens += span.more;
    blocks += used;
    width = used > width ? used : width;
  }
  Array<int32_t> table(int64_t(step.spans.size()) * width, -1), sequence(tokens, -1);
  Array<int32_t> position(tokens, -1);
  int64_t token = 0, next = blocks;
  for (const Span& span : step.spans) {
    for (int32_t at = 0; at * step.block < span.done + span.more; ++at) {
      table[row * width + at] = static_cast<int32_t>(--next);
    }
    for (int32_t at = span.done; at < span.done + span.more; ++at, ++token) {
      sequence[token] = static_cast<int32_t>(row);
      position[token] = at;
    }
    ++row;
  }
  const int64_t size = step.groups * step.dim, stride = step.heads * step.dim + 2 * size;
  Numbers product(tokens * stride, LLAMA_OPS_F32);
  Numbers out(tokens * step.heads * step.dim, LLAMA_OPS_F32, kUnwritten);
  const int64_t heads = blocks * step.block * step.groups;
  Cache k_cache(heads, step.dim, dtype), v_cache(heads, step.dim, dtype);
  Numbers cos(tokens * step.dim / 2, LLAMA_OPS_F32), sin(tokens * step.dim / 2, LLAMA_OPS_F32);
  llama_ops_paged_attention_args args{};
  args.q = product.floats();
  args.k = args.q + step.heads * step.dim;
  args.v = args.k + size;
  args.cos = rotated ? nullptr : cos.floats();
  args.sin = rotated ? nullptr : sin.floats();
  args.k_cache = k_cache.data();
  args.v_cache = v_cache.data();
  args.block_table = table.data();
  args.sequence = sequence.data();
  args.position = position.data();
  args.out = out.floats();
  args.q_stride = args.k_stride = args.v_stride = stride;
  args.tokens = tokens;
  args.heads = step.heads;
  args.groups = step.groups;
  args.dim = step.dim;
  args.block = step.block;
  args.table_width = width;
  args.cache_dtype = dtype;
  llama_ops_paged_attention(&args);
  out.require_written();
}

}  // namespace

LLAMA_OPS_CASE(paged_attention) {
  const Step steps[] = {
      {{{0, 1}}, 2, 2, 64, 16},
      {{{3, 5}, {0, 17}, {40, 1}, {2, 9}}, 6, 3, 10, 7},
      {{{299, 1}, {0, 1}, {511, 1}, {256, 1}}, 8, 8, 64, 16},
      {{{700, 1}, {63, 1}}, 8, 2, 128, 32},
      {{{1100, 1}, {5, 2}}, 8, 1, 80, 16},
      {{{70, 1}, {600, 2}}, 6, 2, 72, 16},
      {{{0, 150}, {100, 40}, {0, 300}}, 8, 2, 64, 16},
      {{{4, 8}, {0, 8}}, 8, 8, 8, 1},
  };
  for (const Step& step : steps) {
    for (int dtype : {LLAMA_OPS_F32, LLAMA_OPS_BF16, LLAMA_OPS_I8}) {
      for (bool rotated : {false, true}) attend(step, dtype, rotated);
    }
  }
}
