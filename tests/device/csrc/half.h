// bfloat16 and float16 kernels made of Paddle's float32 kernels for CPUs: widen, compute, round.
//
// Kernels of GPUs for these types compute in float32 and round their outputs; so do these, up to
// the order of sums. The device has no own kernels for them: Paddle falls back to those of CPUs.
#pragma once

#include <deque>
#include <iostream>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "paddle/phi/backends/cpu/cpu_context.h"
#include "paddle/phi/core/dense_tensor.h"
#include "paddle/phi/core/kernel_factory.h"
#include "paddle/phi/core/kernel_registry.h"
#include "paddle/phi/core/kernel_utils.h"

namespace rehearsal {

using phi::CPUContext;
using phi::DataType;
using phi::DenseTensor;
using BFloat16 = phi::dtype::bfloat16;
using Float16 = phi::dtype::float16;

inline bool is_half(DataType type) {
  return type == DataType::BFLOAT16 || type == DataType::FLOAT16;
}

template <class From, class To>
void convert(const CPUContext& context, const DenseTensor& from, DenseTensor* to) {
  const From* numbers = from.data<From>();
  To* results = context.Alloc<To>(to);
  for (int64_t i = 0, n = from.numel(); i < n; ++i)
    results[i] = static_cast<To>(static_cast<float>(numbers[i]));
}

// The tensors of one call in float32, as long as it lasts.
class Widened {
 public:
  explicit Widened(const CPUContext& context) : context_(context) {}

  const DenseTensor& in(const DenseTensor& tensor) {
    return is_half(tensor.dtype()) ? *widened(tensor) : tensor;
  }
  const paddle::optional<DenseTensor>& in(const paddle::optional<DenseTensor>& tensor) {
    if (!tensor || !is_half(tensor->dtype())) return tensor;
    options_.emplace_back(*widened(*tensor));
    return options_.back();
  }
  const std::vector<const DenseTensor*>& in(const std::vector<const DenseTensor*>& tensors) {
    lists_.emplace_back();
    for (const DenseTensor* one : tensors) lists_.back().push_back(one ? &in(*one) : nullptr);
    return lists_.back();
  }
  DenseTensor* in(DenseTensor* result) {
    if (result == nullptr || !is_half(result->dtype())) return result;
    tensors_.push_back(empty(*result, nullptr));
    results_.emplace_back(&tensors_.back(), result);
    return &tensors_.back();
  }
  std::vector<DenseTensor*> in(const std::vector<DenseTensor*>& results) {
    std::vector<DenseTensor*> list;
    for (DenseTensor* one : results) list.push_back(in(one));
    return list;
  }
  template <class Other>
  const Other& in(const Other& attribute) {
    return attribute;
  }

  // Round what was computed into the results that were asked for.
  void round() {
    for (auto& [from, to] : results_) {
      if (!from->has_allocation()) continue;
      to->Resize(from->dims());
      if (to->dtype() == DataType::BFLOAT16) convert<float, BFloat16>(context_, *from, to);
      else convert<float, Float16>(context_, *from, to);
    }
  }

 private:
  static DenseTensor empty(const DenseTensor& like, std::shared_ptr<phi::Allocation> memory) {
    return DenseTensor(std::move(memory),
                       phi::DenseTensorMeta(DataType::FLOAT32, like.dims(), like.layout()));
  }
  const DenseTensor* widened(const DenseTensor& tensor) {
    const bool real = tensor.has_allocation() && tensor.Holder()->ptr() != nullptr;
    auto none = std::make_shared<phi::Allocation>(nullptr, 0, phi::CPUPlace());
    tensors_.push_back(empty(tensor, real ? nullptr : none));
    DenseTensor* wide = &tensors_.back();
    if (!real) return wide;
    if (tensor.dtype() == DataType::BFLOAT16) convert<BFloat16, float>(context_, tensor, wide);
    else convert<Float16, float>(context_, tensor, wide);
    return wide;
  }

  const CPUContext& context_;
  std::deque<DenseTensor> tensors_;
  std::deque<paddle::optional<DenseTensor>> options_;
  std::deque<std::vector<const DenseTensor*>> lists_;
  std::deque<std::pair<DenseTensor*, DenseTensor*>> results_;
};

// A kernel with the signature of `Function`, around Paddle's own for float32; `Number` tells apart
// kernels of one signature.
template <class Function, int Number>
struct Half;
template <class... Arguments, int Number>
struct Half<void (*)(const CPUContext&, Arguments...), Number> {
  using Function = void (*)(const CPUContext&, Arguments...);
  static inline Function original = nullptr;
  static void run(const CPUContext& context, Arguments... arguments) {
    Widened tensors(context);
    // Braces go from left to right: inputs are widened before results are prepared.
    std::tuple<decltype(tensors.in(std::declval<Arguments>()))...> wide{tensors.in(arguments)...};
    std::apply([&](auto&&... one) { original(context, one...); }, wide);
    tensors.round();
  }
};

inline phi::KernelKey cpu_key(DataType type) {
  return phi::KernelKey(phi::Backend::CPU, phi::DataLayout::ALL_LAYOUT, type);
}

template <class Kernel>
void add_half(const char* name) {
  auto& kernels = phi::KernelFactory::Instance().kernels();
  auto found = kernels.find(name);
  if (found == kernels.end() || found->second.count(cpu_key(DataType::FLOAT32)) == 0) {
    std::cerr << "rehearsal device: Paddle has no " << name << " for float32 on CPUs\n";
    return;
  }
  const phi::Kernel full = found->second.at(cpu_key(DataType::FLOAT32));
  Kernel::original = full.template GetVariadicKernelFn<typename Kernel::Function>();
  for (DataType type : {DataType::BFLOAT16, DataType::FLOAT16}) {
    if (found->second.count(cpu_key(type)) > 0) continue;
    phi::Kernel made(&phi::KernelImpl<decltype(&Kernel::run), &Kernel::run>::Compute,
                     reinterpret_cast<void*>(&Kernel::run));
    *made.mutable_args_def() = full.args_def();
    for (auto& one : made.mutable_args_def()->input_defs())
      if (one.dtype == DataType::FLOAT32) one.dtype = type;
    for (auto& one : made.mutable_args_def()->output_defs())
      if (one.dtype == DataType::FLOAT32) one.dtype = type;
    found->second.insert({cpu_key(type), made});
  }
}

}  // namespace rehearsal
