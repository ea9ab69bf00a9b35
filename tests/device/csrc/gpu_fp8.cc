// fp8_quant_blockwise and fp8_gemm_blockwise_ as GPUs have them: reference arithmetic, and the
// kernels' checks.
//
// What is demanded, and where in Paddle 3.3.1 (M rows, K columns of what is quantized; a product
// maps A [N, K] and B [M, K] to [M, N]). Both kernels were read in the repository, at releases
// beside this one; python/paddle/incubate/nn/functional/fp8.py lies in Paddle's wheel.
//
// | demand                                  | by                                                 |
// |-----------------------------------------|----------------------------------------------------|
// | quant: two axes, no e5m2                | phi/infermeta/unary.cc, Fp8QuantBlockwiseInferMeta |
// | quant: bfloat16 or float16              | legacy/gpu/fp8_quant_blockwise_kernel.cu,          |
// |                                         | FP8QuantBlockWiseKernel: PD_CHECK                  |
// | quant: scales as float32                | the same; int32 with using_ue8m0_scale is for      |
// |                                         | other products                                     |
// | quant: a multiple of 128 rows, but for  | the same, FP8QuantBlockWiseKernelImpl: PD_CHECK    |
// | 1x128 without a transposed result       | Fp8QuantBlockwiseInferMeta, too                    |
// | quant: a multiple of 128 columns        | the same: PD_CHECK; with 128 rows its kernels read |
// |                                         | whole tiles without asking                         |
// | quant: 448 / largest, down to a power   | the same, ScaleWrapper; NaN counts for nothing, an |
// | of two; zeros have scale 1              | infinite one makes the scale 0                     |
// | product: A transposed, B not            | legacy/gpu/fp8_gemm_blockwise_kernel.cu,           |
// |                                         | cublas_gemm_blockwise_impl: PADDLE_ENFORCE_EQ      |
// | product: float8, scales float32, result | the same                                           |
// | bfloat16 or float32, two axes each      |                                                    |
// | product: not both in blocks of 128x128  | the same: PADDLE_THROW                             |
// | product: CUDA 12.9, capability 9.0      | the same: CUBLAS_VERSION; cuBLAS's guide, "Scaling |
// |                                         | Mode Support Overview"                             |
// | product: K of both                      | phi/infermeta/multiary.cc,                         |
// |                                         | Fp8GemmBlockwiseInferMeta                          |
// | product: scales of 1x128 [K / 128, rows]| cuBLAS's guide, "128-element 1D and 128x128 2D     |
// | of 128x128 [rows / 128, K / 128], whose | Block Scaling"; the kernel hands over addresses    |
// | rows have a multiple of 4               | alone                                              |
// | product: multiples of 16                | cuBLAS's guide, cublasLtMatmul: 16-byte alignment  |
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "numbers.h"
#include "paddle/phi/common/float8_e4m3fn.h"
#include "register.h"

namespace rehearsal {
namespace {

using phi::CustomContext;
using Float8 = phi::dtype::float8_e4m3fn;
constexpr int64_t kBlock = 128;
constexpr float kLargest = 448;

int64_t blocks_of(int64_t size) { return (size + kBlock - 1) / kBlock; }

// The nearest number with three bits behind the point, ties to even; larger ones become 448.
uint8_t encode(float number) {
  const uint8_t sign = std::signbit(number) ? 0x80 : 0;
  if (std::isnan(number)) return sign | 0x7f;
  const double size = std::min(std::fabs(number), kLargest);
  const int exponent = size < 0x1p-6 ? -6 : std::ilogb(size);
  // 8 … 16 of a normal number, 0 … 8 below; a sum carries into the exponent by itself.
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));
  return sign | static_cast<uint8_t>(((exponent + 6) << 3) + steps);
}

double decode(uint8_t code) {
  const int exponent = (code >> 3) & 15, steps = code & 7;
  double size = exponent == 0 ? std::ldexp(steps, -9) : std::ldexp(8 + steps, exponent - 10);
  if ((code & 0x7f) == 0x7f) size = std::numeric_limits<double>::quiet_NaN();
  return code & 0x80 ? -size : size;
}

