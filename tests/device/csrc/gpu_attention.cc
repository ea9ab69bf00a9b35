// FlashAttention and FlashMask as GPUs have them: reference arithmetic, and the kernels' checks.
//
// What is demanded, and where in Paddle 3.3.1 (paddle/phi/kernels, unless another place is named;
// B batch, S queries, K keys, H query heads, G key heads, D head dimension):
//
// | demand                        | by                                                          |
// |-------------------------------|-------------------------------------------------------------|
// | bfloat16 or float16           | gpu/flash_attn_kernel.cu, PD_REGISTER_KERNEL: no other type |
// | q, k, v of one type           | the same, FlashAttnBaseKernel hands on q's type only        |
// | four axes                     | the same, FlashAttnBaseKernel                               |
// | D a multiple of 8, <= 256     | flashattn, csrc/capi/flash_attn.cu, CHECK_FWD_EXECUTABLE    |
// | H a multiple of G, B > 0      | the same                                                    |
// | no mask beside causal         | assumed: FlashAttnParamsBase of earlier releases            |
// | dout's D is q's               | gpu/flash_attn_grad_kernel.cu, FlashAttnGradBaseKernel      |
// | innermost axis contiguous     | assumed: flash_attn_fwd is given no stride of it            |
// | bounds in int32, four axes    | gpu/flash_attn_utils.h, GetAttnSparseMaskDims               |
// | 1, 2 or 4 bounds              | gpu/flash_attn_kernel.cu, FlashAttnBaseKernel               |
// | a bound per key, S = K        | assumed                                                     |
// | bounds of 1, G or H heads     | assumed                                                     |
// | lse float32, [B, H, S to 128] | gpu/flash_attn_utils.h, FlashAttnFwdParamsV2                |
// | gradients may be left out     | gpu/flash_attn_grad_kernel.cu, FlashAttnGradBaseKernel      |
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "numbers.h"
#include "register.h"

