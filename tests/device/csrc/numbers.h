// Tensors of bfloat16, float16 and float32 as numbers in float64, and back with one rounding.
#pragma once

#include <vector>

#include "half.h"

namespace rehearsal {

template <class T>
std::vector<double> numbers_as(const DenseTensor& tensor) {
  const T* data = tensor.data<T>();
  std::vector<double> numbers(tensor.numel());
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<float>(data[i]);
  return numbers;
}

inline std::vector<double> numbers_of(const DenseTensor& tensor) {
  if (tensor.dtype() == DataType::BFLOAT16) return numbers_as<BFloat16>(tensor);
  if (tensor.dtype() == DataType::FLOAT16) return numbers_as<Float16>(tensor);
  return numbers_as<float>(tensor);
}

template <class T>
void write_as(const phi::DeviceContext& context, const std::vector<double>& numbers,
              DenseTensor* out) {
  T* data = context.Alloc<T>(out);
  for (size_t i = 0; i < numbers.size(); ++i)
    data[i] = static_cast<T>(static_cast<float>(numbers[i]));
}

// A result that nobody asked for is null.
inline void write(const phi::DeviceContext& context, const std::vector<double>& numbers,
                  DataType type, DenseTensor* out) {
  if (out == nullptr) return;
  if (type == DataType::BFLOAT16) write_as<BFloat16>(context, numbers, out);
  else if (type == DataType::FLOAT16) write_as<Float16>(context, numbers, out);
  else write_as<float>(context, numbers, out);
}

}  // namespace rehearsal
