/* A team of threads that computes programs: operations one after the other, each a number of
   independent items. See team.c. */

#ifndef SMOL_TEAM_H
#define SMOL_TEAM_H

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

typedef struct Team Team;

typedef struct {
    /* Number of items of operation `op`; may be 0. Negative: the program has no such operation. */
    int (*num_items)(const void *work, int op);
    /* Computes one item. `worker` is less than the number of threads and no other thread uses it at
       the same time, so it can select scratch space; results must not depend on it. */
    void (*compute)(const void *work, int op, int item, int worker);
} Program;

typedef enum { TEAM_OK = 0, TEAM_FORKED = 1, TEAM_BUSY = 2 } TeamStatus;

/* A team of `num_threads` threads, the caller of `team_run` included; NULL if they cannot start. */
Team *team_create(int num_threads);

/* Ends the threads. In a forked child there are none to end and the memory is left alone. */
void team_destroy(Team *team);

int team_num_threads(const Team *team);

/* Computes a program and returns when all of its items are done.

   TEAM_FORKED: the process was forked since the team was created; nothing was computed.
   TEAM_BUSY: another thread is inside `team_run` with this team; nothing was computed. */
TeamStatus team_run(Team *team, const Program *program, const void *work);

#endif
