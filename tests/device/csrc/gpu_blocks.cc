// block_multihead_attention as GPUs have it: reference arithmetic, and the kernels' checks.
//
// What is demanded, and where in Paddle 3.3.1 (T tokens, N sequences, S positions, H query heads, G
// key heads, D head dimension). fusion/gpu/block_attn.h lies in Paddle's wheel and was read there;
// block_multi_head_attention_kernel.cu was read in the repository, at releases beside this one.
//
// | demand                                  | by                                                 |
// |-----------------------------------------|----------------------------------------------------|
// | bfloat16 or float16                     | block_multi_head_attention_kernel.cu,              |
// |                                         | PD_REGISTER_KERNEL; int32 is for quantized inputs  |
// | both longest lengths on the host, int32 | the same, DispatchWithDtype: PADDLE_ENFORCE_EQ     |
// | caches [blocks, G, block, D], qkv's type| the same; block_attn.h, cache_kernel               |
// | lengths, offsets, tables int32          | the same: data<int>()                              |
// | qkv [T, (H + 2 G) D], changed in place  | the same; block_attn.h, gqa_rotary_qk_variable     |
// | D a multiple of 8                       | block_attn.h, qkv_transpose_split                  |
// | D 32, 64, 96 or 128 for single tokens   | block_attn.h, dispatch_blha_impl_headsize          |
// | blocks of 1, 32, 64 or 128, likewise    | block_attn.h, dispatch_blha_impl_blocksize         |
// | rope_emb float32 [2, 1, S, 1, D], angles| block_attn.h, GQANeoxVariableLengthRotaryKernel,   |
// | twice in a row, halves rotated          | gqa_block_attention_kernel                         |
// | scores of a head in shared memory       | block_attn.h, smem_size_in_bytes: 227 KiB on H100  |
// | a prompt begins at position 0           | block_attn.h, cache_kernel; the kernel's           |
// |                                         | FlashAttnUnpadded sees this step's keys only       |
// | one token of a sequence that goes on    | block_attn.h, GetDecoderTensorKernel               |
// | other tokens' outputs have no meaning   | FlashAttnUnpadded over memory that nobody wrote    |
//
// flash_attn_unpadded: the types, head dimensions and heads of flash_attn (gpu_attention.cc);
// cu_seqlens int32 [N + 1]: gpu/flash_attn_kernel.cu, FlashAttnUnpaddedBaseKernel. Where the
// diagonal lies with fewer queries than keys is assumed to differ between releases: refused here.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "numbers.h"
#include "register.h"

namespace rehearsal {
namespace {

using Optional = paddle::optional<DenseTensor>;
using phi::CustomContext;
constexpr double kNoNumber = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kSharedBytes = 227 * 1024;

double rounded(double number, DataType type) {
  const float narrow = static_cast<float>(number);
  if (type == DataType::BFLOAT16) return static_cast<float>(BFloat16(narrow));
  return static_cast<float>(Float16(narrow));
}

// Output of one query over keys and values, [count, D] each.
void attend(const double* query, const std::vector<const double*>& keys,
            const std::vector<const double*>& values, int64_t D, double* out) {
  std::vector<double> scores;
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (const double* key : keys) {
    double product = 0;
    for (int64_t d = 0; d < D; ++d) product += query[d] * key[d];
    scores.push_back(product / std::sqrt(static_cast<double>(D)));
    top = std::max(top, scores.back());
  }
  for (double& score : scores) sum += score = std::exp(score - top);
  std::fill_n(out, D, 0.0);
  for (size_t j = 0; j < keys.size(); ++j)
    for (int64_t d = 0; d < D; ++d) out[d] += scores[j] / sum * values[j][d];
}

void check_int32(const char* name, const DenseTensor& tensor) {
  PADDLE_ENFORCE_EQ(tensor.dtype(), DataType::INT32, phi::errors::InvalidArgument(
      "block_multihead_attention: %s is %s, not int32", name, tensor.dtype()));
}

int host_number(const char* name, const Optional& tensor) {
  PADDLE_ENFORCE_EQ(static_cast<bool>(tensor), true, phi::errors::InvalidArgument(
      "block_multihead_attention: without %s every layer reads it from the device", name));
  check_int32(name, *tensor);
  PADDLE_ENFORCE_EQ(tensor->place().GetType(), phi::AllocationType::CPU,
                    phi::errors::InvalidArgument("The place of input %s must be CPU, but got %s.",
                                                 name, tensor->place()));
  return tensor->data<int>()[0];
}

struct Step {
  int64_t T, N, H, G, D, block, width, longest;
  DataType type;
  const int *fresh, *before, *padding, *offsets, *starts, *table;
  std::vector<double> rows, keys, values, out;
  const float* angles;
  int64_t positions;

