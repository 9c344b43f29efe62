/* A panel on its way along the tokens, run of tokens by run of tokens. */
#ifndef LINEAR_RUN_H
#define LINEAR_RUN_H

#include "settle.h"

/* Rows of TOKENS tokens laid out for a pass: `Run.rows` numbers and one extra each. */
typedef struct {
    float *rows[2]; /* [TOKENS][stride] */
    float extra[TOKENS];
    int64_t stride;
} Padded;

/* Chunks that all panels go through before the next ones: their rows stay in the L2 cache. */
#define BLOCK 32

typedef struct Walker Walker;
typedef void (*Straight)(Walker *w, int64_t first, int64_t last);

/* The loop of a run without exceptions, or NULL (`straight.c`). */
#define straight_of REGARD_JOIN(linear_straight_of, REGARD_ISA)
Straight straight_of(const Run *run);

/* A run in progress. */
struct Walker {
    const Run *run;
    Straight straight;
    Pass pass, flush;
    Settle settle;
    vector *state; /* [rows + extra][vectors] */
    const vector *nothing; /* a panel of zeros */
    Padded read, write; /* for chunks that are not full */
    float *prepared;    /* ROW_DECAY: rows times decays, see prepare() */
    int awake;          /* `state` is not all zeros; kept by who needs it */
    int cleared;        /* what is in `state` is forgotten */
    Rows write_extra;
    Sweep sweep;
};

static int64_t row_stride(int64_t rows) { return up_to(rows, REGARD_WIDTH); }

/* Floats of `prepared`: reads, writes (twice 2 kinds) and the whole decay. */
REGARD_SHARED int64_t prepared_floats(int64_t rows) { return (4 * TOKENS + 1) * row_stride(rows); }

REGARD_SHARED void write_nothing(Walker *w) {
    Sweep *s = &w->sweep;
    memset(s->weight, 0, sizeof s->weight);
    for (int i = 0; i < 2; i++) s->write[i] = (Rows){w->run->zeros, 0};
    w->write_extra = (Rows){w->run->zeros, 0};
    EACH(v, VECTORS) s->decay[v] = (vector){0} + 1.0f;
    s->row_decay = w->run->ones;
}

REGARD_SHARED void begin(Walker *w, int dot) {
    const Run *run = w->run;
    const int reads = 1 + (run->second_read && !run->blind);
    w->pass = pass_of(run->decay, reads, 1 + run->second_write, dot, run->vectors);
    w->flush = pass_of(run->decay, 0, 1 + run->second_write, 0, run->vectors);
    w->settle = settle_of(run);
    w->straight = straight_of(run);
    w->cleared = 0;
    write_nothing(w);
}

/* A pass over all rows, the extra one included. */
REGARD_SHARED void pass_over(const Walker *w, Pass pass, Rows read_extra, Sweep *s) {
    const Run *run = w->run;
    s->rows = run->rows;
    pass(s);
    if (!run->extra) return;
    const Rows read = s->read[0], write = s->write[0];
    const vector *from = s->from, *beside = s->beside;
    vector *to = s->to;
    const int64_t offset = run->rows * run->vectors;
    s->rows = 1;
    s->read[0] = read_extra, s->write[0] = w->write_extra;
    s->from += offset, s->to += offset;
    if (beside) s->beside += offset;
    pass(s);
    s->read[0] = read, s->write[0] = write, s->from = from, s->to = to, s->beside = beside;
}

/* Rows of a chunk: as they are where it is full, else with zeros for the tokens that it lacks. */
REGARD_SHARED Rows rows_of(const Run *run, Rows rows, Chunk chunk, float *padded, int64_t stride) {
    const float *at = rows.at + chunk.start * rows.step;
    if (chunk.count == TOKENS) return (Rows){at, rows.step};
    for (int64_t i = 0; i < TOKENS; i++) {
        float *to = padded + i * stride;
        if (i < chunk.count) memcpy(to, at + i * rows.step, (size_t)run->rows * sizeof(float));
        else memset(to, 0, (size_t)run->rows * sizeof(float));
    }
    return (Rows){padded, stride};
}

