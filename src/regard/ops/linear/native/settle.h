/* What TOKENS tokens that went through a pass together have to do with each other.
 *
 * A pass has read the state as it was before all of them. In the order of the run (`mirror`: from
 * the last token to the first), every token then sees what it is to see of the others:
 *
 *     seen_i  = D_i sum_i     + sum_{j <= i} D_ij M_ij value_j  + sum_{j < i} D_ij N_ij second_j
 *     missed_i = D_i sum'_i   + sum_{j < i} D_ij N_ij value_j
 *
 * with D the products of decays in between and M, N the products of rows (`Scores`). `seen` reads
 * with its own write, `missed` just before it. Three rules say what is written:
 *
 *     PLAIN      values are given
 *     CORRECTS   value_i = beta_i (given_i - missed_i): the delta rule
 *     CARRIES    second_i = -beta_i seen_i: the same rule seen from behind, for gradients
 */
#ifndef LINEAR_SETTLE_H
#define LINEAR_SETTLE_H

#include "straight.h"

enum { PLAIN, CORRECTS, CARRIES };

typedef struct {
    float *at; /* NULL: nobody asks */
    int64_t step;
    const float *scale; /* per token, or NULL */
    int64_t add;
} Output;

/* One panel of a state on its way along the tokens. Rows are indexed by token. */
typedef struct {
    int64_t rows, columns;
    int vectors, mirror, rule, decay; /* decay: of `sweep.h` */
    int second_read, second_write;
    int blind;               /* with two reads: only the second one, nobody asks for `seen` */
    Rows read[2], write[2];  /* ROW_DECAY takes them from `prepared` instead */
    int extra;               /* one more row of the state: the sum of weights */
    Rows read_extra, write_extra;
    Rows value[2];           /* at the panel's first column */
    const float *value_scale[2], *beta;
    const float *factor;     /* ONE_DECAY: per token */
    Rows factors;            /* COLUMN_DECAY at the panel's first column, ROW_DECAY at row 0 */
    const Chunk *chunks;
    const Scores *scores;
    const float *zeros, *ones; /* as long as any row */
    Output seen, missed;       /* `missed` of CORRECTS is given - missed; of CARRIES, beta seen */
    const uint8_t *silent[2];  /* tokens whose reads are all zero: what they meet may be infinite */
    int keeps;                 /* leaves D sum in `sweep.sum` */
    const Settled *settled;    /* of chunks from `settled_from` on, where the run is straight */
    int64_t settled_from;
    Rows ahead[2];             /* rows of all tokens that a later block is made of, or of NULL */
    int64_t tokens, width;     /* of `ahead` */
} Run;

INLINE void lane_load(const Run *run, Rows rows, int64_t t, const int vectors, vector *x) {
    const float *at = rows.at + t * rows.step;
    EACH(v, vectors) x[v] = part_load(at + v * REGARD_WIDTH, run->columns - v * REGARD_WIDTH);
}

INLINE void lane_put(
    const Run *run, const Output *out, int64_t t, const int vectors, const vector *x
) {
    if (!out->at) return;
    float *at = out->at + t * out->step;
    EACH(v, vectors) {
        const int64_t left = run->columns - v * REGARD_WIDTH;
        vector y = x[v];
        if (out->scale) y *= out->scale[t];
        if (out->add) y += part_load(at + v * REGARD_WIDTH, left);
        part_store(at + v * REGARD_WIDTH, y, left);
    }
}

typedef void (*Settle)(const Run *run, const Chunk *chunk, const Scores *scores, Sweep *s);

#define settle_of REGARD_JOIN(linear_settle_of, REGARD_ISA)
Settle settle_of(const Run *run);

#endif
