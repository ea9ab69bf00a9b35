// fused_rotary_position_embedding and weight_only_linear as GPUs have them: reference arithmetic,
// and the kernels' checks.
//
// What is demanded, and where in Paddle 3.3.1. fusion/gpu/fused_rope_utils.h and
// impl/weight_quantize_kernel_impl.h lie in Paddle's wheel and were read there; the kernels were
// read in the repository, at releases beside this one.
//
// | demand                                  | by                                                 |
// |-----------------------------------------|----------------------------------------------------|
// | rotary: four axes, an even D            | fusion/gpu/fused_rope_kernel.cu, FusedRopeKernel   |
// | rotary: sin and cos of q's type,        | the same: sin->data<T>()                           |
// | [1, S, 1, D] or [S, D], one as the other| the same: PADDLE_ENFORCE_EQ                        |
// | rotary: S is q's without position_ids   | the same                                           |
// | rotary: position_ids int64 [B, S]       | the same                                           |
// | rotary: float32 inside, rounded once    | fused_rope_utils.h, FusedRopeKernelImpl            |
// | rotary: gradients of q and k, both      | fusion/gpu/fused_rope_grad_kernel.cu: Alloc of dq  |
// | linear: bfloat16 or float16             | gpu/weight_only_linear_kernel.cu,                  |
// |                                         | PD_REGISTER_KERNEL                                 |
// | linear: capability 70, 75, 80, 86, 89,  | the same: PADDLE_ENFORCE_EQ                        |
// | 90 or 100                               |                                                    |
// | linear: scales and bias of x's type     | the same: weight_scale.data<T>()                   |
// | linear: scales [N] or [K / group, N]    | the same, n                                        |
// | linear: groups of 64 or 128             | python/paddle/nn/quant/quantized_linear.py         |
// | linear: int8 [N, K] or [N / 2, K], rows | impl/weight_quantize_kernel_impl.h                 |
// | and columns interleaved (from 75 on)    |                                                    |
// | linear: K and N multiples of 64         | the same, interleave_column_major_tensor: tiles of |
// |                                         | 64 rows; of N assumed                              |
#include <cmath>
#include <string>
#include <vector>

#include "numbers.h"
#include "register.h"

