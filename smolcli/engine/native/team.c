/* A thread team without barriers.

   An operation is complete when its items are, not when all threads have arrived. A thread that loses
   its core to another program delays the others only by the item that it is computing, never by work
   that it has not started.

   Each thread owns a contiguous range of the items of an operation, so that it streams through
   memory, and claims them one at a time from the front. A thread whose range is empty waits for the
   operation to complete; after a short wait, it steals the second half of another thread's remaining
   range. The thread that completes the last item of an operation publishes the next one.

   A range is one 64-bit word: the number of its operation, its first item and its end. Every claim is a
   compare-and-swap of that word, so a thread that slept through the end of an operation cannot claim an
   item of the next one by mistake. A word with an older number means the whole range that its thread
   owns, so the words need no reset between operations.

   A claimed item keeps its operation from completing, and thereby its `work` alive. Threads access
   `work` only while they hold a claim, so it need not be copied.

   Waiting threads spin briefly and then sleep until the next operation is published (futex on Linux,
   WaitOnAddress on Windows, a condition variable elsewhere). Spinning or yielding any longer would use
   up time slices that the team needs on a busy machine.

   Memory ordering. Storing `current` publishes an operation: release makes its fields of the Team and the
   results of earlier operations visible to every thread that loads the new value with acquire. Subtracting
   from `num_unfinished` is acquire and release, so the thread that reaches 0, which publishes the next
   operation, has seen the results of all others. A range word says everything about its range, so loads of
   it may be relaxed: a claim based on an old value fails in the compare-and-swap. Only the pair `current`
   and `num_sleeping` needs sequential consistency; see `sleep_while`. */

#if !defined(_WIN32)
#define _GNU_SOURCE
#endif
#include "team.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#include <windows.h>
#else
#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif
#endif

/* Stealing at once would break up the sequential reads of a thread that is about to finish; waiting longer
   wastes a core while the other thread lacks one. */
static const int64_t STEAL_AFTER_NS = 3 * 1000;
static const int64_t SLEEP_AFTER_NS = 50 * 1000;
enum {
    PAUSES_PER_CLOCK_READ = 16,
    MAX_CHUNKS = 65535, /* fits into 16 bits of a range word */
    MAX_THREADS = 1024,
    LINE_PAIR_BYTES = 128 /* between words of different threads: some CPUs fetch cache lines in pairs */
};

/* A thread's range of chunks, as packed by `range_word`. */
typedef struct {
    _Alignas(LINE_PAIR_BYTES) _Atomic uint64_t range;
} Slot;

typedef struct {
    Team *team;
    int worker;
} Helper;

struct Team {
    /* The operation being computed: its number, which counts operations of all programs, in the low 32
       bits, and how many chunks it has in the high 32 bits. 0 chunks: no program is running. */
    _Alignas(LINE_PAIR_BYTES) _Atomic uint64_t current;
    _Alignas(LINE_PAIR_BYTES) _Atomic int32_t num_unfinished; /* chunks of `current` that are not done */
    _Alignas(LINE_PAIR_BYTES) _Atomic int32_t num_sleeping;
    _Atomic int32_t is_stopping;
    _Atomic int32_t is_running;

    /* The operation `current`; written by the thread that publishes it, read by threads that hold a claim. */
    _Alignas(LINE_PAIR_BYTES) const Program *program;
    const void *work;
    int op; /* index in the program */
    int num_items, grain; /* a chunk is `grain` items: 1, unless there are more than MAX_CHUNKS */

    int num_threads, num_started;
    int64_t owner_pid;
    Helper *helpers;
#if defined(_WIN32)
    HANDLE *threads;
#else
    pthread_t *threads;
#if !defined(__linux__)
    pthread_mutex_t mutex;
    pthread_cond_t changed;
#endif
#endif
    Slot *slots;
};

/* ---- The operating system: clock, pause, sleep and wake, threads ---- */

static inline void cpu_pause(void) {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb"); /* `yield` is a no-op on cores without SMT */
#endif
}