namespace rehearsal {
namespace {

using Optional = paddle::optional<DenseTensor>;
// Whether query i of head h and row b must not see key j.
using Hidden = std::function<bool(int64_t b, int64_t h, int64_t i, int64_t j)>;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Shape {
  int64_t B, S, K, H, G, D, rounded;
  int64_t query(int64_t b, int64_t i, int64_t h) const { return ((b * S + i) * H + h) * D; }
  int64_t key(int64_t b, int64_t j, int64_t h) const {
    return ((b * K + j) * G + h / (H / G)) * D;
  }
  int64_t row(int64_t b, int64_t h, int64_t i) const { return (b * H + h) * rounded + i; }
};

void check_contiguous(const char* name, const DenseTensor& tensor) {
  const auto& strides = tensor.strides();
  PADDLE_ENFORCE_EQ(strides[strides.size() - 1], 1, phi::errors::InvalidArgument(
      "flash_attn: the innermost axis of %s has stride %d, not 1", name,
      strides[strides.size() - 1]));
}

Shape checked(const DenseTensor& q, const DenseTensor& k, const DenseTensor& v, double dropout) {
  for (const auto& [name, tensor] : {std::pair{"q", &q}, std::pair{"k", &k}, std::pair{"v", &v}}) {
    PADDLE_ENFORCE_EQ(tensor->dims().size(), 4, phi::errors::InvalidArgument(
        "flash_attn: %s has the shape [%s], not [batch, sequence, heads, head dimension]", name,
        tensor->dims()));
    PADDLE_ENFORCE_EQ(tensor->dtype(), q.dtype(), phi::errors::InvalidArgument(
        "flash_attn: q is %s, %s is %s", q.dtype(), name, tensor->dtype()));
    check_contiguous(name, *tensor);
  }
  const Shape shape{q.dims()[0], q.dims()[1], k.dims()[1], q.dims()[2], k.dims()[2], q.dims()[3],
                    (q.dims()[1] + 127) / 128 * 128};
  PADDLE_ENFORCE_EQ(shape.D % 8 == 0 && shape.D <= 256, true, phi::errors::External(
      "Error in Flash-Attention: the head dimension is a multiple of 8, at most 256, not %d",
      shape.D));
  PADDLE_ENFORCE_EQ(shape.B > 0 && shape.H % shape.G == 0, true, phi::errors::External(
      "Error in Flash-Attention: %d rows, %d query heads, %d key heads", shape.B, shape.H,
      shape.G));
  PADDLE_ENFORCE_EQ(dropout, 0.0, phi::errors::Unimplemented("rehearsal device: dropout"));
  return shape;
}

// Scores of a query over all keys, -infinity where it must not look.
std::vector<double> scores(const Shape& s, const std::vector<double>& q,
                           const std::vector<double>& k, const Hidden& hidden, int64_t b,
                           int64_t h, int64_t i) {
  std::vector<double> row(s.K, -kInfinity);
  for (int64_t j = 0; j < s.K; ++j) {
    if (hidden(b, h, i, j)) continue;
    double product = 0;
    const int64_t query = s.query(b, i, h), key = s.key(b, j, h);
    for (int64_t d = 0; d < s.D; ++d) product += q[query + d] * k[key + d];
    row[j] = product / std::sqrt(static_cast<double>(s.D));
  }
  return row;
}

void attend(const CPUContext& context, const Shape& s, const DenseTensor& q, const DenseTensor& k,
            const DenseTensor& v, const Hidden& hidden, DenseTensor* out, DenseTensor* lse) {
  const auto queries = numbers_of(q), keys = numbers_of(k), values = numbers_of(v);
  std::vector<double> result(q.numel(), 0.0), sums(s.B * s.H * s.rounded, 0.0);
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t h = 0; h < s.H; ++h)
      for (int64_t i = 0; i < s.S; ++i) {
        const auto row = scores(s, queries, keys, hidden, b, h, i);
        double top = -kInfinity, sum = 0;
        for (double score : row) top = std::max(top, score);
        for (double score : row) sum += top == -kInfinity ? 0 : std::exp(score - top);
        sums[s.row(b, h, i)] = sum == 0 ? kInfinity : top + std::log(sum);
        if (sum == 0) continue;  // a query that sees nothing gets zeros
        for (int64_t j = 0; j < s.K; ++j) {
          if (row[j] == -kInfinity) continue;
          const double weight = std::exp(row[j] - top) / sum;
          const int64_t key = s.key(b, j, h), at = s.query(b, i, h);
          for (int64_t d = 0; d < s.D; ++d) result[at + d] += weight * values[key + d];
        }
      }
  write(context, result, q.dtype(), out);
  lse->Resize(phi::make_ddim({s.B, s.H, s.rounded}));
  write(context, sums, DataType::FLOAT32, lse);
}

void attend_grad(const CPUContext& context, const Shape& s, const DenseTensor& q,
                 const DenseTensor& k, const DenseTensor& v, const DenseTensor& out,
                 const DenseTensor& lse, const DenseTensor& dout, const Hidden& hidden,
                 DenseTensor* dq, DenseTensor* dk, DenseTensor* dv) {
  PADDLE_ENFORCE_EQ(dout.dims()[3], s.D, phi::errors::InvalidArgument(
      "flash_attn_bwd receive input with head_size_og == head_size"));
  const auto queries = numbers_of(q), keys = numbers_of(k), values = numbers_of(v);
  const auto outputs = numbers_of(out), grads = numbers_of(dout), sums = numbers_of(lse);
  std::vector<double> to_q(q.numel(), 0.0), to_k(k.numel(), 0.0), to_v(v.numel(), 0.0);
  const double scale = 1 / std::sqrt(static_cast<double>(s.D));
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t h = 0; h < s.H; ++h)
      for (int64_t i = 0; i < s.S; ++i) {
        const int64_t at = s.query(b, i, h);
        const auto row = scores(s, queries, keys, hidden, b, h, i);
        double along = 0;
        for (int64_t d = 0; d < s.D; ++d) along += outputs[at + d] * grads[at + d];
        for (int64_t j = 0; j < s.K; ++j) {
          if (row[j] == -kInfinity) continue;
          const int64_t key = s.key(b, j, h);
          const double weight = std::exp(row[j] - sums[s.row(b, h, i)]);
          double up = 0;
          for (int64_t d = 0; d < s.D; ++d) up += grads[at + d] * values[key + d];
          for (int64_t d = 0; d < s.D; ++d) {
            to_v[key + d] += weight * grads[at + d];
            to_q[at + d] += weight * (up - along) * scale * keys[key + d];
            to_k[key + d] += weight * (up - along) * scale * queries[at + d];
          }
        }
      }
  write(context, to_q, q.dtype(), dq);
  write(context, to_k, q.dtype(), dk);
  write(context, to_v, q.dtype(), dv);
}

// The last query stands beside the last key.
Hidden causally(const Shape& s, bool causal) {
  return [=](int64_t, int64_t, int64_t i, int64_t j) { return causal && j > i + s.K - s.S; };
}