namespace rehearsal {
namespace {

using Optional = paddle::optional<DenseTensor>;

struct Angles {
  std::vector<double> sines, cosines;
  const int64_t* places = nullptr;
};

Angles angles_of(const DenseTensor& q, const Optional& sin, const Optional& cos,
                 const Optional& places, bool adjacent, bool time_major) {
  PADDLE_ENFORCE_EQ(sin && cos && !adjacent && !time_major, true, phi::errors::Unimplemented(
      "rehearsal device: fused_rotary_position_embedding of this form"));
  PADDLE_ENFORCE_EQ(q.dims().size() == 4 && q.dims()[3] % 2 == 0, true,
                    phi::errors::InvalidArgument(
                        "The head_dim of input must be a multiple of 2: q is [%s]", q.dims()));
  PADDLE_ENFORCE_EQ(sin->dtype() == q.dtype() && cos->dtype() == q.dtype(), true,
                    phi::errors::InvalidArgument(
                        "fused_rotary_position_embedding: q is %s, sin %s, cos %s", q.dtype(),
                        sin->dtype(), cos->dtype()));
  const auto& dims = sin->dims();
  const bool four = dims.size() == 4;
  PADDLE_ENFORCE_EQ(dims == cos->dims() && (dims.size() == 2 || (four && dims[0] == 1 &&
                                                                 dims[2] == 1)),
                    true, phi::errors::InvalidArgument(
                        "The batch_size and num_heads of sin and cos must be 1: [%s], [%s]", dims,
                        cos->dims()));
  const int64_t length = dims[four ? 1 : 0], S = q.dims()[1];
  PADDLE_ENFORCE_EQ(dims[dims.size() - 1] == q.dims()[3] &&
                        (places ? length >= S : length == S),
                    true, phi::errors::InvalidArgument(
                        "The seq_len and head_dim of sin and cos must be the same as those of q. "
                        "But received sin's shape is {%s}, q's shape is {%s}.", dims, q.dims()));
  Angles angles{numbers_of(*sin), numbers_of(*cos)};
  if (!places) return angles;
  PADDLE_ENFORCE_EQ(places->dtype() == DataType::INT64 && places->dims().size() == 2 &&
                        places->dims()[0] == q.dims()[0] && places->dims()[1] == S,
                    true, phi::errors::InvalidArgument(
                        "The batch_size and seq_len of position_ids must be the same as those of "
                        "q: %s [%s]", places->dtype(), places->dims()));
  angles.places = places->data<int64_t>();
  return angles;
}

void rotate(const phi::DeviceContext& context, const Angles& angles, const DenseTensor& x,
            bool back, DenseTensor* out) {
  if (out == nullptr) return;
  const int64_t B = x.dims()[0], S = x.dims()[1], H = x.dims()[2], D = x.dims()[3];
  auto numbers = numbers_of(x);
  for (int64_t row = 0; row < B * S; ++row) {
    const int64_t place = angles.places ? angles.places[row] : row % S;
    for (int64_t h = 0; h < H; ++h)
      for (int64_t d = 0; d < D / 2; ++d) {
        double &real = numbers[(row * H + h) * D + d], &other = numbers[(row * H + h) * D + d + D / 2];
        const double left = real, right = other, turn = back ? -1 : 1;
        const double* sin = &angles.sines[place * D + d];
        const double* cos = &angles.cosines[place * D + d];
        real = left * cos[0] - turn * right * sin[back ? D / 2 : 0];
        other = right * cos[D / 2] + turn * left * sin[back ? 0 : D / 2];
      }
  }
  write(context, numbers, x.dtype(), out);
}

void rotary(const CPUContext& context, const DenseTensor& q, const Optional& k, const Optional& v,
            const Optional& sin, const Optional& cos, const Optional& places, bool adjacent,
            bool time_major, float, DenseTensor* out_q, DenseTensor* out_k, DenseTensor* out_v) {
  const Angles angles = angles_of(q, sin, cos, places, adjacent, time_major);
  rotate(context, angles, q, false, out_q);
  if (k) rotate(context, angles, *k, false, out_k);
  if (v) rotate(context, angles, *v, false, out_v);
}

void rotary_grad(const CPUContext& context, const Optional& sin, const Optional& cos,
                 const Optional& places, const DenseTensor& grad_q, const Optional& grad_k,
                 const Optional& grad_v, bool adjacent, bool time_major, float, DenseTensor* to_q,
                 DenseTensor* to_k, DenseTensor* to_v) {
  PADDLE_ENFORCE_EQ(to_q != nullptr && (!grad_k || to_k != nullptr), true,
                    phi::errors::InvalidArgument("fused_rotary_position_embedding_grad: the kernel "
                                                 "writes the gradients of q and k, wanted or not"));
  const Angles angles = angles_of(grad_q, sin, cos, places, adjacent, time_major);
  rotate(context, angles, grad_q, true, to_q);
  if (grad_k) rotate(context, angles, *grad_k, true, to_k);
  if (grad_v) rotate(context, angles, *grad_v, true, to_v);
}

// The integer of input k and output n as weight_quantize leaves it.
int stored(const uint8_t* data, int64_t K, int64_t k, int64_t n, int bits) {
  // Rows: pairs of inputs 8 apart become neighbours inside of 16 or 32.
  const int64_t tile = bits == 8 ? 16 : 32, per_word = 32 / bits;
  const int64_t in = k % tile, pair = in % 8 / 2, again = in / 8;
  const int64_t row = k - in + pair * per_word + again * 2 + in % 2;
  // Columns: 64 rows of 2 or 4 outputs in turn.
  const int64_t several = 16 / bits;
  const int64_t at = (n / several * several * K) + row / 64 * 64 * several + n % several * 64 + row % 64;
  // Inside of a 32-bit word the even ones come first; for bytes the middle two change places.
  const int64_t word = at / per_word, in_word = at % per_word;
  int64_t place = in_word;
  if (bits == 8 && (in_word == 1 || in_word == 2)) place = 3 - in_word;
  if (bits == 4) place = in_word % 2 * 4 + in_word / 2;
  if (bits == 8) return static_cast<int>(data[word * 4 + place]) - 128;
  return ((data[word * 4 + place / 2] >> (4 * (place % 2))) & 15) - 8;
}

void check_linear(const DenseTensor& x, const DenseTensor& weight, const Optional& bias,
                  const DenseTensor& scale, const std::string& type, int arch, int group) {
  bool known = false;
  for (int one : {70, 75, 80, 86, 89, 90, 100}) known |= arch == one;
  PADDLE_ENFORCE_EQ(known, true, phi::errors::InvalidArgument(
      "Currently, arch only support 70, 75, 80, 86, 89, 90, 100."));
  PADDLE_ENFORCE_NE(arch, 70, phi::errors::Unimplemented("rehearsal device: the layout of sm_70"));
  PADDLE_ENFORCE_EQ(weight.dtype() == DataType::INT8 && (type == "int8" || type == "int4"), true,
                    phi::errors::InvalidArgument("weight_only_linear: %s of %s", type,
                                                 weight.dtype()));
  PADDLE_ENFORCE_EQ(scale.dtype() == x.dtype() && (!bias || bias->dtype() == x.dtype()), true,
                    phi::errors::InvalidArgument("weight_only_linear: x is %s, its scales are %s",
                                                 x.dtype(), scale.dtype()));
  PADDLE_ENFORCE_EQ(group == -1 || group == 64 || group == 128, true, phi::errors::InvalidArgument(
      "Currently weight_quantize only support group size of -1, 64 or 128. but got %d", group));
}

void linear(const CPUContext& context, const DenseTensor& x, const DenseTensor& weight,
            const Optional& bias, const DenseTensor& scale, const std::string& type, int arch,
            int group, DenseTensor* out) {
  check_linear(x, weight, bias, scale, type, arch, group);
  const int bits = type == "int8" ? 8 : 4;
  const int64_t K = weight.dims()[1], N = weight.dims()[0] * (8 / bits), M = x.numel() / K;
  PADDLE_ENFORCE_EQ(K % 64 == 0 && N % 64 == 0, true, phi::errors::InvalidArgument(
      "weight_only_linear: %d inputs, %d outputs; tiles have 64", K, N));
  PADDLE_ENFORCE_EQ(scale.numel(), group > 0 ? K / group * N : N, phi::errors::InvalidArgument(
      "weight_only_linear: scales [%s] of %d outputs", scale.dims(), N));
  const auto numbers = numbers_of(x), scales = numbers_of(scale);
  const auto added = bias ? numbers_of(*bias) : std::vector<double>(N, 0.0);
  const uint8_t* data = reinterpret_cast<const uint8_t*>(weight.data<int8_t>());
  std::vector<double> result(M * N), column(K);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k)
      column[k] = stored(data, K, k, n, bits) * scales[group > 0 ? k / group * N + n : n];
    for (int64_t m = 0; m < M; ++m) {
      double sum = added[n];
      for (int64_t k = 0; k < K; ++k) sum += numbers[m * K + k] * column[k];
      result[m * N + n] = sum;
    }
  }
  write(context, result, x.dtype(), out);
}

}  // namespace

void add_gpu_fused() {
  const auto cpu = phi::Backend::CPU;
  const auto bf16 = DataType::BFLOAT16, fp16 = DataType::FLOAT16, fp32 = DataType::FLOAT32;
  PUT_KERNEL("fused_rotary_position_embedding", cpu, rotary, bf16, fp16, fp32);
  PUT_KERNEL("fused_rotary_position_embedding_grad", cpu, rotary_grad, bf16, fp16, fp32);
  PUT_KERNEL("weight_only_linear", cpu, linear, bf16, fp16);
}

}  // namespace rehearsal
