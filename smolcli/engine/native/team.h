/* A team of threads that runs programs: sequences of operations, each of which consists of independent
   items. See team.c. */

#ifndef SMOL_TEAM_H
#define SMOL_TEAM_H

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

typedef struct Team Team;

typedef struct {
    /* Number of items of operation `op`; may be 0. Negative: the program ends before `op`. */
    int (*num_items)(const void *work, int op);
    /* Computes one item. `worker` is the calling thread's index, so it can select scratch space; results
       must not depend on it. */
    void (*compute)(const void *work, int op, int item, int worker);
} Program;

typedef enum { TEAM_OK = 0, TEAM_FORKED = 1, TEAM_BUSY = 2 } TeamStatus;

/* Creates a team of `num_threads` threads, including the caller of `team_run`. NULL on failure. */
Team *team_create(int num_threads);

/* Stops the threads and frees the team. Does nothing in a forked child, which has no such threads. */
void team_destroy(Team *team);

int team_num_threads(const Team *team);

/* Computes a program and returns when all of its items are done.

   TEAM_FORKED: the process was forked since the team was created; nothing was computed.
   TEAM_BUSY: another thread is inside `team_run` with this team; nothing was computed. */
TeamStatus team_run(Team *team, const Program *program, const void *work);

#endif
