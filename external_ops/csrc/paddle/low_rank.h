// Takes what external_ops/low_rank.py lays out of adapters: which rows are whose, and where in an
// adapter's numbers the matrices of a linear lie.
#pragma once

#include <deque>

#include "llama_ops/low_rank.h"
#include "paddle/checks.h"

namespace llama_ops {

class LowRankStep {
 public:
  // `adapter` has for each row the number of its adapter, or -1.
  LowRankStep(const char* op, const paddle::Tensor& adapter, int64_t rows,
              const std::vector<paddle::Tensor>& data, const std::vector<paddle::Tensor>& pieces,
              const std::vector<paddle::Tensor>& scales)
      : op_(op), data_(data), pieces_(pieces), scales_(scales), rows_(data.size()) {
    LLAMA_OPS_CHECK(pieces.size() == data.size() && scales.size() == data.size(), op,
                    "adapters need numbers, pieces and scales each");
    LLAMA_OPS_CHECK(adapter.dtype() == paddle::DataType::INT32 && adapter.numel() == rows, op,
                    "adapter ", text(adapter.shape()), " has to be int32 [", rows, "]");
    const int32_t* of = adapter.data<int32_t>();
    const int64_t count = static_cast<int64_t>(data.size());
    for (int64_t row = 0; row < rows; ++row) {
      LLAMA_OPS_CHECK(of[row] >= -1 && of[row] < count, op, "row ", row, " has adapter ", of[row],
                      "; there are ", count);
      if (of[row] >= 0) rows_[of[row]].push_back(row);
    }
    for (size_t i = 0; i < data.size(); ++i) check(i);
  }

  // What is added to outputs [first, first + outputs) of linear `number`, counted from `first`.
  llama_ops_low_rank_pieces of(int64_t number, int64_t inputs, int64_t first, int64_t outputs) {
    std::vector<llama_ops_low_rank_piece> found;
    for (size_t i = 0; i < data_.size(); ++i) {
      if (rows_[i].empty()) continue;
      const int64_t* table = pieces_[i].data<int64_t>();
      const int64_t count = pieces_[i].shape()[0];
      for (int64_t p = 0; p < count; ++p) {
        const int64_t* row = table + p * kColumns;
        if (row[kLinear] != number || row[kFirst] < first || row[kFirst] >= first + outputs) continue;
        LLAMA_OPS_CHECK(row[kInputs] == inputs && row[kFirst] + row[kOutputs] <= first + outputs, op_,
                        "an adapter's product [", row[kInputs], ", ", row[kOutputs],
                        "] does not fit a linear of ", inputs, " inputs and ", outputs, " outputs");
        found.push_back(piece(i, row, scales_[i].data<float>()[p], row[kFirst] - first));
      }
    }
    held_.push_back(std::move(found));
    return {held_.back().data(), static_cast<int64_t>(held_.back().size())};
  }

 private:
  // Columns of a table of pieces.
  enum { kLinear, kFirst, kInputs, kOutputs, kRank, kA, kB, kColumns };

  void check(size_t i) {
    const Shape shape = pieces_[i].shape();
    LLAMA_OPS_CHECK(shape.size() == 2 && shape[1] == kColumns &&
                        pieces_[i].dtype() == paddle::DataType::INT64,
                    op_, "pieces ", text(shape), " have to be int64 [pieces, ", int{kColumns}, "]");
    LLAMA_OPS_CHECK(scales_[i].dtype() == paddle::DataType::FLOAT32 && scales_[i].numel() == shape[0],
                    op_, "scales ", text(scales_[i].shape()), " have to be float32 [", shape[0], "]");
    dtype_of(data_[i], op_);
    const int64_t* table = pieces_[i].data<int64_t>();
    const int64_t numbers = data_[i].numel();
    for (int64_t p = 0; p < shape[0]; ++p) {
      const int64_t* row = table + p * kColumns;
      for (int64_t n = 0; n < kColumns; ++n) {
        const bool fits = row[n] >= (n == kInputs || n == kOutputs || n == kRank ? 1 : 0);
        LLAMA_OPS_CHECK(fits, op_, "piece ", p, " has ", row[n], " in column ", n);
      }
      LLAMA_OPS_CHECK(row[kA] + row[kRank] * row[kInputs] <= numbers &&
                          row[kB] + row[kRank] * row[kOutputs] <= numbers,
                      op_, "piece ", p, " reaches past the adapter's ", numbers, " numbers");
    }
  }

  llama_ops_low_rank_piece piece(size_t i, const int64_t* row, float scale, int64_t first) {
    const int64_t bytes = static_cast<int64_t>(phi::SizeOf(data_[i].dtype()));
    const char* numbers = static_cast<const char*>(data_[i].data());
    llama_ops_low_rank_piece made{};
    made.a = numbers + row[kA] * bytes;
    made.b = numbers + row[kB] * bytes;
    made.rows = rows_[i].data();
    made.num_rows = static_cast<int64_t>(rows_[i].size());
    made.rank = row[kRank];
    made.first = first;
    made.outputs = row[kOutputs];
    made.scale = scale;
    made.dtype = dtype_of(data_[i], op_);
    return made;
  }

  const char* op_;
  const std::vector<paddle::Tensor>& data_;
  const std::vector<paddle::Tensor>& pieces_;
  const std::vector<paddle::Tensor>& scales_;
  std::vector<std::vector<int64_t>> rows_;  // of each adapter
  std::deque<std::vector<llama_ops_low_rank_piece>> held_;
};

}  // namespace llama_ops
