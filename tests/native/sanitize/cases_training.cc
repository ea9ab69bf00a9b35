// Cross-entropy, AdamW and sums of squares.
#include "cases.h"
#include "llama_ops/adamw.h"
#include "llama_ops/cross_entropy.h"

using cases::Array;
using cases::kUnwritten;
using cases::Numbers;

namespace {

void loss(int64_t rows, int64_t width, int64_t first, bool accuracy) {
  Numbers logits(rows * width, LLAMA_OPS_F32), scale(rows, LLAMA_OPS_F32);
  Numbers top(rows, LLAMA_OPS_F32, kUnwritten), sum(rows, LLAMA_OPS_F32, kUnwritten);
  Numbers target(rows, LLAMA_OPS_F32, kUnwritten), denominator(rows, LLAMA_OPS_F32);
  Array<int64_t> labels(rows), best(accuracy ? rows : 0, -1);
  // Within these tokens, before and behind them, and ignored.
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t some[] = {first, first + width - 1, first - 1, first + width, -100};
    labels[row] = some[row % 5];
  }
  llama_ops_cross_entropy_statistics_args args{};
  args.logits = logits.floats();
  args.labels = labels.data();
  args.top = top.floats();
  args.sum = sum.floats();
  args.target = target.floats();
  args.best = accuracy ? best.data() : nullptr;
  args.rows = rows;
  args.width = width;
  args.first = first;
  llama_ops_cross_entropy_statistics(&args);
  top.require_written();
  sum.require_written();
  target.require_written();
  for (int64_t row = 0; row < best.size(); ++row) {
    cases::require(0 <= best[row] && best[row] < width, "the best token is none of them");
  }
  llama_ops_cross_entropy_residual_args back{};
  back.logits = logits.floats();
  back.labels = labels.data();
  back.denominator = denominator.floats();
  back.scale = scale.floats();
  back.rows = rows;
  back.width = width;
  back.first = first;
  llama_ops_cross_entropy_residual(&back);
  logits.require_written();
}

void update(int gradient_dtype) {
  const int64_t sizes[] = {1, 15, 65, 70000};
  constexpr int64_t kCount = 4;
  Array<llama_ops_adamw_parameter> parameters(kCount);
  Array<const void*> arrays(kCount);
  Array<int> dtypes(kCount, gradient_dtype);
  std::unique_ptr<Numbers> own[kCount][4];
  for (int64_t i = 0; i < kCount; ++i) {
    for (int part = 0; part < 4; ++part) {
      own[i][part].reset(new Numbers(sizes[i], part == 1 ? gradient_dtype : LLAMA_OPS_F32));
    }
    for (int64_t j = 0; j < sizes[i]; ++j) {
      float& moment2 = own[i][3]->floats()[j];
      moment2 = moment2 < 0 ? -moment2 : moment2;
    }
    parameters[i] = {own[i][0]->floats(), own[i][1]->data(), own[i][2]->floats(),
                     own[i][3]->floats(), sizes[i], gradient_dtype, 0.1f, 0.9f, 0.95f};
    arrays[i] = own[i][1]->data();
  }
  const llama_ops_adamw_args args{parameters.data(), kCount, 1e-3f, 0.9f, 0.95f, 1e-8f, 0.5f};
  llama_ops_adamw(&args);
  for (auto& parameter : own) parameter[0]->require_written();
  double total = -1;
  const llama_ops_squares_args squares{arrays.data(), sizes, dtypes.data(), kCount, &total};
  llama_ops_squares(&squares);
  cases::require(total > 0, "a sum of squares is not positive");
}

}  // namespace

LLAMA_OPS_CASE(cross_entropy) {
  for (int64_t rows : {0, 1, 5, 33}) {
    for (int64_t width : {1, 15, 97, 1031}) {
      for (int64_t first : {0, 512}) {
        for (bool accuracy : {false, true}) loss(rows, width, first, accuracy);
      }
    }
  }
}

LLAMA_OPS_CASE(adamw) {
  for (int dtype : {LLAMA_OPS_F32, LLAMA_OPS_BF16}) update(dtype);
}
