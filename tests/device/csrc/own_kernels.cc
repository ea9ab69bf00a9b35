// The device's own kernels: those of operators that Paddle lets no device leave to CPUs.
//
// Also the entry for Python, and the question which stream kernels run on.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "paddle/phi/backends/context_pool.h"
#include "paddle/phi/backends/custom/custom_context.h"
#include "paddle/phi/backends/device_manager.h"
#include "paddle/phi/core/dense_tensor.h"
#include "numbers.h"
#include "register.h"
#include "streams.h"

namespace rehearsal {
namespace {

using phi::CustomContext;

void copy_strided(const DenseTensor& from, const std::vector<int64_t>& strides, void* to) {
  const auto dims = phi::vectorize(from.dims()), steps = phi::vectorize(from.strides());
  const size_t size = phi::SizeOf(from.dtype());
  const char* source = static_cast<const char*>(from.data());
  for (int64_t i = 0, n = from.numel(); i < n; ++i) {
    int64_t rest = i, at = 0, target = 0;
    for (int axis = static_cast<int>(dims.size()) - 1; axis >= 0; --axis) {
      at += rest % dims[axis] * steps[axis];
      target += rest % dims[axis] * strides[axis];
      rest /= dims[axis];
    }
    std::memcpy(static_cast<char*>(to) + target * size, source + at * size, size);
  }
}

void contiguous(const CustomContext& context, const DenseTensor& x, DenseTensor* out) {
  phi::DenseTensorMeta meta = x.meta();
  meta.strides = phi::DenseTensorMeta::calc_strides(x.dims());
  meta.offset = 0;
  out->set_meta(meta);
  copy_strided(x, phi::vectorize(meta.strides), context.Alloc(out, x.dtype()));
}

void strided_copy(const CustomContext&, const DenseTensor& x, const std::vector<int64_t>& dims,
                  const std::vector<int64_t>& strides, int64_t offset, DenseTensor* out) {
  phi::DenseTensorMeta meta = x.meta();
  meta.dims = phi::make_ddim(dims);
  meta.strides = phi::make_ddim(strides);
  meta.offset = offset;
  out->set_meta(meta);
  copy_strided(x, strides, out->data());
}

template <class T>
void fill_with(DenseTensor* out, double value) {
  std::fill_n(static_cast<T*>(out->data()), out->numel(), static_cast<T>(value));
}

void fill(const CustomContext& context, const DenseTensor& x, const phi::Scalar& value,
          DenseTensor* out) {
  context.Alloc(out, x.dtype());
  const double number = value.to<double>();
  switch (x.dtype()) {
    case DataType::FLOAT64: return fill_with<double>(out, number);
    case DataType::FLOAT32: return fill_with<float>(out, number);
    case DataType::BFLOAT16: return fill_with<phi::dtype::bfloat16>(out, number);
    case DataType::FLOAT16: return fill_with<phi::dtype::float16>(out, number);
    case DataType::INT64: return fill_with<int64_t>(out, number);
    case DataType::INT32: return fill_with<int32_t>(out, number);
    case DataType::INT8: return fill_with<int8_t>(out, number);
    case DataType::UINT8: return fill_with<uint8_t>(out, number);
    case DataType::BOOL: return fill_with<bool>(out, number);
    default: PADDLE_THROW(phi::errors::Unimplemented("rehearsal device: fill %s", x.dtype()));
  }
}

// Values of x's type: paddle/phi/kernels/gpu/index_put_kernel.cu, IndexPutKernel. That there are no
// other indices than int64 is assumed.
void index_put(const CustomContext& context, const DenseTensor& x,
               const std::vector<const DenseTensor*>& indices, const DenseTensor& value,
               bool accumulate, DenseTensor* out) {
  PADDLE_ENFORCE_EQ(x.dtype(), value.dtype(), phi::errors::InvalidArgument(
      "index_put: x is %s, value %s", x.dtype(), value.dtype()));
  const size_t size = phi::SizeOf(x.dtype());
  if (!out->has_allocation() || out->data() != x.data()) {
    context.Alloc(out, x.dtype());
    std::memcpy(out->data(), x.data(), x.numel() * size);
  }
  int64_t inner = 1;
  for (int axis = static_cast<int>(indices.size()); axis < x.dims().size(); ++axis)
    inner *= x.dims()[axis];
  const int64_t rows = indices[0]->numel();
  PADDLE_ENFORCE_EQ(value.numel() == rows * inner && !accumulate, true,
                    phi::errors::Unimplemented("rehearsal device: this form of index_put"));
  for (int64_t row = 0; row < rows; ++row) {
    int64_t at = 0;
    for (size_t axis = 0; axis < indices.size(); ++axis) {
      PADDLE_ENFORCE_EQ(indices[axis]->dtype(), DataType::INT64, phi::errors::InvalidArgument(
          "index_put: indices are int64, not %s", indices[axis]->dtype()));
      at = at * x.dims()[axis] + indices[axis]->data<int64_t>()[row];
    }
    std::memcpy(static_cast<char*>(out->data()) + at * inner * size,
                static_cast<const char*>(value.data()) + row * inner * size, inner * size);
  }
}

// Paddle calls this one behind a collective, on that collective's stream: it waits there with it.
class Split : public Operation {
 public:
  Split(const DenseTensor& x, std::vector<DenseTensor> parts, int axis)
      : x_(x), parts_(std::move(parts)), axis_(axis) {}
  bool step() override {
    const auto dims = phi::vectorize(x_.dims());
    size_t row = phi::SizeOf(x_.dtype()), rows = 1, at = 0;
    for (int i = axis_; i < x_.dims().size(); ++i) row *= dims[i];
    for (int i = 0; i < axis_; ++i) rows *= dims[i];
    for (DenseTensor& part : parts_) {
      const size_t width = row / parts_.size();
      for (size_t i = 0; i < rows; ++i)
        std::memcpy(static_cast<char*>(part.data()) + i * width,
                    static_cast<const char*>(x_.data()) + i * row + at, width);
      at += width;
    }
    return true;
  }
  std::string name() const override { return "split"; }