REGARD_SHARED Rows extra_of(Rows rows, Chunk chunk, float *padded) {
    const float *at = rows.at + chunk.start * rows.step;
    if (chunk.count == TOKENS) return (Rows){at, rows.step};
    for (int64_t i = 0; i < TOKENS; i++) padded[i] = i < chunk.count ? at[i * rows.step] : 0;
    return (Rows){padded, 1};
}

/* to [TOKENS][stride] = rows of the chunk times the decays since it began (their own included),
 * or, `leaving`, until it ends (their own excluded); `whole` gets the product of all. */
REGARD_SHARED void prepare(
    const Run *run, Rows rows, Chunk chunk, int leaving, float *to, int64_t stride, float *whole
) {
    for (int64_t c = 0; c < run->rows; c += REGARD_WIDTH) {
        const int64_t left = run->rows - c;
        vector passed = (vector){0} + 1.0f;
        for (int64_t p = 0; p < TOKENS; p++) {
            const int64_t i = leaving ? TOKENS - 1 - p : p, t = chunk.start + i;
            vector x = {0};
            if (i < chunk.count) {
                const vector factor = v_load(run->factors.at + t * run->factors.step + c);
                if (!leaving) passed *= factor;
                x = part_load(rows.at + t * rows.step + c, left) * passed;
                if (leaving) passed *= factor;
            }
            v_store(to + i * stride + c, x);
        }
        if (whole) v_store(whole + c, passed);
    }
}

/* Zeros where the first token of a chunk forgets, in rows or columns of the state. */
REGARD_SHARED void forget_in(const Run *run, Chunk chunk, vector *state) {
    const float *factor = run->factors.at + chunk.start * run->factors.step;
    const int64_t rows = run->rows + run->extra;
    vector_mask keep[VECTORS];
    if (run->decay == COLUMN_DECAY) for (int v = 0; v < run->vectors; v++)
        keep[v] = (vector_mask)(part_load(factor + v * REGARD_WIDTH,
                                          run->columns - v * REGARD_WIDTH) != (vector){0});
    for (int64_t row = 0; row < rows; row++) for (int v = 0; v < run->vectors; v++) {
        vector *x = state + row * run->vectors + v;
        if (run->decay == COLUMN_DECAY) *x = v_keep(keep[v], *x);
        else if (factor[row] == 0) *x = (vector){0};
    }
}

/* Writes what is pending. */
REGARD_SHARED void flush(Walker *w) {
    Sweep *s = &w->sweep;
    s->from = w->cleared ? w->nothing : w->state;
    s->to = w->state;
    const vector *beside = s->beside;
    s->beside = 0;
    pass_over(w, w->flush, (Rows){w->run->zeros, 0}, s);
    s->beside = beside;
    w->cleared = 0;
    write_nothing(w);
}

