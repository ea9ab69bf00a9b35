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
// Of a core that others may use without a thread less.
constexpr double kSpared = 0.35;
// Most windows without a new try, when fewer threads were needed right after the last one.
constexpr int kMostHeld = 64;

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

// Looks at the cores now and then, in whichever thread comes by.
class Watch {
 public:
  int policy() const { return policy_.load(std::memory_order_relaxed); }
  double free_cores() const { return free_.load(std::memory_order_relaxed); }

  int choose(int policy) {
    const std::lock_guard<std::mutex> lock(mutex_);
    started_ = false;
    free_ = INFINITY;
    next_ = 0;
    hold_ = held_ = fresh_ = 0;
    return policy_.exchange(policy);
  }

  // Threads that cores are left for, of so many.
  int limit(int most) {
    if (policy() == LLAMA_OPS_THREADS_MEASURED) update(most);
    const double whole = std::floor(free_cores() + kSpared);
    return whole >= most ? most : whole < 1 ? 1 : static_cast<int>(whole);
  }

 private:
  void update(int most) {
    const double begun = now();
    if (begun < next_.load(std::memory_order_relaxed)) return;
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return;
    Usage usage;
    if (!look(&usage)) {
      next_ = INFINITY;
      return;
    }
    // Where there are many cores, looking takes long.
    next_ = begun + kWindow + 1000 * (now() - begun);
    if (started_) judge(usage, most);
    before_ = usage;
    started_ = true;
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

  std::mutex mutex_;
  std::atomic<int> policy_{first_policy()};
  std::atomic<double> free_{INFINITY}, next_{0};
  Usage before_;
  bool started_ = false;
  int hold_ = 0, held_ = 0, fresh_ = 0;
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

double llama_ops_free_cores(void) { return watch().free_cores(); }

int llama_ops_set_threads_policy(int policy) { return watch().choose(policy); }