static int64_t now_ns(void) {
#if defined(_WIN32)
    LARGE_INTEGER count, frequency;
    QueryPerformanceCounter(&count);
    QueryPerformanceFrequency(&frequency);
    return (int64_t)(1e9 * (double)count.QuadPart / (double)frequency.QuadPart);
#else
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
#endif
}

static int64_t process_id(void) {
#if defined(_WIN32)
    return GetCurrentProcessId();
#else
    return getpid();
#endif
}

#if defined(__linux__)
/* The word that a futex waits on: the number of the current operation. */
static uint32_t *number_word(Team *team) {
    uint32_t *halves = (uint32_t *)&team->current;
    return halves + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__);
}
#endif

/* Sleeps until an operation other than `seen` is published; may return early.

   No wake-up is lost: a sleeper increments `num_sleeping` before it compares `current` with `seen`, a
   publisher stores `current` before it reads `num_sleeping`, and both are sequentially consistent, so at
   least one of them sees the change of the other. */
static void sleep_while(Team *team, uint64_t seen) {
    atomic_fetch_add(&team->num_sleeping, 1);
#if defined(_WIN32)
    WaitOnAddress((volatile void *)&team->current, &seen, sizeof seen, INFINITE);
#elif defined(__linux__)
    syscall(SYS_futex, number_word(team), FUTEX_WAIT_PRIVATE, (uint32_t)seen, NULL, NULL, 0);
#else
    pthread_mutex_lock(&team->mutex);
    while (atomic_load(&team->current) == seen) pthread_cond_wait(&team->changed, &team->mutex);
    pthread_mutex_unlock(&team->mutex);
#endif
    atomic_fetch_sub(&team->num_sleeping, 1);
}

