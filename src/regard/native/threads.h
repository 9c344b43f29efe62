/* A few threads for the length of one call: created, joined, nothing kept that dies in a fork.
 *
 * The caller is one of them. Work is handed out by shared counters, so results must not depend on
 * who does what. Creating and joining a thread costs about 20 us: below a millisecond of work use
 * one.
 */
#ifndef REGARD_THREADS_H
#define REGARD_THREADS_H

#include <pthread.h>
#include <stdint.h>

#define REGARD_MOST_THREADS 256

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int64_t count;   /* threads that take part; 0 until all have been started */
    int64_t waiting; /* at the barrier */
    int64_t round;   /* how often the barrier has opened */
    void (*work)(void *shared, int64_t thread);
    void *shared;
} Team;

typedef struct {
    Team *team;
    int64_t thread;
} Member;

/* The next number of a counter that starts at 0. */
static inline int64_t take_next(int64_t *counter) {
    return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

/* Waits for all threads of the team; what they wrote before is seen by all afterwards. */
static inline void team_barrier(Team *team) {
    if (team->count <= 1) return;
    pthread_mutex_lock(&team->lock);
    const int64_t round = team->round;
    if (++team->waiting == team->count) {
        team->waiting = 0;
        team->round++;
        pthread_cond_broadcast(&team->changed);
    } else {
        while (team->round == round) pthread_cond_wait(&team->changed, &team->lock);
    }
    pthread_mutex_unlock(&team->lock);
}

static void *team_member(void *argument) {
    Member *member = argument;
    Team *team = member->team;
    pthread_mutex_lock(&team->lock);
    while (team->count == 0) pthread_cond_wait(&team->changed, &team->lock);
    pthread_mutex_unlock(&team->lock);
    team->work(team->shared, member->thread);
    return 0;
}

/* Runs work(shared, 0), ..., work(shared, threads - 1) at the same time. `team` must be where
 * the work finds it, for its barrier. Where the system gives fewer threads, fewer run: the work
 * may count on nothing but numbers from 0 to team->count - 1. */
static inline void run_team(
    Team *team, int64_t threads, void (*work)(void *shared, int64_t thread), void *shared
) {
    team->work = work;
    team->shared = shared;
    team->waiting = team->round = 0;
    if (threads > REGARD_MOST_THREADS) threads = REGARD_MOST_THREADS;
    if (threads <= 1) {
        team->count = 1;
        work(shared, 0);
        return;
    }
    pthread_t handles[REGARD_MOST_THREADS];
    Member members[REGARD_MOST_THREADS];
    int64_t started = 1;
    team->count = 0;
    pthread_mutex_init(&team->lock, 0);
    pthread_cond_init(&team->changed, 0);
    for (; started < threads; started++) {
        members[started] = (Member){team, started};
        if (pthread_create(&handles[started], 0, team_member, &members[started])) break;
    }
    pthread_mutex_lock(&team->lock);
    team->count = started;
    pthread_cond_broadcast(&team->changed);
    pthread_mutex_unlock(&team->lock);
    work(shared, 0);
    for (int64_t i = 1; i < started; i++) pthread_join(handles[i], 0);
    pthread_cond_destroy(&team->changed);
    pthread_mutex_destroy(&team->lock);
}

#endif
