// Runs every case at every level, with one thread and with two.
#include <omp.h>

#include <initializer_list>

#include "cases.h"
#include "llama_ops/threads.h"

namespace cases {

Case*& first_case() {
  static Case* first = nullptr;
  return first;
}

}  // namespace cases

int main() {
  int runs = 0, levels = 0;
  llama_ops_set_threads_policy(LLAMA_OPS_THREADS_ALL);
  for (int level = 0; level <= LLAMA_OPS_EMULATED; ++level) {
    if (llama_ops_set_level(level) != 0) continue;
    ++levels;
    for (int threads : {1, 2}) {
      omp_set_num_threads(threads);
      for (cases::Case* one = cases::first_case(); one != nullptr; one = one->next) {
        std::fprintf(stderr, "\rlevel %d, %d thread(s): %-40s", level, threads, one->name);
        one->run();
        ++runs;
      }
    }
  }
  std::fprintf(stderr, "\r%-72s\r", "");
  std::printf("%d runs of cases at %d levels, with 1 and 2 threads: clean\n", runs, levels);
}