  int64_t first(int64_t n) const { return n * longest - offsets[n]; }
  double* head(int64_t token, int64_t head) { return &rows[(token * (H + 2 * G) + head) * D]; }
  int64_t place(int64_t n, int64_t head, int64_t position) const {
    PADDLE_ENFORCE_LT(position / block, width, phi::errors::InvalidArgument(
        "block_multihead_attention: position %d is past the block table", position));
    return ((table[n * width + position / block] * G + head) * block + position % block) * D;
  }
  void rotate(double* numbers, int64_t position) const {
    if (angles == nullptr) return;
    PADDLE_ENFORCE_LT(position, positions, phi::errors::InvalidArgument(
        "block_multihead_attention: no angle of position %d", position));
    const float* cosines = angles + position * D;
    const float* sines = cosines + positions * D;
    for (int64_t d = 0; d < D / 2; ++d) {
      const double real = numbers[d], imaginary = numbers[d + D / 2];
      numbers[d] = rounded(real * cosines[d] - imaginary * sines[d], type);
      numbers[d + D / 2] = rounded(imaginary * cosines[d] + real * sines[d], type);
    }
  }
  void keep(int64_t n, int64_t token, int64_t position) {
    for (int64_t g = 0; g < G; ++g) {
      std::copy_n(head(token, H + g), D, &keys[place(n, g, position)]);
      std::copy_n(head(token, H + G + g), D, &values[place(n, g, position)]);
    }
  }
};

void run_prompts(Step* step) {
  for (int64_t token = 0; token < step->T; ++token) {
    const int64_t at = token + step->padding[token], n = at / step->longest;
    if (step->fresh[n] == 0) continue;
    for (int64_t h = 0; h < step->H + step->G; ++h)
      step->rotate(step->head(token, h), at % step->longest);
    step->keep(n, token, at % step->longest);
  }
  for (int64_t n = 0; n < step->N; ++n)
    for (int64_t token = step->starts[n]; token < step->starts[n + 1] && step->fresh[n]; ++token)
      for (int64_t h = 0; h < step->H; ++h) {
        std::vector<const double*> keys, values;
        for (int64_t other = step->starts[n]; other <= token; ++other) {
          keys.push_back(step->head(other, step->H + h / (step->H / step->G)));
          values.push_back(step->head(other, step->H + step->G + h / (step->H / step->G)));
        }
        attend(step->head(token, h), keys, values, step->D,
               &step->out[(token * step->H + h) * step->D]);
      }
}

void run_singles(Step* step, int most) {
  for (int64_t n = 0; n < step->N; ++n) {
    const int64_t position = step->before[n], token = step->first(n);
    if (position == 0) continue;
    PADDLE_ENFORCE_LE(position, most, phi::errors::InvalidArgument(
        "block_multihead_attention: %d positions, max_dec_len_this_time %d", position, most));
    auto kept = step->rows;  // of single tokens a copy is rotated
    for (int64_t h = 0; h < step->H + step->G; ++h) step->rotate(step->head(token, h), position);
    step->keep(n, token, position);
    for (int64_t h = 0; h < step->H; ++h) {
      std::vector<const double*> keys, values;
      for (int64_t other = 0; other <= position; ++other) {
        keys.push_back(&step->keys[step->place(n, h / (step->H / step->G), other)]);
        values.push_back(&step->values[step->place(n, h / (step->H / step->G), other)]);
      }
      attend(step->head(token, h), keys, values, step->D,
             &step->out[(token * step->H + h) * step->D]);
    }
    step->rows.swap(kept);
  }
}

void check_shapes(const Step& step, bool singles, int most) {
  PADDLE_ENFORCE_EQ(step.D % 8, 0, phi::errors::PreconditionNotMet(
      "dim_head=%d must be divisible by vec_size=8", step.D));
  PADDLE_ENFORCE_EQ(step.H > 0 && step.H % step.G == 0, true, phi::errors::InvalidArgument(
      "block_multihead_attention: %d query heads, %d key heads", step.H, step.G));
  if (!singles) return;
  const int64_t D = step.D, block = step.block;
  PADDLE_ENFORCE_EQ(D == 32 || D == 64 || D == 96 || D == 128, true,
                    phi::errors::Unimplemented("Dim_head = %d is unsupported!", D));
  PADDLE_ENFORCE_EQ(block == 1 || block == 32 || block == 64 || block == 128, true,
                    phi::errors::Unimplemented("block_size = %d is unsupported!", block));
  const int64_t held = 2 * D + 8 * 2 * 4;  // a query and sums of eight warps
  const int64_t bytes = (most + 1 + 3) / 4 * 16 + (step.width + 3) / 4 * 16 + held;
  PADDLE_ENFORCE_LE(bytes, kSharedBytes, phi::errors::Unavailable(
      "cudaFuncSetAttribute() returned error: %d bytes of shared memory", bytes));
}

void check_angles(const Optional& angles, int64_t D, bool halves) {
  if (!angles) return;
  const auto& dims = angles->dims();
  PADDLE_ENFORCE_EQ(angles->dtype() == DataType::FLOAT32 && halves && dims.size() == 5 &&
                        dims[0] == 2 && dims[1] == 1 && dims[3] == 1 && dims[4] == D,
                    true, phi::errors::InvalidArgument(
                        "block_multihead_attention: rope_emb is %s [%s], use_neox_style %d",
                        angles->dtype(), dims, halves));
}

void block_attention(
    const CustomContext& context, const DenseTensor& qkv, const DenseTensor& key_cache,
    const DenseTensor& value_cache, const DenseTensor& fresh, const DenseTensor& before,
    const DenseTensor& now, const DenseTensor& padding, const DenseTensor& offsets,
    const DenseTensor& starts, const DenseTensor& starts_k, const DenseTensor& table,
    const Optional& pre_key, const Optional& pre_value, const Optional& angles,
    const Optional& mask, const Optional& tgt_mask, const Optional& k_quant,
    const Optional& v_quant, const Optional& k_dequant, const Optional& v_dequant,
    const Optional& qkv_scale, const Optional& bias, const Optional& shift, const Optional& smooth,
    const Optional& longest_fresh, const Optional& longest_before, int longest, int block,
    bool halves, bool, int, float, float, float out_scale, const std::string&, float,
    DenseTensor* out, DenseTensor* qkv_out, DenseTensor* key_out, DenseTensor* value_out) {
  for (const auto& [name, tensor] :
       {std::pair{"seq_lens_encoder", &fresh}, std::pair{"seq_lens_decoder", &before},
        std::pair{"seq_lens_this_time", &now}, std::pair{"padding_offsets", &padding},
        std::pair{"cum_offsets", &offsets}, std::pair{"cu_seqlens_q", &starts},
        std::pair{"cu_seqlens_k", &starts_k}, std::pair{"block_tables", &table}})
    check_int32(name, *tensor);
  for (const Optional* one : {&pre_key, &pre_value, &mask, &tgt_mask, &k_quant, &v_quant,
                              &k_dequant, &v_dequant, &qkv_scale, &bias, &shift, &smooth})
    PADDLE_ENFORCE_EQ(static_cast<bool>(*one) || out_scale > 0, false, phi::errors::Unimplemented(
        "rehearsal device: block_multihead_attention with masks, biases or quantization"));
  const auto& dims = key_cache.dims();
  PADDLE_ENFORCE_EQ(key_cache.dtype() == qkv.dtype() && value_cache.dtype() == qkv.dtype() &&
                        dims.size() == 4 && dims == value_cache.dims() && dims[2] == block,
                    true, phi::errors::InvalidArgument(
                        "block_multihead_attention: caches [%s] and [%s] in %s, qkv in %s, "
                        "block_size %d", dims, value_cache.dims(), key_cache.dtype(), qkv.dtype(),
                        block));
  const int64_t D = dims[3], G = dims[1], T = qkv.dims()[0];
  Step step{T, offsets.dims()[0], qkv.dims()[1] / D - 2 * G, G, D, block, table.dims()[1], longest,
            qkv.dtype(), fresh.data<int>(), before.data<int>(), padding.data<int>(),
            offsets.data<int>(), starts.data<int>(), table.data<int>(), numbers_of(qkv),
            numbers_of(key_cache), numbers_of(value_cache), {}, nullptr, 0};
  const int prompt = host_number("max_enc_len_this_time", longest_fresh);
  const int most = host_number("max_dec_len_this_time", longest_before);
  check_shapes(step, most > 0, most);
  check_angles(angles, D, halves);
  if (angles) step.angles = angles->data<float>(), step.positions = angles->dims()[2];
  step.out.assign(T * step.H * D, kNoNumber);
  if (prompt > 0) run_prompts(&step);
  if (most > 0) run_singles(&step, most);
  write(context, step.out, step.type, out);
  write(context, step.rows, step.type, qkv_out);
  write(context, step.keys, step.type, key_out);
  write(context, step.values, step.type, value_out);
}

void attend_unpadded(const CPUContext& context, const DenseTensor& q, const DenseTensor& k,
                     const DenseTensor& v, const DenseTensor& starts_q,
                     const DenseTensor& starts_k, const Optional&, const Optional& mask,
                     const phi::Scalar&, const phi::Scalar&, float scale, float dropout,
                     bool causal, bool, bool is_test, const std::string&, DenseTensor* out,
                     DenseTensor* softmax, DenseTensor* lse, DenseTensor* seed) {
  check_int32("cu_seqlens_q", starts_q);
  check_int32("cu_seqlens_k", starts_k);
  const int64_t H = q.dims()[1], G = k.dims()[1], D = q.dims()[2];
  PADDLE_ENFORCE_EQ(q.dtype() == k.dtype() && q.dtype() == v.dtype() && D % 8 == 0 && D <= 256 &&
                        H % G == 0 && q.dims().size() == 3,
                    true, phi::errors::External("Error in Flash-Attention: [%s] %s, [%s] %s",
                                                q.dims(), q.dtype(), k.dims(), k.dtype()));
  PADDLE_ENFORCE_EQ(static_cast<bool>(mask) || (dropout > 0 && !is_test) ||
                        std::abs(scale * std::sqrt(static_cast<float>(D)) - 1) > 1e-3,
                    false, phi::errors::Unimplemented("rehearsal device: this flash_attn_unpadded"));
  const auto queries = numbers_of(q), keys = numbers_of(k), values = numbers_of(v);
  const int *from = starts_q.data<int>(), *from_k = starts_k.data<int>();
  std::vector<double> result(q.numel(), kNoNumber);
  for (int64_t n = 0; n + 1 < starts_q.numel(); ++n) {
    const int64_t rows = from[n + 1] - from[n], columns = from_k[n + 1] - from_k[n];
    PADDLE_ENFORCE_EQ(causal && rows != columns, false, phi::errors::Unimplemented(
        "rehearsal device: the diagonal of %d queries and %d keys", rows, columns));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t h = 0; h < H; ++h) {
        std::vector<const double*> seen, weighed;
        for (int64_t j = 0; j < (causal ? i + 1 : columns); ++j) {
          seen.push_back(&keys[((from_k[n] + j) * G + h / (H / G)) * D]);
          weighed.push_back(&values[((from_k[n] + j) * G + h / (H / G)) * D]);
        }
        const int64_t at = ((from[n] + i) * H + h) * D;
        attend(&queries[at], seen, weighed, D, &result[at]);
      }
  }
  write(context, result, q.dtype(), out);
  for (DenseTensor* unread : {softmax, lse}) {
    if (unread == nullptr) continue;
    unread->Resize(phi::make_ddim({1}));
    write(context, {0.0}, unread->dtype(), unread);
  }
  seed->Resize(phi::make_ddim({2}));
  std::fill_n(context.Alloc<int64_t>(seed), 2, 0);
}

}  // namespace

void add_gpu_blocks() {
  const auto bf16 = DataType::BFLOAT16, fp16 = DataType::FLOAT16;
  auto& kernels = phi::KernelFactory::Instance().kernels();
  PUT_KERNEL("block_multihead_attention", own_backend(), block_attention, bf16, fp16);
  for (DataType type : {bf16, fp16}) {
    const phi::KernelKey key(own_backend(), phi::DataLayout::ALL_LAYOUT, type);
    auto& inputs = kernels["block_multihead_attention"][key].mutable_args_def()->input_defs();
    for (int i : {24, 25}) inputs[i].SetBackend(phi::Backend::CPU);
  }
  PUT_KERNEL("flash_attn_unpadded", phi::Backend::CPU, attend_unpadded, bf16, fp16);
}

}  // namespace rehearsal
