// Cases that call the C functions with odd shapes, for the sanitizers (make sanitize).
//
// A family of kernels has its cases in cases_FAMILY.cc:
//
//   LLAMA_OPS_CASE(rms_norm_forward) {
//     for (int dtype : {LLAMA_OPS_F32, LLAMA_OPS_BF16}) {
//       Numbers x(3 * 65, dtype), weight(65, dtype), out(3 * 65, dtype, kUnwritten);
//       ... call llama_ops_rms_norm_forward ...
//       out.require_written();
//     }
//   }
//
// It runs at every level that the processor has, with one thread and with two. Arrays are as long as
// they have to be and no longer: one number too far is an error. Right values are tested elsewhere
// (tests/unit/external_ops); here results only have to be finite and written.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>

#include "llama_ops/common.h"

namespace cases {

struct Case {
  const char* name;
  void (*run)();
  Case* next;
};

Case*& first_case();

struct Register {
  Case one;
  Register(const char* name, void (*run)()) : one{name, run, first_case()} { first_case() = &one; }
};

#define LLAMA_OPS_CASE(NAME)                                  \
  static void NAME##_case();                                  \
  static cases::Register NAME##_registered(#NAME, NAME##_case); \
  static void NAME##_case()

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::abort();
}

// Reproducible, in [-1, 1).
inline float next_random() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
}

// An array on the heap with nothing behind it.
template <class T>
class Array {
 public:
  explicit Array(int64_t count, T value = T()) : count_(count), numbers_(new T[count]) {
    for (int64_t i = 0; i < count; ++i) numbers_[i] = value;
  }
  T* data() { return numbers_.get(); }
  T& operator[](int64_t i) { return numbers_[i]; }
  int64_t size() const { return count_; }

 private:
  int64_t count_;
  std::unique_ptr<T[]> numbers_;
};

enum Contents { kRandom, kUnwritten };

// Floating numbers of a type that is chosen at run time: random ones, or NaN until written.
class Numbers {
 public:
  Numbers(int64_t count, int dtype, Contents contents = kRandom)
      : dtype_(dtype), wide_(dtype == LLAMA_OPS_F32 ? count : 0), half_(count - wide_.size()) {
    for (int64_t i = 0; i < count; ++i) {
      const float x = contents == kRandom ? next_random() : __builtin_nanf("");
      uint32_t bits;
      __builtin_memcpy(&bits, &x, 4);
      dtype_ == LLAMA_OPS_F32 ? void(wide_[i] = x) : void(half_[i] = uint16_t(bits >> 16));
    }
  }
  void* data() { return dtype_ == LLAMA_OPS_F32 ? static_cast<void*>(wide_.data()) : half_.data(); }
  float* floats() { return wide_.data(); }
  void require_written() {
    for (int64_t i = 0; i < wide_.size(); ++i) {
      require(__builtin_isfinite(wide_[i]), "a number was not written, or is not finite");
    }
    for (int64_t i = 0; i < half_.size(); ++i) {
      require((half_[i] & 0x7f80) != 0x7f80, "a number was not written, or is not finite");
    }
  }

 private:
  int dtype_;
  Array<float> wide_;
  Array<uint16_t> half_;
};

// Keys or values of a paged cache, random heads of a type of llama_ops/paged_attention.h.
class Cache {
 public:
  Cache(int64_t heads, int64_t dim, int dtype)
      : numbers_(dtype == LLAMA_OPS_I8 ? 0 : heads * dim, dtype),
        bytes_(dtype == LLAMA_OPS_I8 ? heads * (dim + 4) : 0) {
    const float scale = 1.0f / 64;
    for (int64_t i = 0; i < bytes_.size(); ++i) {
      const int64_t at = i % (dim + 4) - dim;
      bytes_[i] = static_cast<int8_t>(127 * next_random());
      if (at >= 0) __builtin_memcpy(&bytes_[i], reinterpret_cast<const char*>(&scale) + at, 1);
    }
  }
  void* data() { return bytes_.size() == 0 ? numbers_.data() : static_cast<void*>(bytes_.data()); }

 private:
  Numbers numbers_;
  Array<int8_t> bytes_;
};

}  // namespace cases
