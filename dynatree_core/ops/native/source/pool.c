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

enum { MAX_WORKERS = 255, SPINS = 4000, SPINS_UNTIL_YIELD = 20000 }; /* 4000 are some 100 microseconds */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* for sleeping, and for making workers */
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static atomic_flag is_busy = ATOMIC_FLAG_INIT; /* held by the thread whose job it is */
static int num_workers;

/* the job; written only while nobody is inside */
static work_fn *job_work;
static void *job_data;
static int64_t job_items, job_piece, job_threads;
static _Atomic int64_t job_next;
static atomic_uint job_number; /* counts jobs, so that a worker knows a new one */
static atomic_int is_open;     /* whether workers may enter */
static atomic_int num_inside, num_asleep;

/* Take pieces until none is left. Pieces shrink towards the end, so that all threads end at about the same time. */
static void take_pieces(void) {
  int64_t first = atomic_load(&job_next);
  while (first < job_items) {
    int64_t fair = (job_items - first) / (2 * job_threads), count = fair < job_piece ? fair : job_piece;
    if (count < 1) count = 1;
    if (atomic_compare_exchange_weak(&job_next, &first, first + count)) {
      job_work(job_data, first, count);
      first = atomic_load(&job_next);
    }
  }
}

static void *be_worker(void *argument) {
  int64_t number = (int64_t)(intptr_t)argument; /* from 1 on; the caller's thread is 0 */
  unsigned seen = 0;
  for (;;) {
    int spins = 0;
    while (atomic_load(&job_number) == seen) {
      if (++spins < SPINS) {
        relax();
        continue;
      }
      pthread_mutex_lock(&lock);
      atomic_fetch_add(&num_asleep, 1); /* before looking again: a caller counts those asleep after its new number */
      while (atomic_load(&job_number) == seen) pthread_cond_wait(&wake, &lock);
      atomic_fetch_sub(&num_asleep, 1);
      pthread_mutex_unlock(&lock);
    }
    seen = atomic_load(&job_number);
    atomic_fetch_add(&num_inside, 1); /* before looking whether it is open: a caller looks the other way round */
    if (atomic_load(&is_open) && number < job_threads) take_pieces();
    atomic_fetch_sub(&num_inside, 1);
  }
  return NULL;
}

/* A child has the calling thread only: it begins without workers. */
static void forget_workers(void) {
  pthread_mutex_init(&lock, NULL);
  pthread_cond_init(&wake, NULL);
  num_workers = 0;
  atomic_store(&num_inside, 0);
  atomic_store(&num_asleep, 0);
  atomic_store(&is_open, 0);
  atomic_flag_clear(&is_busy);
}

static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork(void) { pthread_mutex_unlock(&lock); }

static void have_workers(int64_t wanted) {
  static int is_registered;
  if (wanted > MAX_WORKERS) wanted = MAX_WORKERS;
  if (num_workers >= wanted) return;
  pthread_mutex_lock(&lock);
  if (!is_registered) {
    pthread_atfork(before_fork, after_fork, forget_workers);
    is_registered = 1;
  }
  while (num_workers < wanted) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, be_worker, (void *)(intptr_t)(num_workers + 1))) break; /* fewer will do */
    pthread_detach(thread);
    num_workers++;
  }
  pthread_mutex_unlock(&lock);
}

void run_job(work_fn *work, void *job, int64_t items, int64_t piece, int64_t threads) {
  if (threads <= 1 || items <= 1 || atomic_flag_test_and_set(&is_busy)) {
    for (int64_t first = 0; first < items; first += piece) {
      work(job, first, items - first < piece ? items - first : piece);
    }
    return;
  }
  have_workers(threads - 1);
  job_work = work, job_data = job, job_items = items, job_piece = piece, job_threads = threads;
  atomic_store(&job_next, 0);
  atomic_store(&is_open, 1);
  atomic_fetch_add(&job_number, 1);
  if (atomic_load(&num_asleep)) {
    pthread_mutex_lock(&lock);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
  }
  take_pieces();
  atomic_store(&is_open, 0); /* who is late stays outside */
  for (int spins = 0; atomic_load(&num_inside); spins++) {
    if (spins < SPINS_UNTIL_YIELD) relax();
    else sched_yield();
  }
  atomic_flag_clear(&is_busy);
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
