#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#if defined(__x86_64__)
#define relax() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define relax() __asm__ volatile("yield")
#else
#define relax() ((void)0)
#endif

enum { MAX_THREADS = 256, SPINS_UNTIL_YIELD = 20000 };

struct team {
  void (*lead)(void *given, team *team);
  void *given;
  int64_t threads;
  atomic_int num_arrived; /* the first to arrive leads */
  atomic_int is_done;
  /* the job; written only while nobody is inside */
  work_fn *work;
  void *data;
  int64_t items, piece;
  _Atomic int64_t next;
  atomic_uint number;    /* counts jobs, so that a worker knows a new one */
  atomic_int is_open;    /* whether workers may enter */
  atomic_int num_inside;
};

static void wait_a_little(int *spins) {
  if (++*spins < SPINS_UNTIL_YIELD) relax();
  else sched_yield();
}

/* Take pieces until none is left. Pieces shrink towards the end, so that all threads end at about the same time. */
static void take_pieces(team *t) {
  int64_t first = atomic_load(&t->next);
  while (first < t->items) {
    int64_t fair = (t->items - first) / (2 * t->threads), count = fair < t->piece ? fair : t->piece;
    if (count < 1) count = 1;
    if (atomic_compare_exchange_weak(&t->next, &first, first + count)) {
      t->work(t->data, first, count);
      first = atomic_load(&t->next);
    }
  }
}

static void be_worker(team *t) {
  unsigned seen = 0;
  for (int spins = 0;; spins = 0) {
    while (atomic_load(&t->number) == seen) {
      if (atomic_load(&t->is_done)) return;
      wait_a_little(&spins);
    }
    seen = atomic_load(&t->number);
    atomic_fetch_add(&t->num_inside, 1); /* before looking whether it is open: the leader looks the other way round */
    if (atomic_load(&t->is_open)) take_pieces(t);
    atomic_fetch_sub(&t->num_inside, 1);
  }
}

void run_job(work_fn *work, void *job, int64_t items, int64_t piece, team *t) {
  if (!t || items <= 1) {
    for (int64_t first = 0; first < items; first += piece) {
      work(job, first, items - first < piece ? items - first : piece);
    }
    return;
  }
  t->work = work, t->data = job, t->items = items, t->piece = piece;
  atomic_store(&t->next, 0);
  atomic_store(&t->is_open, 1);
  atomic_fetch_add(&t->number, 1);
  take_pieces(t);
  atomic_store(&t->is_open, 0); /* who is late stays outside */
  for (int spins = 0; atomic_load(&t->num_inside);) wait_a_little(&spins);
}

int64_t team_size(const team *t) { return t ? t->threads : 1; }

static void join(void *given) {
  team *t = given;
  if (atomic_fetch_add(&t->num_arrived, 1)) {
    be_worker(t);
  } else {
    t->lead(t->given, t);
    atomic_store(&t->is_done, 1);
  }
}

/* OpenMP's way to have a function called by several threads. torch's are used, where it has them: two sets of threads
 * would take the cores from each other, since OpenMP's wait for some milliseconds without sleeping. */
typedef void parallel_fn(void (*function)(void *), void *data, unsigned threads, unsigned flags);
static parallel_fn *openmp;

static void forget_openmp(void) { openmp = NULL; } /* its threads are not there after a fork */

void dynatree_use_openmp(parallel_fn *given) {
  static int is_registered;
  if (!is_registered) pthread_atfork(NULL, NULL, forget_openmp);
  is_registered = 1;
  openmp = given;
}

static void *join_thread(void *given) {
  join(given);
  return NULL;
}

void with_team(void (*lead)(void *given, team *team), void *given, int64_t threads) {
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  if (threads <= 1) {
    lead(given, NULL);
    return;
  }
  team t = {.lead = lead, .given = given, .threads = threads};
  if (openmp) {
    openmp(join, &t, (unsigned)threads, 0);
    return;
  }
  pthread_t made[MAX_THREADS];
  int64_t num_made = 0;
  while (num_made < threads - 1 && !pthread_create(&made[num_made], NULL, join_thread, &t)) num_made++;
  join(&t); /* fewer will do */
  for (int64_t i = 0; i < num_made; i++) pthread_join(made[i], NULL);
}

typedef struct { void *of[SCRATCH_SLOTS]; int64_t bytes[SCRATCH_SLOTS]; } memory;

static pthread_key_t key;
static pthread_once_t is_keyed = PTHREAD_ONCE_INIT;

static void free_memory(void *given) {
  memory *own = given;
  for (int slot = 0; slot < SCRATCH_SLOTS; slot++) free(own->of[slot]);
  free(own);
}

static void make_key(void) { pthread_key_create(&key, free_memory); }

void *scratch(int slot, int64_t bytes) {
  pthread_once(&is_keyed, make_key);
  memory *own = pthread_getspecific(key);
  if (!own) {
    own = calloc(1, sizeof *own);
    if (!own) return NULL;
    pthread_setspecific(key, own);
  }
  if (own->bytes[slot] < bytes) {
    free(own->of[slot]);
    own->bytes[slot] = 0;
    int64_t rounded = (bytes + 4095) / 4096 * 4096;
    own->of[slot] = aligned_alloc(64, (size_t)rounded);
    if (own->of[slot]) own->bytes[slot] = rounded;
  }
  return own->of[slot];
}
