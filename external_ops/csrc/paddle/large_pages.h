// Large pages for packed weights: a step of generation reads all of them from front to back, which
// pages of 4 KiB slow down (docs/log.md).
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <fstream>
#include <mutex>
#include <set>
#include <string>
#include <utility>

namespace llama_ops {

// Whether Linux may use large pages where it is asked to; elsewhere there is no such file.
inline bool large_pages_allowed() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string line;
  return std::getline(file, line) && line.find("[never]") == std::string::npos;
}

// Moves memory that is in use to large pages: at once if it is `fresh`, else the first time that this
// many bytes are seen at this address, as weights of exported programs are. (The size is part of it
// because a weight may lie where another was freed.) A hint: where the system refuses, or cannot
// (Linux before 6.1), nothing happens.
inline void use_large_pages(const void* data, int64_t bytes, bool fresh) {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers do not have
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  constexpr int64_t kWorthwhile = 256 << 10;
  if (bytes < kWorthwhile) return;
  static const bool allowed = large_pages_allowed();
  if (!allowed) return;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int64_t>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!known.emplace(data, bytes).second && !fresh) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
  // Page by page: the first and the last reach beyond the weight, and may be refused.
  for (uintptr_t page = begin; page < end; page += kPage) {
    (void)madvise(reinterpret_cast<void*>(page), kPage, kCollapse);
  }
}

}  // namespace llama_ops
