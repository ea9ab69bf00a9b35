#include "cases.h"
#include "llama_ops/low_rank.h"

using cases::Array;
using cases::Numbers;

namespace {

struct Shape {
  int64_t inputs, width, first, outputs, rank;
};
// Fewer numbers than a vector, some vectors and a rest, more than a thread takes at a time.
constexpr Shape kShapes[] = {{1, 1, 0, 1, 1}, {65, 70, 3, 66, 5}, {300, 1300, 1, 1299, 9}};

// Two adapters, of which one has every third row and one the rest but the first.
void add(const Shape& shape, int64_t rows, int dtype) {
  Numbers x(rows * shape.inputs, LLAMA_OPS_F32), out(rows * shape.width, LLAMA_OPS_F32);
  Numbers a(shape.rank * shape.inputs, dtype), b(shape.rank * shape.outputs, dtype);
  const int64_t third = (rows + 2) / 3, rest = rows - third > 0 ? rows - third - 1 : 0;
  Array<int64_t> some(third), others(rest);
  for (int64_t row = 0, i = 0, j = 0; row < rows; ++row) {
    if (row % 3 == 0) {
      some[i++] = row;
    } else if (j < rest) {
      others[j++] = row;
    }
  }
  llama_ops_low_rank_piece pieces[2] = {};
  for (llama_ops_low_rank_piece& piece : pieces) {
    piece.a = a.data();
    piece.b = b.data();
    piece.rank = shape.rank;
    piece.first = shape.first;
    piece.outputs = shape.outputs;
    piece.scale = 0.5f;
    piece.dtype = dtype;
  }
  pieces[0].rows = some.data();
  pieces[0].num_rows = third;
  pieces[1].rows = others.data();
  pieces[1].num_rows = rest;
  llama_ops_low_rank_args args{};
  args.of = {pieces, 2};
  args.x = x.floats();
  args.out = out.floats();
  args.inputs = shape.inputs;
  args.width = shape.width;
  llama_ops_low_rank(&args);
  out.require_written();
}

}  // namespace

LLAMA_OPS_CASE(low_rank) {
  for (int dtype : {LLAMA_OPS_F32, LLAMA_OPS_BF16}) {
    for (const Shape& shape : kShapes) {
      for (int64_t rows : {0, 1, 2, 7, 40}) add(shape, rows, dtype);
    }
  }
}
