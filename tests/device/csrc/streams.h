// Streams and events of the rehearsal device: work that waits until somebody asks for it.
//
// Kernels run at once, on the host. What goes on behind a kernel's back on hardware, a collective
// or a copy on a stream of its own, lies in that stream's queue until an event or a synchronisation
// asks for it; who forgets to ask reads what was there before. The stream that kernels run on is in
// order by itself: work for it is carried out when it comes.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>

namespace rehearsal {

// One piece of work in a queue.
class Operation {
 public:
  virtual ~Operation() = default;
  // Go on; true when done. Never blocks.
  virtual bool step() = 0;
  // Hand over what other processes need, without changing memory of this one.
  virtual void offer() {}
  virtual std::string name() const = 0;
  uint64_t group = 0;  // those of one group may overtake each other; 0 is none
};

struct Stream {
  std::deque<std::unique_ptr<Operation>> queue;
  uint64_t enqueued = 0, done = 0;
};

// The work that a stream had been given when the event was recorded.
struct Event {
  Stream* stream = nullptr;
  uint64_t upto = 0;
};

Stream* new_stream();
// False, as everywhere here, when other processes do not take part.
bool enqueue(Stream* stream, std::unique_ptr<Operation> operation);
// Carry out a stream's first `upto` pieces of work.
bool complete(Stream* stream, uint64_t upto);
bool complete_all();
bool is_done(const Event& event);
bool wait_for(Stream* stream, const Event& event);
void begin_group();
bool end_group();

// The stream that kernels run on.
bool is_compute(const Stream* stream);

// Whether copies on streams of guards wait too, though a CPU wheel cannot pin the host's memory: who
// makes such copies says so in the environment (REHEARSAL_HOLDS_GUARDED). Streams of predictors are
// none of guards.
bool holds_guarded();

}  // namespace rehearsal
