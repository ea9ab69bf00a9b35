// The rehearsal device's runtime: memory, copies, streams and events of a device that is none.
//
// Paddle loads this library from CUSTOM_DEVICE_ROOT and calls InitPlugin. Memory is the host's, and
// filled with NaNs when it is handed out. As with CUDA, a copy to or from ordinary memory of the
// host is done with that memory when it returns; one to or from pinned memory, or on a stream of its
// own where such copies are held (streams.h), is done when a wait asks for it.
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <vector>

#include "collectives.h"
#include "paddle/phi/backends/device_ext.h"
#include "streams.h"

using rehearsal::Event;
using rehearsal::Stream;

namespace {

constexpr size_t kMemory = 80ull << 30;
int current = 0;
std::mutex mutex;
std::map<const char*, size_t> pinned;
size_t used = 0, peak = 0;

Stream* of(C_Stream stream) { return reinterpret_cast<Stream*>(stream); }
Event* of(C_Event event) { return reinterpret_cast<Event*>(event); }
C_Status status(bool done) { return done ? C_SUCCESS : C_FAILED; }

size_t devices() {
  const char* count = std::getenv("REHEARSAL_DEVICES");
  return count ? std::atoi(count) : 1;
}

bool is_pinned(const void* place) {
  std::lock_guard<std::mutex> lock(mutex);
  auto after = pinned.upper_bound(static_cast<const char*>(place));
  if (after == pinned.begin()) return false;
  const auto& block = *std::prev(after);
  return static_cast<const char*>(place) < block.first + block.second;
}

class Copy : public rehearsal::Operation {
 public:
  Copy(void* to, const void* from, size_t bytes, bool now) : to_(to), from_(from), bytes_(bytes) {
    if (!now) return;
    const char* data = static_cast<const char*>(from);
    kept_.assign(data, data + bytes);
    from_ = kept_.data();
  }
  bool step() override {
    std::memmove(to_, from_, bytes_);
    return true;
  }
  std::string name() const override { return "a copy"; }

