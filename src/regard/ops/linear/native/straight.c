/* Passes and what is between them as one loop: sums and weights never leave the registers.
 *
 * For runs in which all numbers of a state decay alike, nobody asks for more than one result, and
 * a panel is whole: the forward, and the walks of the backward that are like it. Everything else
 * is `step`'s (`run.h`), in whose terms a walker is taken over and left.
 */
#include "run.h"

/* X = (g X) + sum_j write_j weight_j, row by row, and the sums of what is read. */
INLINE void rows_(
    const int folds, const int reads, const int writes, int64_t rows, const vector *from,
    vector *to, vector g, const Rows *write, vector weight[2][TOKENS][VECTORS], const Rows *read,
    vector sum[2][TOKENS][VECTORS]
) {
    const float *written = write[0].at, *beside = write[1].at, *first = read[0].at, *second = read[1].at;
    for (int64_t row = 0; row < rows; row++) {
        vector x[VECTORS];
        EACH(v, VECTORS) x[v] = from[row * VECTORS + v];
        if (folds) EACH(v, VECTORS) x[v] *= g;
        EACH(j, TOKENS) {
            const float a = written[j * write[0].step + row];
            EACH(v, VECTORS) x[v] += a * weight[0][j][v];
        }
        if (writes > 1) EACH(j, TOKENS) {
            const float a = beside[j * write[1].step + row];
            EACH(v, VECTORS) x[v] += a * weight[1][j][v];
        }
        EACH(v, VECTORS) to[row * VECTORS + v] = x[v];
        EACH(i, TOKENS) {
            const float a = first[i * read[0].step + row];
            EACH(v, VECTORS) sum[0][i][v] += a * x[v];
        }
        if (reads > 1) EACH(i, TOKENS) {
            const float a = second[i * read[1].step + row];
            EACH(v, VECTORS) sum[1][i][v] += a * x[v];
        }
    }
}

INLINE void put_(const Output *to, int64_t t, const vector *x) {
    float *out = to->at + t * to->step;
    EACH(v, VECTORS) {
        vector y = x[v];
        if (to->add) y += v_load(out + v * REGARD_WIDTH);
        v_store(out + v * REGARD_WIDTH, y);
    }
}