/* Wakes all sleeping threads; called after `current` has changed. */
static void wake_sleepers(Team *team) {
    if (atomic_load(&team->num_sleeping) == 0) return;
#if defined(_WIN32)
    WakeByAddressAll((void *)&team->current);
#elif defined(__linux__)
    syscall(SYS_futex, number_word(team), FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#else
    pthread_mutex_lock(&team->mutex);
    pthread_cond_broadcast(&team->changed);
    pthread_mutex_unlock(&team->mutex);
#endif
}

/* ---- Claiming the items of operations ---- */

static inline uint32_t number_of(uint64_t current) { return (uint32_t)current; }
static inline uint32_t chunks_of(uint64_t current) { return (uint32_t)(current >> 32); }

/* From the lowest bits: 32 of the operation's number, 16 of the first chunk, 16 of the end. */
static inline uint64_t range_word(uint32_t number, uint32_t first, uint32_t end) {
    return number | (uint64_t)first << 32 | (uint64_t)end << 48;
}

typedef struct {
    uint32_t first, end;
} Range;

/* What remains of the range of thread `owner` in operation `current`, according to its word. Empty if the
   word is of a later operation. Numbers wrap around, so their signed difference tells which is later. */
static Range remaining_range(const Team *team, int owner, uint64_t current, uint64_t word) {
    uint32_t number = (uint32_t)word;
    if (number == number_of(current)) return (Range){word >> 32 & 0xffff, word >> 48};
    if ((int32_t)(number_of(current) - number) < 0) return (Range){0, 0};
    uint64_t chunks = chunks_of(current), threads = team->num_threads;
    return (Range){owner * chunks / threads, (owner + 1) * chunks / threads};
}

/* Claims the first chunk of the worker's own range. Returns it, or -1 if the range is empty. */
static int claim_own(Team *team, int worker, uint64_t current) {
    _Atomic uint64_t *slot = &team->slots[worker].range;
    uint64_t word = atomic_load_explicit(slot, memory_order_relaxed);
    for (;;) {
        Range remaining = remaining_range(team, worker, current, word);
        if (remaining.first >= remaining.end) return -1;
        uint64_t rest = range_word(number_of(current), remaining.first + 1, remaining.end);
        if (atomic_compare_exchange_weak_explicit(slot, &word, rest, memory_order_acq_rel,
                                                  memory_order_relaxed))
            return remaining.first;
    }
}

/* Steals the second half of the longest range: returns its first chunk, and makes the others the
   worker's own range, from which they can be stolen in turn. Returns -1 if nothing is left.

   The worker's own range is empty, and other threads never modify an empty range, so a plain store
   suffices. */
static int steal(Team *team, int worker, uint64_t current) {
    for (;;) {
        int victim = -1;
        uint64_t victim_word = 0;
        Range longest = {0, 0};
        for (int owner = 0; owner < team->num_threads; owner++) {
            uint64_t word = atomic_load_explicit(&team->slots[owner].range, memory_order_relaxed);
            Range remaining = remaining_range(team, owner, current, word);
            if (remaining.end > remaining.first &&
                remaining.end - remaining.first > longest.end - longest.first)
                longest = remaining, victim = owner, victim_word = word;
        }
        if (victim < 0) return -1;
        uint32_t middle = longest.first + (longest.end - longest.first) / 2;
        uint64_t rest = range_word(number_of(current), longest.first, middle);
        if (atomic_compare_exchange_strong(&team->slots[victim].range, &victim_word, rest)) {
            uint64_t own = range_word(number_of(current), middle + 1, longest.end);
            if (victim != worker)
                atomic_store_explicit(&team->slots[worker].range, own, memory_order_release);
            return middle;
        }
    }
}

/* Starts the next operation of the program that has items, or ends the program. */
static void publish_next(Team *team, uint32_t number) {
    int num_items;
    do num_items = team->program->num_items(team->work, ++team->op);
    while (num_items == 0);
    uint64_t num_chunks = 0;
    if (num_items > 0) {
        team->num_items = num_items;
        team->grain = (num_items + MAX_CHUNKS - 1) / MAX_CHUNKS;
        num_chunks = (num_items + team->grain - 1) / team->grain;
    }
    atomic_store_explicit(&team->num_unfinished, (int32_t)num_chunks, memory_order_relaxed);
    atomic_store(&team->current, (uint64_t)(number + 1) | num_chunks << 32);
    wake_sleepers(team);
}

static void compute_chunk(const Team *team, int chunk, int worker) {
    int first = chunk * team->grain, end = first + team->grain;
    if (end > team->num_items) end = team->num_items;
    for (int item = first; item < end; item++)
        team->program->compute(team->work, team->op, item, worker);
}

/* Computes a claimed chunk, then the rest of the worker's own range. */
static void compute_from(Team *team, int worker, uint64_t current, int chunk) {
    int num_done = 0;
    for (; chunk >= 0; chunk = claim_own(team, worker, current)) {
        compute_chunk(team, chunk, worker);
        num_done++;
    }
    if (atomic_fetch_sub_explicit(&team->num_unfinished, num_done, memory_order_acq_rel) == num_done)
        publish_next(team, number_of(current));
}

/* Waits until an operation other than `seen` is published, then returns -1. Steals a chunk of `seen` after
   STEAL_AFTER_NS if it can, and returns that. */
static int wait_or_steal(Team *team, int worker, uint64_t seen) {
    int64_t start = now_ns();
    int may_steal = chunks_of(seen) > 0;
    for (;;) {
        for (int i = 0; i < PAUSES_PER_CLOCK_READ; i++) {
            if (atomic_load_explicit(&team->current, memory_order_acquire) != seen) return -1;
            cpu_pause();
        }
        int64_t waited = now_ns() - start;
        if (may_steal && waited > STEAL_AFTER_NS) {
            int chunk = steal(team, worker, seen);
            if (chunk >= 0) return chunk;
            may_steal = 0; /* all items are claimed; wait for their completion */
        }
        if (waited > SLEEP_AFTER_NS) sleep_while(team, seen);
    }
}

/* Computes operations as they are published: worker 0, the caller of team_run, until its program ends;
   helpers until the team is destroyed. */
static void run_worker(Team *team, int worker) {
    for (;;) {
        uint64_t current = atomic_load_explicit(&team->current, memory_order_acquire);
        int chunk = -1;
        if (chunks_of(current) > 0) {
            chunk = claim_own(team, worker, current);
        } else if (worker == 0 || atomic_load(&team->is_stopping)) {
            return;
        }
        if (chunk < 0) chunk = wait_or_steal(team, worker, current);
        if (chunk >= 0) compute_from(team, worker, current, chunk);
    }
}

TeamStatus team_run(Team *team, const Program *program, const void *work) {
    if (process_id() != team->owner_pid) return TEAM_FORKED;
    if (atomic_exchange(&team->is_running, 1)) return TEAM_BUSY;
    team->program = program, team->work = work, team->op = -1;
    publish_next(team, number_of(atomic_load(&team->current)));
    run_worker(team, 0);
    atomic_store(&team->is_running, 0);
    return TEAM_OK;
}

int team_num_threads(const Team *team) { return team->num_threads; }

/* ---- Creating and destroying a team ---- */

#if defined(_WIN32)
static DWORD WINAPI run_helper(void *argument) {
    const Helper *helper = argument;
    run_worker(helper->team, helper->worker);
    return 0;
}

static int start_thread(Team *team, int worker) {
    HANDLE *thread = team->threads + worker;
    *thread = CreateThread(NULL, 0, run_helper, team->helpers + worker, 0, NULL);
    return *thread != NULL;
}

static void join_thread(Team *team, int worker) {
    WaitForSingleObject(team->threads[worker], INFINITE);
    CloseHandle(team->threads[worker]);
}
#else
static void *run_helper(void *argument) {
    const Helper *helper = argument;
    run_worker(helper->team, helper->worker);
    return NULL;
}

/* Helpers block all signals, which are meant for the host program's own threads. */
static int start_thread(Team *team, int worker) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(team->threads + worker, NULL, run_helper, team->helpers + worker);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error == 0;
}