float scale_of(float largest, float epsilon, bool power) {
  const float held = std::fmax(largest, epsilon);
  if (held == 0) return 1;
  const float scale = kLargest / held;
  if (std::isinf(scale)) return power ? 0x1.0p127f : 0x1.FEp127f;
  return power && scale != 0 ? std::ldexp(1.0f, std::ilogb(scale)) : scale;
}

// One result of a quantization: `across` blocks lie along the columns that are scaled together.
struct Quantized {
  DenseTensor *out, *scale;
  bool turned;        // out is [columns, rows]
  bool scale_turned;  // scales are [blocks, rows]
};

void quantize_into(const CustomContext& context, const std::vector<double>& numbers, int64_t rows,
                   int64_t columns, int64_t height, float epsilon, bool power,
                   const Quantized& result) {
  const auto at = [&](int64_t row, int64_t column) {
    return result.turned ? column * rows + row : row * columns + column;
  };
  // Seen from the result: `tall` lines of `wide` numbers each.
  const int64_t tall = result.turned ? columns : rows, wide = result.turned ? rows : columns;
  uint8_t* codes = reinterpret_cast<uint8_t*>(context.Alloc<Float8>(result.out));
  float* scales = context.Alloc<float>(result.scale);
  const int64_t line = result.scale->dims()[1];
  std::fill_n(scales, result.scale->numel(), std::nanf(""));  // padding, which nobody writes
  for (int64_t top = 0; top < tall; top += height)
    for (int64_t left = 0; left < wide; left += kBlock) {
      float largest = 0;
      const auto each = [&](auto&& visit) {
        for (int64_t i = top; i < std::min(top + height, tall); ++i)
          for (int64_t j = left; j < std::min(left + kBlock, wide); ++j)
            visit(result.turned ? numbers[j * columns + i] : numbers[i * columns + j], i * wide + j);
      };
      each([&](double one, int64_t) {
        largest = std::fmax(largest, std::fabs(static_cast<float>(one)));
      });
      const float scale = scale_of(largest, epsilon, power);
      each([&](double one, int64_t place) {
        codes[place] = encode(static_cast<float>(one) * scale);
      });
      const int64_t i = top / height, j = left / kBlock;
      scales[result.scale_turned ? j * line + i : i * line + j] = 1 / scale;
    }
}

void quantize(const CustomContext& context, const DenseTensor& x, float epsilon, bool rows_of_one,
              bool transposed, bool scale_turned, bool transposed_only, bool e5m2, bool power,
              bool ue8m0, DenseTensor* out, DenseTensor* scale, DenseTensor* out_transposed,
              DenseTensor* scale_transposed) {
  PADDLE_ENFORCE_EQ(!e5m2 && !ue8m0, true, phi::errors::Unimplemented(
      "rehearsal device: fp8_quant_blockwise to other types"));
  const int64_t rows = x.dims()[0], columns = x.dims()[1];
  PADDLE_ENFORCE_EQ(rows % kBlock == 0 || (rows_of_one && !transposed), true,
                    phi::errors::InvalidArgument(
                        "fp8_quant_blockwise: %d rows; when rows is not aligned to 128, only "
                        "supports: input_transpose=False and using_1x128_vec_quant", rows));
  PADDLE_ENFORCE_EQ(columns % kBlock, 0, phi::errors::InvalidArgument(
      "fp8_quant_blockwise: src_cols must be divisible by 128, not %d", columns));
  const auto numbers = numbers_of(x);
  const int64_t height = rows_of_one ? 1 : kBlock;
  if (transposed_only) {
    context.Alloc<Float8>(out);
    context.Alloc<float>(scale);
  } else {
    quantize_into(context, numbers, rows, columns, height, epsilon, power,
                  {out, scale, false, scale_turned});
  }
  if (transposed)
    quantize_into(context, numbers, rows, columns, height, epsilon, power,
                  {out_transposed, scale_transposed, true, scale_turned});
}

