/* Threads of our own: they take pieces of one job after another, and wait a little before they sleep. */
#pragma once

#include <stdint.h>

/* One piece of work: items `first` to `first + count` of a job. Pieces may run in any order and at once. */
typedef void work_fn(void *job, int64_t first, int64_t count);

/* Run all items of a job on up to `threads` threads, the caller's among them; returns when all are done. Pieces have at
 * most `piece` items, fewer near the end. A second caller at the same time runs its job alone. */
void run_job(work_fn *work, void *job, int64_t items, int64_t piece, int64_t threads);

/* Memory of the calling thread, at least `bytes`, aligned to 64; what a slot had before is lost when it has to grow.
 * NULL where there is none. */
void *scratch(int slot, int64_t bytes);
enum { SCRATCH_ROWS, SCRATCH_HIDDEN, SCRATCH_PRODUCT, SCRATCH_PANEL, SCRATCH_SLOTS };