// Rows that must not see a key: [first, end) below the diagonal and, without causal, above it.
Hidden between(const Shape& s, const DenseTensor& bounds, bool causal) {
  const auto& dims = bounds.dims();
  PADDLE_ENFORCE_EQ(bounds.dtype(), DataType::INT32, phi::errors::InvalidArgument(
      "dtype of startend_row_indices must be int32, but received %s", bounds.dtype()));
  PADDLE_ENFORCE_EQ(dims.size(), 4, phi::errors::InvalidArgument(
      "flashmask_attention: bounds are [batch, heads, keys, 1, 2 or 4], not [%s]", dims));
  const int64_t heads = dims[1], count = dims[3];
  PADDLE_ENFORCE_EQ(count == 1 || count == 2 || count == 4, true, phi::errors::InvalidArgument(
      "flashmask_attention startend_row_indices mask_bounds must in [1,2,4], not %d", count));
  PADDLE_ENFORCE_EQ(dims[2] == s.K && s.S == s.K, true, phi::errors::InvalidArgument(
      "flashmask_attention: %d rows, %d keys, bounds of %d", s.S, s.K, dims[2]));
  PADDLE_ENFORCE_EQ(heads == 1 || heads == s.G || heads == s.H, true,
                    phi::errors::InvalidArgument("flashmask_attention: bounds of %d heads", heads));
  const int32_t* rows = bounds.data<int32_t>();
  return [=](int64_t b, int64_t h, int64_t i, int64_t j) {
    const int64_t head = heads == 1 ? 0 : heads == s.H ? h : h / (s.H / s.G);
    const int32_t* bound = rows + ((b * heads + head) * s.K + j) * count;
    if (causal) return j > i || (i >= bound[0] && (count == 1 || i < bound[1]));
    if (count == 4) return (i >= bound[0] && i < bound[1]) || (i >= bound[2] && i < bound[3]);
    return i >= bound[0] || (count == 2 && i < bound[1]);
  };
}

void no_seed(const CPUContext& context, DenseTensor* seed) {
  seed->Resize(phi::make_ddim({2}));
  int64_t* numbers = context.Alloc<int64_t>(seed);
  numbers[0] = numbers[1] = 0;
}

void refuse_mask(const Optional& mask, bool causal) {
  PADDLE_ENFORCE_EQ(mask && causal, false, phi::errors::InvalidArgument(
      "When attn_mask is set, causal can not be true."));
  PADDLE_ENFORCE_EQ(static_cast<bool>(mask), false,
                    phi::errors::Unimplemented("rehearsal device: flash_attn with a dense mask"));
}

void flash_attn(const CPUContext& context, const DenseTensor& q, const DenseTensor& k,
                const DenseTensor& v, const Optional&, const Optional& mask, float dropout,
                bool causal, bool, bool is_test, const std::string&, DenseTensor* out,
                DenseTensor*, DenseTensor* lse, DenseTensor* seed) {
  refuse_mask(mask, causal);
  const Shape shape = checked(q, k, v, is_test ? 0 : dropout);
  attend(context, shape, q, k, v, causally(shape, causal), out, lse);
  no_seed(context, seed);
}

void flash_attn_grad(const CPUContext& context, const DenseTensor& q, const DenseTensor& k,
                     const DenseTensor& v, const DenseTensor& out, const DenseTensor& lse,
                     const DenseTensor&, const Optional&, const DenseTensor& dout, float dropout,
                     bool causal, DenseTensor* dq, DenseTensor* dk, DenseTensor* dv) {
  const Shape shape = checked(q, k, v, dropout);
  attend_grad(context, shape, q, k, v, out, lse, dout, causally(shape, causal), dq, dk, dv);
}

void flashmask(const CPUContext& context, const DenseTensor& q, const DenseTensor& k,
               const DenseTensor& v, const DenseTensor& bounds, const Optional&, float dropout,
               bool causal, bool, bool is_test, const std::string&, DenseTensor* out,
               DenseTensor*, DenseTensor* lse, DenseTensor* seed) {
  const Shape shape = checked(q, k, v, is_test ? 0 : dropout);
  attend(context, shape, q, k, v, between(shape, bounds, causal), out, lse);
  no_seed(context, seed);
}

void flashmask_grad(const CPUContext& context, const DenseTensor& q, const DenseTensor& k,
                    const DenseTensor& v, const DenseTensor& bounds, const DenseTensor& out,
                    const DenseTensor& lse, const DenseTensor&, const DenseTensor& dout,
                    float dropout, bool causal, DenseTensor* dq, DenseTensor* dk,
                    DenseTensor* dv) {
  const Shape shape = checked(q, k, v, dropout);
  const Hidden hidden = between(shape, bounds, causal);
  attend_grad(context, shape, q, k, v, out, lse, dout, hidden, dq, dk, dv);
}

}  // namespace

void add_gpu_attention() {
  auto& kernels = phi::KernelFactory::Instance().kernels();
  for (const char* name : {"flash_attn", "flash_attn_grad", "flashmask_attention",
                           "flashmask_attention_grad"})
    kernels[name].clear();  // GPUs have no float32 form
  const auto cpu = phi::Backend::CPU;
  const auto bf16 = DataType::BFLOAT16, fp16 = DataType::FLOAT16;
  PUT_KERNEL("flash_attn", cpu, flash_attn, bf16, fp16);
  PUT_KERNEL("flash_attn_grad", cpu, flash_attn_grad, bf16, fp16);
  PUT_KERNEL("flashmask_attention", cpu, flashmask, bf16, fp16);
  PUT_KERNEL("flashmask_attention_grad", cpu, flashmask_grad, bf16, fp16);
}

}  // namespace rehearsal
