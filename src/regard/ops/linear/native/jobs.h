/* Heads among threads: one head each, or all threads on one head after the other. */
#ifndef LINEAR_JOBS_H
#define LINEAR_JOBS_H

#include "head.h"

typedef void (*HeadJob)(
    const Call *call, Head *head, Worker *worker, const Crew *crew, int64_t b, int64_t h
);

typedef struct {
    Team team;
    const Call *call;
    HeadJob job;
    int64_t heads, next, together; /* per batch element; counter; all threads on one head */
    Head head[REGARD_MOST_THREADS];
    Worker worker[REGARD_MOST_THREADS];
} Jobs;

static void work_on_heads(void *shared, int64_t thread) {
    Jobs *jobs = shared;
    const Call *call = jobs->call;
    const int64_t count = call->batch * jobs->heads;
    Worker *worker = jobs->worker + thread;
    ready_worker(call, worker);
    if (jobs->together) {
        const Crew crew = {&jobs->team, thread, jobs->team.count};
        for (int64_t n = 0; n < count; n++) {
            crew_wait(&crew);
            jobs->job(call, jobs->head, worker, &crew, n / jobs->heads, n % jobs->heads);
        }
        return;
    }
    const Crew crew = {0, 0, 1};
    int64_t n;
    while ((n = take_next(&jobs->next)) < count)
        jobs->job(call, jobs->head + thread, worker, &crew, n / jobs->heads, n % jobs->heads);
}

/* Runs `job` for all of `heads` heads of every batch element; REGARD_NO_MEMORY without memory. */
static int64_t run_heads(const Call *call, int64_t heads, int backward, HeadJob job) {
    int64_t threads = call->threads < 1 ? 1 : call->threads;
    if (threads > REGARD_MOST_THREADS) threads = REGARD_MOST_THREADS;
    const int64_t count = call->batch * heads;
    const int together = threads > 1 && count % threads && count < 4 * threads;
    Jobs *jobs = aligned_block(sizeof(Jobs)); /* holds vectors */
    if (!jobs) return REGARD_NO_MEMORY;
    memset(jobs, 0, sizeof(Jobs));
    char *block = 0, *at = 0;
    for (int pass = 0; pass < 2; pass++) { /* measure, then cut */
        at = block;
        for (int64_t i = 0; i < (together ? 1 : threads); i++)
            jobs->head[i] = cut_head(call, backward, together, &at);
        for (int64_t i = 0; i < threads; i++)
            jobs->worker[i] = cut_worker(call, backward, &at, pass);
        if (pass == 0) block = aligned_block((int64_t)(intptr_t)at);
        if (!block) {
            free_block(jobs);
            return REGARD_NO_MEMORY;
        }
    }
    jobs->call = call, jobs->job = job, jobs->heads = heads, jobs->together = together;
    run_team(&jobs->team, threads, work_on_heads, jobs);
    free_block(block);
    free_block(jobs);
    return 0;
}

#endif