/* `sees`: whether `seen` is asked for. */
INLINE void straight_(
    const int sees, const int rule, const int mirror, Walker *w, int64_t first, int64_t last
) {
    const Run *run = w->run;
    Sweep *s = &w->sweep;
    const int corrects = rule == CORRECTS, carries = rule == CARRIES;
    const int reads = sees && corrects ? 2 : 1, writes = carries ? 2 : 1;
    const int64_t stride = w->read.stride;
    const vector *from = w->cleared ? w->nothing : w->state;
    Rows write[2] = {s->write[0], s->write[writes - 1]};
    vector weight[2][TOKENS][VECTORS];
    const Settled *at = run->settled + ((mirror ? last - 1 : first) - run->settled_from);
    const float entering = is_near_one(at->before) ? 1 / at->before : 1;
    EACH(k, writes) EACH(j, TOKENS) EACH(v, VECTORS)
        weight[k][j][v] = s->weight[k][j][v] * entering;
    float after = at->before;
    for (int64_t n = 0; n < last - first; n++, at += mirror ? -1 : 1) {
        const Chunk *here = run->chunks + (mirror ? last - 1 - n : first + n), chunk = *here;
        if (WIDE_ENOUGH && n + AHEAD < last - first)
            fetch(run, here[mirror ? -AHEAD : AHEAD].start);
        if (!mirror && run->ahead[0].at) fetch_block(run, chunk.start);
        if (!mirror && chunk.forgets) {
            EACH(k, writes) EACH(j, TOKENS) EACH(v, VECTORS) weight[k][j][v] = (vector){0};
            from = w->nothing;
        }
        Rows read[2];
        vector sum[2][TOKENS][VECTORS], value[TOKENS][VECTORS], seen[TOKENS][VECTORS];
        if (sees) read[0] = rows_of(run, run->read[0], chunk, w->read.rows[0], stride);
        if (corrects) read[sees] = rows_of(run, run->read[1], chunk, w->read.rows[1], stride);
        if (reads == 1) read[1] = read[0];
        EACH(r, reads) EACH(i, TOKENS) EACH(v, VECTORS) sum[r][i][v] = (vector){0};
        if (at->folds)
            rows_(1, reads, writes, run->rows, from, w->state, v_broadcast(at->before), write,
                  weight, read, sum);
        else
            rows_(0, reads, writes, run->rows, from, w->state, (vector){0}, write, weight, read,
                  sum);
        from = w->state;
        EACH(p, TOKENS) {
            const int i = mirror ? TOKENS - 1 - p : p;
            const int64_t t = chunk.start + i;
            const int there = i < chunk.count;
            const float *given = run->value[0].at + t * run->value[0].step;
            EACH(v, VECTORS) value[p][v] = there ? v_load(given + v * REGARD_WIDTH) : (vector){0};
            if (corrects) EACH(v, VECTORS) {
                value[p][v] += at->missed[p] * sum[sees][i][v];
                EACH(j, p) value[p][v] += at->of[1][p][j] * value[j][v];
            }
            if (corrects && run->missed.at && there) put_(&run->missed, t, value[p]);
            if (!sees) continue;
            EACH(v, VECTORS) {
                seen[p][v] = at->seen[p] * sum[0][i][v];
                EACH(j, p + 1) seen[p][v] += at->of[0][p][j] * value[j][v];
                if (carries) EACH(j, p) seen[p][v] += at->of[1][p][j] * seen[j][v];
            }
            if (there) put_(&run->seen, t, seen[p]);
            if (!carries) continue;
            vector carried[VECTORS];
            EACH(v, VECTORS) carried[v] = at->missed[p] * seen[p][v];
            EACH(v, VECTORS) weight[1][i][v] = -at->leave[p] * carried[v];
            if (there) put_(&run->missed, t, carried);
        }
        EACH(p, TOKENS) EACH(v, VECTORS)
            weight[0][mirror ? TOKENS - 1 - p : p][v] = at->leave[p] * value[p][v];
        EACH(k, writes)
            write[k] = rows_of(run, run->write[k], chunk, w->write.rows[k], w->write.stride);
        if (mirror && chunk.forgets) {
            EACH(k, writes) EACH(j, TOKENS) EACH(v, VECTORS) weight[k][j][v] = (vector){0};
            from = w->nothing;
        }
        after = at->after;
    }
    const float leaving = is_near_one(after) ? after : 1;
    EACH(k, writes) EACH(j, TOKENS) EACH(v, VECTORS)
        s->weight[k][j][v] = weight[k][j][v] * leaving;
    EACH(v, VECTORS) s->decay[v] = v_broadcast(after);
    EACH(k, writes) s->write[k] = write[k];
    w->cleared = from == w->nothing;
}

static void forwards(Walker *w, int64_t first, int64_t last) {
    straight_(1, PLAIN, 0, w, first, last);
}

static void corrected(Walker *w, int64_t first, int64_t last) {
    straight_(1, CORRECTS, 0, w, first, last);
}

static void errors(Walker *w, int64_t first, int64_t last) {
    straight_(0, CORRECTS, 0, w, first, last);
}

static void backwards(Walker *w, int64_t first, int64_t last) {
    straight_(1, PLAIN, 1, w, first, last);
}

static void carried(Walker *w, int64_t first, int64_t last) {
    straight_(1, CARRIES, 1, w, first, last);
}

Straight straight_of(const Run *run) {
    if (!run->settled || run->columns != COLUMNS || run->decay > ONE_DECAY) return 0;
    if (run->mirror) return run->rule == CARRIES ? carried : backwards;
    if (run->rule != CORRECTS) return forwards;
    return run->blind ? errors : corrected;
}
