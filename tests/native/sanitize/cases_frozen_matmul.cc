#include "cases.h"
#include "llama_ops/frozen_matmul.h"

using cases::Array;
using cases::kUnwritten;
using cases::Numbers;

namespace {

struct Matrix {
  int64_t height, width, groups;
};
// Less than a block and more; groups that end inside vectors; more depth than a slab of x.
constexpr Matrix kMatrices[] = {{1, 8, 1}, {70, 66, 1}, {65, 96, 12}, {3, 4130, 1}};

void multiply(const Matrix& m, int kind, int64_t rows, bool transposed) {
  const int bits = kind == LLAMA_OPS_FROZEN_BF16 ? 16 : kind == LLAMA_OPS_FROZEN_INT8 ? 8 : 4;
  Array<uint8_t> matrix(m.height * m.width * bits / 8, 0x3c);
  Numbers scale(m.height * m.groups, LLAMA_OPS_F32);
  Numbers x(rows * (transposed ? m.width : m.height), LLAMA_OPS_F32);
  Numbers out(rows * (transposed ? m.height : m.width), LLAMA_OPS_F32, kUnwritten);
  llama_ops_frozen_matmul_args args{};
  args.x = x.floats();
  args.matrix = matrix.data();
  args.scale = bits == 16 ? nullptr : scale.floats();
  args.out = out.floats();
  args.rows = rows;
  args.height = m.height;
  args.width = m.width;
  args.groups = bits == 16 ? 1 : m.groups;
  args.kind = kind;
  args.transposed = transposed;
  llama_ops_frozen_matmul(&args);
  out.require_written();
}

}  // namespace

LLAMA_OPS_CASE(frozen_matmul) {
  for (const Matrix& matrix : kMatrices) {
    for (int kind : {LLAMA_OPS_FROZEN_BF16, LLAMA_OPS_FROZEN_INT8, LLAMA_OPS_FROZEN_INT4}) {
      for (int64_t rows : {0, 1, 15, 33}) {
        for (bool transposed : {false, true}) multiply(matrix, kind, rows, transposed);
      }
    }
  }
}
