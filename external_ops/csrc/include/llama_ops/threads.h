/* How many threads kernels run on: what the work repays, and the cores that other processes leave. */
#ifndef LLAMA_OPS_THREADS_H
#define LLAMA_OPS_THREADS_H

#include "llama_ops/common.h"

enum llama_ops_threads_policy {
  LLAMA_OPS_THREADS_MEASURED = 0, /* as many as the work repays and other processes leave cores for */
  LLAMA_OPS_THREADS_FIXED = 1,    /* as many as the work repays */
  LLAMA_OPS_THREADS_ALL = 2       /* as many as OpenMP allows, however little there is to do */
};

/* MEASURED, or what LLAMA_OPS_THREADS in the environment names (measured, fixed, all); returns the one
 * before. Choosing one forgets what was measured. */
LLAMA_OPS_API int llama_ops_set_threads_policy(int policy);

/* Threads for work of so many nanoseconds on one thread, in which all threads meet so many times: at
 * least 1, at most what OpenMP allows. */
LLAMA_OPS_API int llama_ops_threads_for(double nanoseconds, int64_t meetings);

/* That work has ended. What other processes do is counted while this one is at work only. */
LLAMA_OPS_API void llama_ops_threads_done(void);

/* Cores that other processes left to this one lately: below the threads that OpenMP allows, a limit.
 * Infinite before the first measurement, and where there is none: under another policy, without Linux's
 * /proc/stat, or with fewer cores than threads. */
LLAMA_OPS_API double llama_ops_free_cores(void);

/* limits[count]: the threads that cores would be left for after each of so many looks at them, from a
 * start that knows nothing; for tests. looks[count, 5], each in seconds since some start: the clock, the
 * time of this process on all cores, of all processes together with the usual priority and with a lower
 * one, and when the last kernel ended, on the same clock. */
LLAMA_OPS_API void llama_ops_threads_course(const double* looks, int count, int cores, int most,
                                            int* limits);

#endif
