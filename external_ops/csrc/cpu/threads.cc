// How many threads kernels run on; see llama_ops/threads.h. Not level code, since every level shares it.
//
// Kernels share their work out evenly, so one thread that has lost its core holds all others: beside
// another busy process, a thread for every core takes several times as long as one thread fewer. So
// the cores that others use are counted, from what the system says of each core and of this process.
#include "llama_ops/threads.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>

#if defined(__linux__)
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#endif

namespace llama_ops {
namespace {

// Of two threads that are awake, and of one that has gone to sleep since the last region (35 us).
constexpr double kOpening = 8192;
// A barrier itself takes 300 ns; the rest is what threads wait for each other there, as shares of
// small products are not even.
constexpr double kMeeting = 2500;
// Each thread's share has to be that many times what meeting the others costs.
constexpr double kRepays = 2;

// Between two looks at the cores. Linux counts their time in hundredths of a second.
constexpr double kWindow = 0.2;
// Longest pause between two kernels of a process at work. Behind a longer one, what others did meanwhile
// says nothing of the cores that they leave: a server that waited, while another process computed, would
// take one thread for its next prompt, however long.
constexpr double kPause = kWindow / 2;
// Of a core that a process takes at most which does nothing but wait.
constexpr double kIdle = 0.25;
// Of a core that others may use without a thread less.
constexpr double kSpared = 0.35;
// Most windows without a new try, when fewer threads were needed right after the last one.
constexpr int kMostHeld = 64;
// So many windows in a row, in which nobody else used the cores, end a limit at once.
constexpr int kAlone = 2;

// Seconds since some start, of all cores that this process may use.
struct Usage {
  double wall = 0, own = 0;
  double urgent = 0, nice = 0;  // of all processes, with the usual priority and with a lower one
  int cores = 0;
};

double now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(since).count();
}

#if defined(__linux__)
bool look(Usage* usage) {
  cpu_set_t allowed;
  if (sched_getaffinity(getpid(), sizeof allowed, &allowed) != 0) return false;
  std::FILE* file = std::fopen("/proc/stat", "r");
  if (file == nullptr) return false;
  const double tick = 1.0 / static_cast<double>(sysconf(_SC_CLK_TCK));
  usage->wall = now();
  timespec own;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &own);
  usage->own = static_cast<double>(own.tv_sec) + 1e-9 * static_cast<double>(own.tv_nsec);
  char line[512];
  while (std::fgets(line, sizeof line, file) != nullptr && std::strncmp(line, "cpu", 3) == 0) {
    unsigned core;
    unsigned long long user, nice, system, idle, waiting, irq, softirq, stolen;
    if (std::sscanf(line, "cpu%u %llu %llu %llu %llu %llu %llu %llu %llu", &core, &user, &nice, &system,
                    &idle, &waiting, &irq, &softirq, &stolen) != 9) {
      continue;  // the first line is of all cores together
    }
    if (core >= CPU_SETSIZE || !CPU_ISSET(core, &allowed)) continue;
    usage->urgent += tick * static_cast<double>(user + system + irq + softirq + stolen);
    usage->nice += tick * static_cast<double>(nice);
    ++usage->cores;
  }
  std::fclose(file);
  return usage->cores > 0;
}
#else
bool look(Usage*) { return false; }
#endif

constexpr const char* kPolicies[] = {"measured", "fixed", "all"};

int first_policy() {
  const char* name = std::getenv("LLAMA_OPS_THREADS");
  for (int policy = 0; name != nullptr && policy <= LLAMA_OPS_THREADS_ALL; ++policy) {
    if (std::strcmp(name, kPolicies[policy]) == 0) return policy;
  }
  return LLAMA_OPS_THREADS_MEASURED;
}

// Cores that others leave, from one look at them after the other.
class Judge {
 public:
  // Cores left; INFINITY before it is known.
  double free_cores() const { return free_.load(std::memory_order_relaxed); }

  // Threads that cores are left for, of so many.
  int limit(int most) const {
    const double whole = std::floor(free_cores() + kSpared);
    return whole >= most ? most : whole < 1 ? 1 : static_cast<int>(whole);
  }

  void forget() {
    started_ = false;
    free_ = INFINITY;
    hold_ = held_ = fresh_ = alone_ = 0;
  }

  // Another look. `ended`: when the last kernel did, on the clock of `now.wall`; `waited`: so long ago
  // that there was a pause.
  void hear(const Usage& now, double ended, bool waited, int most) {
    if (started_ && !left_alone(now, most) && !(waited && idled(now, ended))) judge(now, most);
    before_ = now;
    started_ = true;
  }

 private:
  // Whether this process did nothing in the pause before now, not even other things than kernels.
  bool idled(const Usage& now, double ended) const {
    const double wall = now.wall - before_.wall;
    const double pause = std::fmin(now.wall - ended, wall);
    const double at_work = wall - pause;
    return now.own - before_.own < now.cores * at_work + kIdle * pause;
  }