 private:
  void* to_;
  const void* from_;
  size_t bytes_;
  std::vector<char> kept_;
};

C_Status nothing() { return C_SUCCESS; }
C_Status nothing_of(const C_Device) { return C_SUCCESS; }
C_Status set_device(const C_Device device) {
  current = device->id;
  return C_SUCCESS;
}
C_Status get_device(const C_Device device) {
  device->id = current;
  return C_SUCCESS;
}
C_Status count(size_t* number) {
  *number = devices();
  return C_SUCCESS;
}
C_Status list(size_t* numbers) {
  for (size_t i = 0; i < devices(); ++i) numbers[i] = i;
  return C_SUCCESS;
}

C_Status copy(const C_Device, void* to, const void* from, size_t bytes) {
  std::memmove(to, from, bytes);
  return C_SUCCESS;
}
C_Status copy_between(const C_Device, const C_Device, void* to, const void* from, size_t bytes) {
  std::memmove(to, from, bytes);
  return C_SUCCESS;
}
C_Status later(const C_Device, C_Stream stream, void* to, const void* from, size_t bytes) {
  return status(enqueue(of(stream), std::make_unique<Copy>(to, from, bytes, false)));
}
bool is_guarded(const rehearsal::Stream* stream) {
  return rehearsal::holds_guarded() && !rehearsal::is_compute(stream);
}
C_Status later_up(const C_Device, C_Stream stream, void* to, const void* from, size_t bytes) {
  const bool now = !is_pinned(from) && !is_guarded(of(stream));
  return status(enqueue(of(stream), std::make_unique<Copy>(to, from, bytes, now)));
}
C_Status later_down(const C_Device, C_Stream stream, void* to, const void* from, size_t bytes) {
  if (is_pinned(to) || is_guarded(of(stream))) return later(nullptr, stream, to, from, bytes);
  if (!complete(of(stream), of(stream)->enqueued)) return C_FAILED;
  return copy(nullptr, to, from, bytes);
}
C_Status later_between(const C_Device, const C_Device, C_Stream stream, void* to,
                       const void* from, size_t bytes) {
  return later(nullptr, stream, to, from, bytes);
}

void* block(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }

C_Status allocate(const C_Device, void** place, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  if (used + bytes > kMemory || (*place = block(bytes)) == nullptr) return C_FAILED;
  std::memset(*place, 0xff, bytes);
  used += bytes;
  peak = used > peak ? used : peak;
  return C_SUCCESS;
}
// As cudaFree, which waits for everything.
C_Status release(const C_Device, void* place, size_t bytes) {
  const bool done = rehearsal::complete_all();
  std::lock_guard<std::mutex> lock(mutex);
  used -= bytes;
  std::free(place);
  return status(done);
}
C_Status allocate_host(const C_Device, void** place, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  if ((*place = block(bytes)) == nullptr) return C_FAILED;
  pinned[static_cast<const char*>(*place)] = bytes;
  return C_SUCCESS;
}
C_Status release_host(const C_Device, void* place, size_t) {
  const bool done = rehearsal::complete_all();
  std::lock_guard<std::mutex> lock(mutex);
  pinned.erase(static_cast<const char*>(place));
  std::free(place);
  return status(done);
}

C_Status create_stream(const C_Device, C_Stream* stream) {
  *stream = reinterpret_cast<C_Stream>(rehearsal::new_stream());
  return C_SUCCESS;
}
C_Status destroy_stream(const C_Device, C_Stream) { return C_SUCCESS; }
C_Status query_stream(const C_Device, C_Stream stream) {
  return status(of(stream)->queue.empty());
}
C_Status create_event(const C_Device, C_Event* event) {
  *event = reinterpret_cast<C_Event>(new Event);
  return C_SUCCESS;
}
C_Status record_event(const C_Device, C_Stream stream, C_Event event) {
  *of(event) = {of(stream), of(stream)->enqueued};
  return C_SUCCESS;
}
C_Status destroy_event(const C_Device, C_Event event) {
  delete of(event);
  return C_SUCCESS;
}
C_Status query_event(const C_Device, C_Event event) { return status(is_done(*of(event))); }
C_Status synchronize_device(const C_Device) { return status(rehearsal::complete_all()); }
C_Status synchronize_stream(const C_Device, C_Stream stream) {
  return status(complete(of(stream), of(stream)->enqueued));
}
C_Status synchronize_event(const C_Device, C_Event event) {
  return status(of(event)->stream == nullptr || complete(of(event)->stream, of(event)->upto));
}
C_Status stream_wait_event(const C_Device, C_Stream stream, C_Event event) {
  return status(wait_for(of(stream), *of(event)));
}

C_Status memory(const C_Device, size_t* total, size_t* left) {
  *total = kMemory;
  *left = kMemory - used;
  return C_SUCCESS;
}
C_Status chunk(const C_Device, size_t* bytes) {
  *bytes = 256;
  return C_SUCCESS;
}
C_Status yes(const C_Device, bool* supported) {
  *supported = true;
  return C_SUCCESS;
}

void set_memory(C_DeviceInterface* interface) {
  interface->memory_copy_h2d = interface->memory_copy_d2h = interface->memory_copy_d2d = copy;
  interface->memory_copy_p2p = copy_between;
  interface->async_memory_copy_h2d = later_up;
  interface->async_memory_copy_d2h = later_down;
  interface->async_memory_copy_d2d = later;
  interface->async_memory_copy_p2p = later_between;
  interface->device_memory_allocate = interface->unified_memory_allocate = allocate;
  interface->device_memory_deallocate = interface->unified_memory_deallocate = release;
  interface->host_memory_allocate = allocate_host;
  interface->host_memory_deallocate = release_host;
  interface->device_memory_stats = memory;
  interface->device_min_chunk_size = chunk;
}

void set_streams(C_DeviceInterface* interface) {
  interface->create_stream = create_stream;
  interface->destroy_stream = destroy_stream;
  interface->query_stream = query_stream;
  interface->create_event = create_event;
  interface->record_event = record_event;
  interface->destroy_event = destroy_event;
  interface->query_event = query_event;
  interface->synchronize_device = synchronize_device;
  interface->synchronize_stream = synchronize_stream;
  interface->synchronize_event = synchronize_event;
  interface->stream_wait_event = stream_wait_event;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void InitPlugin(CustomRuntimeParams* params) {
  PADDLE_CUSTOM_RUNTIME_CHECK_VERSION(params);
  static char type[] = "rehearsal", sub_type[] = "host";
  params->device_type = type;
  params->sub_device_type = sub_type;
  C_DeviceInterface* interface = params->interface;
  std::memset(static_cast<void*>(interface), 0, sizeof(C_DeviceInterface));
  interface->initialize = interface->finalize = nothing;
  interface->init_device = interface->deinit_device = nothing_of;
  interface->set_device = set_device;
  interface->get_device = get_device;
  interface->get_device_count = count;
  interface->get_device_list = list;
  interface->is_float16_supported = interface->is_bfloat16_supported = yes;
  set_memory(interface);
  set_streams(interface);
  rehearsal::set_collectives(interface);
}

extern "C" __attribute__((visibility("default"))) size_t rehearsal_peak_bytes() { return peak; }

extern "C" __attribute__((visibility("default"))) void rehearsal_forget_peak() { peak = used; }

extern "C" __attribute__((visibility("default"))) size_t rehearsal_used_bytes() { return used; }
