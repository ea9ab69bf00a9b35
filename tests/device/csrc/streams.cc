// The queues of the rehearsal device, and who carries out what when.
#include "streams.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace rehearsal {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// Other streams' work stays undone for so long while one is waited for. Hardware does not wait, and
// ranks that ask for the same collectives in different orders would stand still for ever.
constexpr milliseconds kPatience{200};

std::recursive_mutex mutex;
std::vector<Stream*> streams;
uint64_t group = 0, groups = 0;
int depth = 0;
std::vector<Stream*> opened;  // compute streams that were given work inside of the group

milliseconds limit() {
  const char* seconds = std::getenv("REHEARSAL_TIMEOUT");
  return milliseconds(1000 * (seconds ? std::atoi(seconds) : 60));
}

// Carry out what can be carried out without waiting; true when `upto` pieces are done.
bool advance(Stream* stream, uint64_t upto) {
  while (stream->done < upto) {
    const uint64_t together = stream->queue.front()->group;
    if (!stream->queue.front()->step()) {
      for (auto& one : stream->queue)
        if (together != 0 && one->group == together) one->offer();
      return false;
    }
    stream->queue.pop_front();
    ++stream->done;
  }
  return true;
}

class Wait : public Operation {
 public:
  explicit Wait(const Event& event) : event_(event) {}
  bool step() override { return advance(event_.stream, event_.upto); }
  std::string name() const override {
    return event_.stream->queue.empty() ? "an event" : event_.stream->queue.front()->name();
  }

 private:
  Event event_;
};

}  // namespace

Stream* new_stream() {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  streams.push_back(new Stream);  // events may outlive it, so nobody deletes it
  return streams.back();
}

bool complete(Stream* stream, uint64_t upto) {
  const auto start = Clock::now();
  while (true) {
    {
      std::lock_guard<std::recursive_mutex> lock(mutex);
      if (advance(stream, upto)) return true;
      const bool all = Clock::now() - start > kPatience;
      for (Stream* other : streams) {
        if (other == stream || other->queue.empty()) continue;
        if (all) advance(other, other->enqueued);
        else other->queue.front()->offer();
      }
      if (Clock::now() - start > limit()) {
        const std::string what = stream->queue.empty() ? "" : stream->queue.front()->name();
        std::fprintf(stderr, "rehearsal device: gave up waiting for %s\n", what.c_str());
        stream->queue.clear();
        stream->done = stream->enqueued;
        return false;
      }
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

bool enqueue(Stream* stream, std::unique_ptr<Operation> operation) {
  {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    operation->group = group;
    stream->queue.push_back(std::move(operation));
    ++stream->enqueued;
    if (!is_compute(stream)) return true;
    if (depth > 0) {
      opened.push_back(stream);
      return true;
    }
  }
  return complete(stream, stream->enqueued);
}

bool complete_all() {
  bool done = true;
  for (size_t i = 0; i < streams.size(); ++i) done &= complete(streams[i], streams[i]->enqueued);
  return done;
}

bool is_done(const Event& event) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  return event.stream == nullptr || event.stream->done >= event.upto;
}

bool wait_for(Stream* stream, const Event& event) {
  if (event.stream == nullptr || event.stream == stream || is_done(event)) return true;
  return enqueue(stream, std::make_unique<Wait>(event));
}

void begin_group() {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  if (depth++ == 0) group = ++groups;
}

bool end_group() {
  std::vector<Stream*> waiting;
  {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (depth == 0 || --depth > 0) return true;
    group = 0;
    waiting.swap(opened);
  }
  bool done = true;
  for (Stream* stream : waiting) done &= complete(stream, stream->enqueued);
  return done;
}

}  // namespace rehearsal

// For the end of a process: what nobody waited for, others may; as long as somebody takes part.
extern "C" __attribute__((visibility("default"))) void rehearsal_finish() {
  const auto start = rehearsal::Clock::now();
  const auto enough = std::min(rehearsal::limit(), rehearsal::milliseconds(5000));
  bool done = false;
  while (!done && rehearsal::Clock::now() - start < enough) {
    std::lock_guard<std::recursive_mutex> lock(rehearsal::mutex);
    done = true;
    for (auto* stream : rehearsal::streams) done &= rehearsal::advance(stream, stream->enqueued);
    if (!done) std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}
