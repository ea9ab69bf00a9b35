#include "cases.h"
#include "llama_ops/rms_norm.h"

using cases::kUnwritten;
using cases::Numbers;

namespace {

constexpr int64_t kRows[] = {0, 1, 5, 123}, kSizes[] = {1, 15, 65, 1024};

void forward(int64_t rows, int64_t size, int dtype, bool residual) {
  Numbers x(rows * size, dtype), other(rows * size, dtype), weight(size, dtype);
  Numbers sum(rows * size, dtype, kUnwritten), out(rows * size, dtype, kUnwritten);
  Numbers rstd(rows, LLAMA_OPS_F32, kUnwritten);
  llama_ops_rms_norm_forward_args args{};
  args.x = x.data();
  args.weight = weight.data();
  args.residual = residual ? other.data() : nullptr;
  args.sum = residual ? sum.data() : nullptr;
  args.out = out.data();
  args.rstd = residual ? nullptr : rstd.floats();
  args.rows = rows;
  args.size = size;
  args.eps = 1e-5f;
  args.dtype = dtype;
  llama_ops_rms_norm_forward(&args);
  out.require_written();
  residual ? sum.require_written() : rstd.require_written();
}

void backward(int64_t rows, int64_t size, int dtype, bool all) {
  Numbers x(rows * size, dtype), weight(size, dtype), rstd(rows, LLAMA_OPS_F32);
  Numbers grad_out(rows * size, dtype), grad_sum(rows * size, dtype);
  Numbers grad_x(rows * size, dtype, kUnwritten), grad_weight(size, dtype, kUnwritten);
  llama_ops_rms_norm_backward_args args{};
  args.x = x.data();
  args.weight = weight.data();
  args.rstd = rstd.floats();
  args.grad_out = grad_out.data();
  args.grad_sum = all ? grad_sum.data() : nullptr;
  args.grad_x = grad_x.data();
  args.grad_weight = all ? grad_weight.data() : nullptr;
  args.rows = rows;
  args.size = size;
  args.dtype = dtype;
  llama_ops_rms_norm_backward(&args);
  grad_x.require_written();
  if (all) grad_weight.require_written();
}

}  // namespace

LLAMA_OPS_CASE(rms_norm) {
  for (int64_t rows : kRows) {
    for (int64_t size : kSizes) {
      for (int dtype : {LLAMA_OPS_F32, LLAMA_OPS_BF16}) {
        for (bool all : {false, true}) {
          forward(rows, size, dtype, all);
          backward(rows, size, dtype, all);
        }
      }
    }
  }
}
