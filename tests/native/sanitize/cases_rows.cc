#include "cases.h"
#include "llama_ops/rotary.h"
#include "llama_ops/swiglu.h"

using cases::kUnwritten;
using cases::Numbers;

namespace {

void turn(int64_t rows, int64_t heads, int64_t half, int64_t table_rows, int64_t repeat,
          int dtype) {
  const int64_t count = rows * heads * 2 * half;
  for (int table : {LLAMA_OPS_F32, LLAMA_OPS_BF16}) {
    Numbers x(count, dtype), out(count, dtype, kUnwritten);
    Numbers cos(table_rows * half, table), sin(table_rows * half, table);
    llama_ops_rotary_args args{};
    args.x = x.data();
    args.cos = cos.data();
    args.sin = sin.data();
    args.out = out.data();
    args.rows = rows;
    args.heads = heads;
    args.half = half;
    args.table_rows = table_rows;
    args.repeat = repeat;
    args.inverse = table == dtype;
    args.dtype = dtype;
    args.table_dtype = table;
    llama_ops_rotary(&args);
    out.require_written();
  }
}

void gate(int64_t rows, int64_t size, int dtype) {
  // Gate and up as halves of one product.
  Numbers both(rows * 2 * size, dtype), out(rows * size, dtype, kUnwritten);
  llama_ops_swiglu_forward_args args{};
  args.gate = both.data();
  args.up = static_cast<char*>(both.data()) + size * (dtype == LLAMA_OPS_F32 ? 4 : 2);
  args.out = out.data();
  args.rows = rows;
  args.size = size;
  args.gate_stride = args.up_stride = 2 * size;
  args.dtype = dtype;
  llama_ops_swiglu_forward(&args);
  out.require_written();
}

void gate_backward(int64_t count, int dtype) {
  Numbers gate(count, dtype), up(count, dtype), grad(count, dtype);
  Numbers grad_gate(count, dtype, kUnwritten), grad_up(count, dtype, kUnwritten);
  llama_ops_swiglu_backward_args args{};
  args.gate = gate.data();
  args.up = up.data();
  args.grad_out = grad.data();
  args.grad_gate = grad_gate.data();
  args.grad_up = grad_up.data();
  args.count = count;
  args.dtype = dtype;
  llama_ops_swiglu_backward(&args);
  grad_gate.require_written();
  grad_up.require_written();
}

}  // namespace

LLAMA_OPS_CASE(rotary) {
  for (int dtype : {LLAMA_OPS_F32, LLAMA_OPS_BF16}) {
    for (int64_t half : {1, 5, 40, 64}) {
      turn(0, 3, half, 1, 1, dtype);
      turn(5, 3, half, 5, 1, dtype);
      turn(6, 2, half, 3, 1, dtype);
      turn(6, 2, half, 3, 2, dtype);
      turn(301, 2, half, 301, 1, dtype);
    }
  }
}

LLAMA_OPS_CASE(swiglu) {
  for (int dtype : {LLAMA_OPS_F32, LLAMA_OPS_BF16}) {
    for (int64_t size : {1, 17, 64, 5000}) {
      for (int64_t rows : {0, 1, 7}) gate(rows, size, dtype);
      gate_backward(size, dtype);
    }
    gate_backward(0, dtype);
  }
}