  // Whether cores stood idle for long enough, even those that processes of lower priority would have
  // filled: then nobody is there any more, pause or not, and the limit is over with all its waiting.
  bool left_alone(const Usage& now, int most) {
    const double all = now.urgent - before_.urgent + now.nice - before_.nice;
    const double others = (all - (now.own - before_.own)) / (now.wall - before_.wall);
    alone_ = now.cores - others + kSpared >= most ? alone_ + 1 : 0;
    if (alone_ < kAlone) return false;
    free_ = now.cores < most ? INFINITY : now.cores - std::fmax(0.0, others);
    hold_ = held_ = fresh_ = 0;
    return true;
  }

  // Processes of lower priority yield to threads that there are, and fill cores where there are none: so
  // they count only as long as all threads run. If these turn out not to get the cores, the next try
  // waits twice as long.
  void judge(const Usage& now, int most) {
    const double own = now.own - before_.own, urgent = now.urgent - before_.urgent;
    const bool limited = free_cores() + kSpared < most;
    const bool yields = limited && urgent >= own;  // or this process has a low priority itself
    const double counted = yields ? urgent : urgent + now.nice - before_.nice;
    const double others = std::fmax(0.0, (counted - own) / (now.wall - before_.wall));
    const double left = now.cores < most ? INFINITY : now.cores - others;
    if (left + kSpared < most) {
      if (!limited) held_ = hold_ = fresh_ > 0 ? std::min(2 * hold_ + 1, kMostHeld) : 0;
      free_ = left;
    } else if (held_ > 0) {
      --held_;
    } else {
      if (limited) fresh_ = 3;
      free_ = left;
    }
    if (!limited && fresh_ > 0) --fresh_;
  }

  std::atomic<double> free_{INFINITY};
  Usage before_;
  bool started_ = false;
  int hold_ = 0, held_ = 0, fresh_ = 0, alone_ = 0;
};

// Looks at the cores now and then, in whichever thread comes by.
class Watch {
 public:
  int policy() const { return policy_.load(std::memory_order_relaxed); }
  double free_cores() const { return judge_.free_cores(); }

  int choose(int policy) {
    const std::lock_guard<std::mutex> lock(mutex_);
    judge_.forget();
    next_ = ended_ = 0;
    return policy_.exchange(policy);
  }

  int limit(int most) {
    if (policy() == LLAMA_OPS_THREADS_MEASURED) {
      const double begun = now();
      const bool waited = begun > ended_.load(std::memory_order_relaxed) + kPause;
      if (waited || begun >= next_.load(std::memory_order_relaxed)) update(most, waited);
    }
    return judge_.limit(most);
  }

  // A kernel has ended. One that took longer than a window is judged by itself.
  void done(int most) {
    if (policy() != LLAMA_OPS_THREADS_MEASURED) return;
    const double ended = now();
    ended_.store(ended, std::memory_order_relaxed);
    if (ended >= next_.load(std::memory_order_relaxed)) update(most, false);
  }

 private:
  void update(int most, bool waited) {
    const double begun = now();
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return;
    Usage usage;
    if (!look(&usage)) {
      next_ = INFINITY;
      return;
    }
    // Where there are many cores, looking takes long.
    next_ = begun + kWindow + 1000 * (now() - begun);
    judge_.hear(usage, ended_.load(std::memory_order_relaxed), waited, most);
  }

  std::mutex mutex_;
  std::atomic<int> policy_{first_policy()};
  std::atomic<double> next_{0}, ended_{0};
  Judge judge_;
};

Watch& watch() {
  static Watch one;
  return one;
}

}  // namespace
}  // namespace llama_ops

using namespace llama_ops;

int llama_ops_threads_for(double nanoseconds, int64_t meetings) {
  const int most = omp_get_max_threads();
  if (most == 1 || watch().policy() == LLAMA_OPS_THREADS_ALL) return most;
  const double cost = kRepays * (kOpening + kMeeting * static_cast<double>(meetings));
  if (nanoseconds < 2 * cost) return 1;
  const int limit = watch().limit(most);
  return nanoseconds >= limit * cost ? limit : static_cast<int>(nanoseconds / cost);
}

void llama_ops_threads_done(void) {
  const int most = omp_get_max_threads();
  if (most > 1) watch().done(most);
}

double llama_ops_free_cores(void) { return watch().free_cores(); }

int llama_ops_set_threads_policy(int policy) { return watch().choose(policy); }

void llama_ops_threads_course(const double* looks, int count, int cores, int most, int* limits) {
  Judge judge;
  for (int i = 0; i < count; ++i, looks += 5) {
    Usage usage;
    usage.wall = looks[0];
    usage.own = looks[1];
    usage.urgent = looks[2];
    usage.nice = looks[3];
    usage.cores = cores;
    judge.hear(usage, looks[4], usage.wall > looks[4] + kPause, most);
    limits[i] = judge.limit(most);
  }
}