 private:
  DenseTensor x_;
  std::vector<DenseTensor> parts_;
  int axis_;
};

void split_with_num(const CustomContext& context, const DenseTensor& x, int count,
                    const phi::Scalar& axis, std::vector<DenseTensor*> out) {
  const int given = axis.to<int>(), along = given < 0 ? given + x.dims().size() : given;
  PADDLE_ENFORCE_EQ(x.dims()[along] % count, 0, phi::errors::InvalidArgument(
      "split: %d into %d", x.dims()[along], count));
  std::vector<DenseTensor> parts;
  for (DenseTensor* part : out) {
    context.Alloc(part, x.dtype());
    parts.push_back(*part);  // shares the memory, which therefore outlives the queue
  }
  enqueue(reinterpret_cast<Stream*>(context.stream()),
          std::make_unique<Split>(x, std::move(parts), along));
}

// Left to CPUs, Paddle would leave the gradient there.
void embedding_grad(const CustomContext& context, const DenseTensor& ids, const DenseTensor& weight,
                    const DenseTensor& grad, int64_t padding, DenseTensor* weight_grad) {
  const int64_t E = weight.dims()[1];
  const auto grads = numbers_of(grad);
  std::vector<double> total(weight.numel(), 0.0);
  for (int64_t i = 0; i < ids.numel(); ++i) {
    const bool small = ids.dtype() == DataType::INT32;
    const int64_t row = small ? ids.data<int32_t>()[i] : ids.data<int64_t>()[i];
    for (int64_t j = 0; j < E && row != padding; ++j) total[row * E + j] += grads[i * E + j];
  }
  write(context, total, weight.dtype(), weight_grad);
}

phi::CustomPlace place() {
  return phi::CustomPlace("rehearsal", phi::DeviceManager::GetDevice("rehearsal"));
}

}  // namespace

phi::Backend own_backend() {
  const size_t number =
      phi::CustomRegisteredDeviceMap::Instance().GetOrRegisterGlobalDeviceTypeId("rehearsal");
  return static_cast<phi::Backend>(static_cast<size_t>(phi::Backend::NUM_BACKENDS) + number);
}

void add_own_kernels() {
  const auto own = own_backend();
  for (DataType type : {DataType::BOOL, DataType::INT8, DataType::UINT8, DataType::INT16,
                        DataType::INT32, DataType::INT64, DataType::FLOAT16, DataType::BFLOAT16,
                        DataType::FLOAT32, DataType::FLOAT64}) {
    PUT_KERNEL("contiguous", own, contiguous, type);
    PUT_KERNEL("strided_copy", own, strided_copy, type);
    PUT_KERNEL("fill", own, fill, type);
    PUT_KERNEL("index_put", own, index_put, type);
    PUT_KERNEL("split_with_num", own, split_with_num, type);
  }
  for (DataType type : {DataType::FLOAT16, DataType::BFLOAT16, DataType::FLOAT32})
    PUT_KERNEL("embedding_grad", own, embedding_grad, type);
}

// Where guards are held, Paddle's own stream, also while a stream guard has put another in its
// place: kernels run at once wherever they are sent, so copies are all that a guard may be around.
bool is_compute(const Stream* stream) {
  if (!phi::DeviceContextPool::IsInitialized()) return true;
  static std::map<int, phi::stream::stream_t> own;
  const auto device = place();
  auto* context = static_cast<CustomContext*>(phi::DeviceContextPool::Instance().Get(device));
  auto first = context->stream();
  if (holds_guarded()) first = own.try_emplace(device.GetDeviceId(), first).first->second;
  return first == reinterpret_cast<phi::stream::stream_t>(const_cast<Stream*>(stream));
}

bool holds_guarded() { return std::getenv("REHEARSAL_HOLDS_GUARDED") != nullptr; }

}  // namespace rehearsal

// Enter the kernels; `gpu` is 1 in the role of a GPU, which has operators that others have not.
extern "C" __attribute__((visibility("default"))) void rehearsal_register(int gpu) {
  rehearsal::add_half_kernels();
  rehearsal::add_half_adamw();
  rehearsal::add_own_kernels();
  if (gpu == 0) return;
  rehearsal::add_gpu_attention();
  rehearsal::add_gpu_norm();
  rehearsal::add_gpu_blocks();
  rehearsal::add_gpu_fused();
  rehearsal::add_gpu_fp8();
}