static void join_thread(Team *team, int worker) { pthread_join(team->threads[worker], NULL); }
#endif

static void *aligned_zeros(size_t size) {
    size = (size + LINE_PAIR_BYTES - 1) / LINE_PAIR_BYTES * LINE_PAIR_BYTES;
#if defined(_WIN32)
    void *memory = _aligned_malloc(size, LINE_PAIR_BYTES);
#else
    void *memory = aligned_alloc(LINE_PAIR_BYTES, size);
#endif
    if (memory) memset(memory, 0, size);
    return memory;
}

static void aligned_free(void *memory) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    free(memory);
#endif
}

EXPORT Team *smol_team_create(int num_threads) { return team_create(num_threads); }
EXPORT void smol_team_destroy(Team *team) { team_destroy(team); }

Team *team_create(int num_threads) {
    if (num_threads < 1 || num_threads > MAX_THREADS) return NULL;
    Team *team = aligned_zeros(sizeof *team);
    if (!team) return NULL;
    team->slots = aligned_zeros(num_threads * sizeof *team->slots);
    team->helpers = calloc(num_threads, sizeof *team->helpers);
    team->threads = calloc(num_threads, sizeof *team->threads);
    team->num_threads = num_threads;
    team->num_started = 1; /* the caller of team_run */
    team->owner_pid = process_id();
#if !defined(_WIN32) && !defined(__linux__)
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->changed, NULL);
#endif
    int has_memory = team->slots && team->helpers && team->threads;
    while (has_memory && team->num_started < num_threads) {
        team->helpers[team->num_started] = (Helper){team, team->num_started};
        if (!start_thread(team, team->num_started)) break;
        team->num_started++;
    }
    if (team->num_started == num_threads) return team;
    team_destroy(team);
    return NULL;
}

void team_destroy(Team *team) {
    if (process_id() != team->owner_pid) return;
    atomic_store(&team->is_stopping, 1);
    atomic_fetch_add(&team->current, 1); /* a new number, still no chunks */
    wake_sleepers(team);
    for (int worker = 1; worker < team->num_started; worker++) join_thread(team, worker);
#if !defined(_WIN32) && !defined(__linux__)
    pthread_cond_destroy(&team->changed);
    pthread_mutex_destroy(&team->mutex);
#endif
    aligned_free(team->slots);
    free(team->helpers);
    free(team->threads);
    aligned_free(team);
}
