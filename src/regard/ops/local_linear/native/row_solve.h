/* (C + lambda I) g = kbar - q for the few rows of one key head, by passes over the cache.
 *
 * Threads may share the chunks of each pass: the first of them leads, the others follow.
 */
#ifndef LOCAL_LINEAR_ROW_SOLVE_H
#define LOCAL_LINEAR_ROW_SOLVE_H

#include "chunk.h"
#include "threads.h"

/* Cholesky: a = U^T U, of which the upper triangle is read and written, in rows of `padded`;
 * 0 where a pivot is below `least`, which bounds every exact one. */
static int factorise(float *restrict a, int64_t D, int64_t padded, float least) {
    for (int64_t k = 0; k < D; k++) {
        float *restrict pivot = a + k * padded;
        if (!(pivot[k] >= least && pivot[k] < INFINITY)) return 0;
        const float inverse = 1 / sqrtf(pivot[k]);
        for (int64_t c = k; c < D; c++) pivot[c] *= inverse;
        for (int64_t i = k + 1; i < D; i++) {
            float *restrict row = a + i * padded;
            const float factor = pivot[i];
            for (int64_t c = i; c < D; c++) row[c] -= factor * pivot[c];
        }
    }
    return 1;
}

/* x of U^T U x = b. */
static void substitute(
    const float *restrict u, const float *restrict b, float *restrict x, int64_t D, int64_t padded
) {
    memcpy(x, b, padded * sizeof(float));
    for (int64_t k = 0; k < D; k++) {
        const float *restrict row = u + k * padded;
        const float z = x[k] /= row[k];
        for (int64_t c = k + 1; c < D; c++) x[c] -= z * row[c];
    }
    for (int64_t k = D - 1; k >= 0; k--) {
        const float *restrict row = u + k * padded;
        float sum = x[k];
        for (int64_t c = k + 1; c < D; c++) sum -= row[c] * x[c];
        x[k] = sum / row[k];
    }
}

/* How the threads that serve one head work together: the first leads, the others follow. */
typedef struct {
    Head head;
    Team *team;       /* NULL: alone */
    int64_t next;     /* chunk */
    char *scratch;
    int64_t scratch_bytes;
} Task;

enum { STOP = -1 };

static void do_chunks(Task *task, int64_t thread) {
    float *scratch = (float *)(task->scratch + thread * task->scratch_bytes);
    for (int64_t c; (c = take_next(&task->next)) < task->head.chunks;)
        do_chunk(&task->head, c, scratch);
}

static void do_phase(Task *task, int64_t thread, int64_t phase) {
    task->head.phase = phase;
    task->next = 0;
    if (!task->team) {
        do_chunks(task, thread);
        return;
    }
    team_barrier(task->team);
    if (phase == STOP) return;
    do_chunks(task, thread);
    team_barrier(task->team);
}

static void follow(Task *task, int64_t thread) {
    for (;;) {
        team_barrier(task->team);
        if (task->head.phase == STOP) return;
        do_chunks(task, thread);
        team_barrier(task->team);
    }
}

/* y = (C + lambda I) x for every active row, with x in `row->x`. */
static void apply(Task *task, int64_t thread) {
    Head *h = &task->head;
    for (int64_t r = 0; r < h->rows; r++) {
        Row *row = h->row + r;
        row->constant = dot(row->x, row->mean, h->padded);
    }
    do_phase(task, thread, COVARIANCE);
    for (int64_t r = 0; r < h->rows; r++) {
        Row *row = h->row + r;
        if (!row->active) continue;
        merge(h, r, row->applied, -1, h->padded); /* the phase gives (c - x . k) k */
        /* Exactly the (c - x . k) sum to 0: what rounding left of them is taken off the second
         * factor as well. */
        if (h->call->precise) add(row->applied, sum_of(h, r), row->mean, h->padded);
        add(row->applied, row->ridge, row->x, h->padded);
    }
}

static int all_finite(const float *x, int64_t count) {
    for (int64_t c = 0; c < count; c++)
        if (!isfinite(x[c])) return 0;
    return 1;
}

