// Float32 matrix products.
#include "cases.h"
#include "llama_ops/matmul.h"

using cases::kUnwritten;
using cases::Numbers;

LLAMA_OPS_CASE(matmul) {
  // Less than a tile, a tile and more, more than a block of the sum.
  const int64_t sizes[][3] = {{0, 3, 2}, {1, 0, 5}, {1, 5, 3}, {13, 7, 33}, {29, 65, 97}, {90, 300, 290}};
  for (const auto& size : sizes) {
    for (int flags = 0; flags < 8; ++flags) {
      Numbers x(size[0] * size[1], LLAMA_OPS_F32), y(size[1] * size[2], LLAMA_OPS_F32);
      Numbers fresh(size[0] * size[2], LLAMA_OPS_F32, kUnwritten);
      Numbers sum(size[0] * size[2], LLAMA_OPS_F32);
      Numbers& out = flags & 4 ? sum : fresh;
      llama_ops_matmul_args args{};
      args.x = x.floats();
      args.y = y.floats();
      args.out = out.floats();
      args.rows = size[0];
      args.depth = size[1];
      args.columns = size[2];
      args.transpose_x = flags & 1;
      args.transpose_y = flags >> 1 & 1;
      args.accumulate = flags >> 2 & 1;
      llama_ops_matmul(&args);
      out.require_written();
    }
  }
}
