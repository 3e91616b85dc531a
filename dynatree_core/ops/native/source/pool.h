/* A team: the threads of one call of the library. One of them, the leader, computes the operators, and all of them take
 * pieces of its jobs, one job after another. */
#pragma once

#include <stdint.h>

typedef struct team team;

/* One piece of work: items `first` to `first + count` of a job. Pieces may run in any order and at once. */
typedef void work_fn(void *job, int64_t first, int64_t count);

/* Run all items of a job on the threads of a team, or on this thread alone where it is NULL; returns when all are done.
 * Pieces have at most `piece` items, fewer near the end. */
void run_job(work_fn *work, void *job, int64_t items, int64_t piece, team *team);

/* How many threads a team has. */
int64_t team_size(const team *team);

/* Have a team of up to `threads` threads, whose leader calls `lead`; returns when it does. */
void with_team(void (*lead)(void *given, team *team), void *given, int64_t threads);

/* Memory of the calling thread, at least `bytes`, aligned to 64; what a slot had before is lost when it has to grow.
 * NULL where there is none. */
void *scratch(int slot, int64_t bytes);
enum {
  SCRATCH_ROWS, SCRATCH_CODES, SCRATCH_HIDDEN, SCRATCH_PRODUCT, SCRATCH_SCORES, SCRATCH_EXPERTS, SCRATCH_PARTS,
  SCRATCH_SLOTS
};