/* Conjugate gradients from 0, each row minding only itself (cg.py says more). */
static void iterate(Task *task, int64_t thread, float *residual, int32_t *steps, uint8_t *failed) {
    Head *h = &task->head;
    const Call *call = h->call;
    const int64_t padded = h->padded;
    const float tol = (float)call->tol;
    float size[h->rows], start[h->rows];
    int any = 0;
    for (int64_t r = 0; r < h->rows; r++) {
        Row *row = h->row + r;
        memset(row->g, 0, padded * sizeof(float));
        memcpy(row->rest, row->right, padded * sizeof(float));
        memcpy(row->x, row->right, padded * sizeof(float));
        size[r] = start[r] = dot(row->right, row->right, padded);
        row->active = size[r] > start[r] * tol * tol && size[r] < INFINITY;
        any |= row->active;
        steps[r] = 0;
    }
    for (int64_t i = 0; i < call->max_iters && any; i++) {
        apply(task, thread);
        any = 0;
        for (int64_t r = 0; r < h->rows; r++) {
            Row *row = h->row + r;
            if (!row->active) continue;
            const float curvature = dot(row->x, row->applied, padded);
            row->active = curvature > 0 && curvature < INFINITY;
            if (!row->active) continue;
            const float step = size[r] / curvature;
            add(row->g, step, row->x, padded);
            add(row->rest, -step, row->applied, padded);
            const float now = dot(row->rest, row->rest, padded);
            const float ratio = now / size[r];
            for (int64_t c = 0; c < padded; c++) row->x[c] = row->rest[c] + ratio * row->x[c];
            steps[r]++;
            size[r] = now;
            row->active = now > start[r] * tol * tol && now < INFINITY;
            any |= row->active;
        }
    }
    for (int64_t r = 0; r < h->rows; r++) {
        Row *row = h->row + r;
        const int solved =
            all_finite(row->g, padded) && !(steps[r] >= call->channels && size[r] > start[r]);
        if (!solved) memset(row->g, 0, padded * sizeof(float));
        residual[r] = !solved ? 1 : start[r] > 0 ? sqrtf(size[r] / start[r]) : 0;
        failed[r] = residual[r] > tol * (1 + 1e-5f);
    }
}

/* By a Cholesky factor of the covariance, refined once (solve.py says more). */
static void solve_directly(
    Task *task, int64_t thread, float *residual, int32_t *steps, uint8_t *failed
) {
    Head *h = &task->head;
    const int64_t padded = h->padded, D = h->call->channels;
    int sound[h->rows];
    for (int64_t r = 0; r < h->rows; r++) {
        Row *row = h->row + r;
        float *all = h->part[r].moments; /* of the first chunk */
        const float first = share(row, h->part + r);
        for (int64_t c = 0; c < padded * padded; c++) all[c] = first == 0 ? 0 : all[c] * first;
        for (int64_t n = 1; n < h->chunks; n++) {
            const Part *part = h->part + n * h->rows + r;
            const float times = share(row, part);
            if (times != 0) add(all, times, part->moments, padded * padded);
        }
        for (int64_t a = 0; a < D; a++) {
            for (int64_t c = a; c < D; c++) all[a * padded + c] -= row->mean[a] * row->mean[c];
            all[a * padded + a] += row->ridge;
        }
        sound[r] = factorise(all, D, padded, row->ridge / 2);
        if (sound[r]) substitute(all, row->right, row->g, D, padded);
        else memset(row->g, 0, padded * sizeof(float));
        memcpy(row->x, row->g, padded * sizeof(float));
        row->active = row->some;
    }
    apply(task, thread);
    for (int64_t r = 0; r < h->rows; r++) {
        Row *row = h->row + r;
        steps[r] = 0;
        const float size = sqrtf(dot(row->right, row->right, padded));
        const int nothing = size == 0;
        float left = 1;
        int good = 0;
        if (row->some && !nothing && sound[r]) {
            for (int64_t c = 0; c < padded; c++) row->rest[c] = row->right[c] - row->applied[c];
            left = sqrtf(dot(row->rest, row->rest, padded)) / size;
            substitute(h->part[r].moments, row->rest, row->x, D, padded);
            add(row->g, 1, row->x, padded);
            good = left < 1e-2f && all_finite(row->g, padded);
        }
        if (!good) memset(row->g, 0, padded * sizeof(float));
        residual[r] = good ? left : nothing ? 0 : 1;
        failed[r] = !(good || nothing);
    }
}

#endif