// A float8 operand with its scales, as cuBLAS reads them.
struct Operand {
  Operand(const char* name, const DenseTensor& codes, const DenseTensor& scales, bool lines)
      : codes(reinterpret_cast<const uint8_t*>(codes.data<Float8>())), scales(scales.data<float>()),
        rows(codes.dims()[0]), columns(codes.dims()[1]), lines(lines) {
    const int64_t along = blocks_of(columns);
    const auto wanted = lines ? phi::make_ddim({along, rows})
                              : phi::make_ddim({blocks_of(rows), (along + 3) / 4 * 4});
    PADDLE_ENFORCE_EQ(scales.dims() == wanted, true, phi::errors::InvalidArgument(
        "fp8_gemm_blockwise: %s is [%s], its scales are [%s] instead of [%s]", name, codes.dims(),
        scales.dims(), wanted));
    line = scales.dims()[1];
    PADDLE_ENFORCE_EQ(rows % 16 == 0 && columns % 16 == 0, true, phi::errors::InvalidArgument(
        "fp8_gemm_blockwise: %s is [%s]; sizes have to be multiples of 16", name, codes.dims()));
  }
  // A row, widened.
  void read(int64_t row, double* numbers) const {
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t block = k / kBlock;
      const float scale = scales[lines ? block * line + row : row / kBlock * line + block];
      numbers[k] = decode(codes[row * columns + k]) * scale;
    }
  }
  const uint8_t* codes;
  const float* scales;
  int64_t rows, columns, line = 0;
  bool lines;
};

void multiply(const CustomContext& context, const DenseTensor& A, const DenseTensor& A_scale,
              const DenseTensor& B, const DenseTensor& B_scale, const DenseTensor& before,
              const DenseTensor&, const DenseTensor&, const DenseTensor&, bool transa, bool transb,
              bool, bool accumulate, bool, int, bool A_lines, bool B_lines, DenseTensor* out,
              DenseTensor*, DenseTensor*) {
  PADDLE_ENFORCE_EQ(transa && !transb, true, phi::errors::InvalidArgument(
      "Only transa == true and transb == false is supported"));
  PADDLE_ENFORCE_EQ(
      A.dtype() == DataType::FLOAT8_E4M3FN && B.dtype() == DataType::FLOAT8_E4M3FN, true,
      phi::errors::InvalidArgument("A and B must be FP8, not %s and %s", A.dtype(), B.dtype()));
  PADDLE_ENFORCE_EQ(out->dtype() == DataType::BFLOAT16 || out->dtype() == DataType::FLOAT32, true,
                    phi::errors::InvalidArgument("D must be BFloat16 or float, not %s",
                                                 out->dtype()));
  PADDLE_ENFORCE_EQ(A_scale.dtype() == DataType::FLOAT32 && B_scale.dtype() == DataType::FLOAT32,
                    true, phi::errors::InvalidArgument("A_decode_scale must be float, not %s",
                                                       A_scale.dtype()));
  PADDLE_ENFORCE_EQ(A_lines || B_lines, true,
                    phi::errors::InvalidArgument("2Dx2D scaling is not supported"));
  const Operand left("A", A, A_scale, A_lines), right("B", B, B_scale, B_lines);
  PADDLE_ENFORCE_EQ(left.columns == right.columns && out->dims()[0] == right.rows &&
                        out->dims()[1] == left.rows,
                    true, phi::errors::InvalidArgument(
                        "fp8_gemm_blockwise: A is [%s], B [%s], the result [%s]", A.dims(),
                        B.dims(), out->dims()));
  const int64_t K = left.columns;
  std::vector<double> wide(left.rows * K), row(K), result(out->numel());
  for (int64_t n = 0; n < left.rows; ++n) left.read(n, &wide[n * K]);
  const auto added = accumulate ? numbers_of(before) : std::vector<double>(out->numel(), 0.0);
  for (int64_t m = 0; m < right.rows; ++m) {
    right.read(m, row.data());
    for (int64_t n = 0; n < left.rows; ++n) {
      double sum = added[m * left.rows + n];
      for (int64_t k = 0; k < K; ++k) sum += row[k] * wide[n * K + k];
      result[m * left.rows + n] = sum;
    }
  }
  write(context, result, out->dtype(), out);
}

}  // namespace

void add_gpu_fp8() {
  const auto bf16 = DataType::BFLOAT16, fp16 = DataType::FLOAT16, fp8 = DataType::FLOAT8_E4M3FN;
  PUT_KERNEL("fp8_quant_blockwise", own_backend(), quantize, bf16, fp16);
  PUT_KERNEL("fp8_gemm_blockwise", own_backend(), multiply, fp8, bf16, DataType::UINT8,
             DataType::FLOAT32);
}

}  // namespace rehearsal
