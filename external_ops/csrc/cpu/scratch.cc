// Scratch memory; not level code, since every level shares it.
#include <cstdint>
#include <cstdlib>
#include <new>

namespace llama_ops {

namespace {

constexpr int kSlots = 8;

struct Buffers {
  void* memory[kSlots] = {};
  int64_t bytes[kSlots] = {};
  ~Buffers() {
    for (void* one : memory) std::free(one);
  }
};

}  // namespace

void* scratch(int slot, int64_t bytes) {
  static thread_local Buffers buffers;
  if (buffers.bytes[slot] < bytes) {
    std::free(buffers.memory[slot]);
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    buffers.memory[slot] = std::aligned_alloc(64, rounded);
    buffers.bytes[slot] = buffers.memory[slot] == nullptr ? 0 : rounded;
    if (buffers.memory[slot] == nullptr) throw std::bad_alloc();
  }
  return buffers.memory[slot];
}

}  // namespace llama_ops