/* One chunk. `from`: where the state is, if not in `w->state`; `to`: where it goes likewise. */
REGARD_SHARED void step_between(Walker *w, int64_t c, const vector *from, vector *to) {
    const Run *run = w->run;
    const Chunk chunk = run->chunks[c];
    const int by_row = run->decay == ROW_DECAY;
    const int64_t stride = row_stride(run->rows);
    Sweep *s = &w->sweep;
    if (chunk.forgets && !run->mirror) {
        if (run->decay == ONE_DECAY) {
            write_nothing(w);
            from = w->nothing;
        } else {
            s->from = from, s->to = to;
            pass_over(w, w->flush, (Rows){run->zeros, 0}, s);
            write_nothing(w);
            forget_in(run, chunk, to);
            from = to;
        }
    }
    s->from = from, s->to = to;
    float *prepared = w->prepared;
    for (int i = run->blind; i <= run->second_read; i++) {
        float *padded = w->read.rows[i];
        if (by_row) {
            padded = prepared + i * TOKENS * stride;
            prepare(run, run->read[i], chunk, run->mirror, padded, stride, 0);
            s->read[i] = (Rows){padded, stride};
        } else s->read[i] = rows_of(run, run->read[i], chunk, padded, w->read.stride);
    }
    Rows read_extra = {0, 0};
    if (run->extra) read_extra = extra_of(run->read_extra, chunk, w->read.extra);
    memset(s->sum, 0, sizeof s->sum);
    memset(s->product, 0, sizeof s->product);
    if (run->blind) s->read[0] = s->read[1];
    pass_over(w, w->pass, read_extra, s);
    if (run->blind) {
        memcpy(s->sum[1], s->sum[0], sizeof s->sum[1]);
        memset(s->sum[0], 0, sizeof s->sum[0]);
    }
    for (int r = 0; r <= run->second_read; r++) if (run->silent[r])
        EACH(i, TOKENS) if (i >= chunk.count || run->silent[r][chunk.start + i])
            memset(s->sum[r][i], 0, sizeof s->sum[r][i]);
    w->settle(run, &chunk, run->scores + c, s);
    for (int i = 0; i <= run->second_write; i++) {
        if (by_row) {
            float *at = prepared + (2 + i) * TOKENS * stride;
            float *whole = prepared + 4 * TOKENS * stride;
            prepare(run, run->write[i], chunk, !run->mirror, at, stride, whole);
            s->write[i] = (Rows){at, stride};
            s->row_decay = whole;
        } else s->write[i] = rows_of(run, run->write[i], chunk, w->write.rows[i], w->write.stride);
    }
    if (run->extra) w->write_extra = extra_of(run->write_extra, chunk, w->write.extra);
}

/* One chunk, the state in its place. */
REGARD_SHARED void step(Walker *w, int64_t c) {
    const vector *from = w->cleared ? w->nothing : w->state;
    w->cleared = 0;
    step_between(w, c, from, w->state);
    const Run *run = w->run;
    if (!run->mirror || !run->chunks[c].forgets) return;
    if (run->decay == ONE_DECAY) {
        write_nothing(w);
        w->cleared = 1;
    } else {
        flush(w);
        forget_in(run, run->chunks[c], w->state);
    }
}

/* Asks for the rows of a later block: read at once when it begins, they would be waited for. */
REGARD_SHARED void fetch_block(const Run *run, int64_t start) {
    const int64_t from = start + BLOCK * TOKENS, left = run->tokens - from;
    const int64_t count = left < TOKENS ? left : TOKENS;
    for (int i = 0; i < 2; i++) if (run->ahead[i].at)
        fetch_ahead(run->ahead[i].at + from * run->ahead[i].step, run->ahead[i].step, count,
                    run->width);
}

/* Asks for the columns of a later chunk: beyond the L2 cache every token would wait for its own. */
REGARD_SHARED void fetch(const Run *run, int64_t start) {
    const Output *out = &run->seen;
    for (int64_t t = start; t < start + TOKENS; t++) {
        for (int64_t c = 0; c < run->columns; c += LINE) {
            __builtin_prefetch(run->value[0].at + t * run->value[0].step + c);
            if (out->at) __builtin_prefetch(out->at + t * out->step + c, 1);
        }
    }
}

/* The chunks from `first` to before `last`, in the order of the run. */
REGARD_SHARED void steps(Walker *w, int64_t first, int64_t last) {
    const Chunk *chunks = w->run->chunks;
    if (w->straight) w->straight(w, first, last);
    else if (w->run->mirror) for (int64_t c = last - 1; c >= first; c--) {
        if (WIDE_ENOUGH && c - AHEAD >= first) fetch(w->run, chunks[c - AHEAD].start);
        step(w, c);
    } else for (int64_t c = first; c < last; c++) {
        if (WIDE_ENOUGH && c + AHEAD < last) fetch(w->run, chunks[c + AHEAD].start);
        step(w, c);
    }
}

#endif
