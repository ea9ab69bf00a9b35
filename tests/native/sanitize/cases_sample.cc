// Drawing tokens.
#include "cases.h"
#include "llama_ops/sample.h"

using cases::Array;
using cases::Numbers;

namespace {

void draw(int64_t rows, int64_t width, bool edits) {
  Numbers logits(rows * width, LLAMA_OPS_F32), edited(edits ? width : 0, LLAMA_OPS_F32);
  Array<int64_t> edit(rows, -1), tokens(rows, -9);
  Array<double> logprobs(rows);
  Array<llama_ops_sample_settings> settings(rows);
  const llama_ops_sample_settings some[] = {
      {0, 0, 1, 0, 0},      {1, 0, 1, 0, 0.999999},   {0.7, 5, 1, 0, 0.5},
      {1e-30, 0, 1, 0, 0},  {2, 0, 0.9, 0, 0.3},      {1, 3, 0.5, 0.1, 0},
      {1, 0, 1e-9, 0, 0.9}, {1, 1e9, 0.99, 0.01, 0.9},
  };
  for (int64_t row = 0; row < rows; ++row) settings[row] = some[row % 8];
  if (edits && rows > 0) edit[rows - 1] = 0;
  llama_ops_sample_args args{};
  args.logits = logits.floats();
  args.edited = edited.floats();
  args.edit = edit.data();
  args.settings = settings.data();
  args.tokens = tokens.data();
  args.logprobs = logprobs.data();
  args.rows = rows;
  args.width = width;
  llama_ops_sample(&args);
  for (int64_t row = 0; row < rows; ++row) {
    cases::require(0 <= tokens[row] && tokens[row] < width, "a token is none of the vocabulary");
    cases::require(logprobs[row] <= 1e-6, "a probability is above 1");
  }
}

}  // namespace

LLAMA_OPS_CASE(sample) {
  for (int64_t rows : {0, 1, 8, 19}) {
    for (int64_t width : {1, 15, 97, 1031, 5000}) {
      for (bool edits : {false, true}) draw(rows, width, edits);
    }
  }
}
