/* One chunk of a cache for the rows of one key head, and what the chunks come to together.
 *
 *   SCORES      p_j = 2^(s_j - shift) of the chunk's keys, their sum and sum_j p_j k_j
 *   COVARIANCE  sum_j p_j (kbar - k_j) . x k_j: one iteration of conjugate gradients
 *   OUTPUT      sum_j p_j (1 - g . (k_j - kbar)) v_j
 *
 * Chunks are cut at fixed places and merged in order, so that a result depends neither on the
 * number of threads nor on other rows.
 */
#ifndef LOCAL_LINEAR_CHUNK_H
#define LOCAL_LINEAR_CHUNK_H

#include <math.h>

#include "call.h"
#include "exp.h"
#include "rows.h"

#define CHUNK 4096 /* keys: a multiple of BLOCK */
#define LAZY 40.0f /* bits by which a score may exceed the shift before sums are scaled anew */
#define LOG2E ((float)REGARD_LOG2E)

enum { SCORES, COVARIANCE, OUTPUT };

/* One query row. Vectors are padded with zeros to whole registers. */
typedef struct {
    int64_t head, at;       /* query head, and place of the row in [B, H, T] */
    int64_t low, high;      /* visible keys by position and decay */
    const float *bias;      /* of the keys, or NULL */
    const double *decay;    /* likewise; */
    double decayed;         /* the sum at the row's own position */
    float *x;               /* what the keys are multiplied with: scaled q, direction, g */
    float constant;         /* taken from the product */
    float *q, *mean, *right, *g, *rest, *applied, *values;
    float shift, inverse, ridge, lse, at_mean;
    int some, active;       /* whether it sees a key; whether it takes part in a phase */
    float *p, *product;     /* weights, and probe . k_j where g is given; one per key */
} Row;

/* What a chunk of keys adds to a row. */
typedef struct {
    float shift, sum, products;
    float *total; /* [D or Dv, padded] */
    float *moments; /* [D, D padded] where the solve is direct */
} Part;

typedef struct {
    const Call *call;
    int64_t b, head; /* key head */
    Source keys, values;
    const uint8_t *mask; /* of the keys, or NULL */
    int64_t mask_step;
    int64_t rows, first_chunk, chunks, padded, padded_v, phase;
    const float *centre;
    Row *row;
    Part *part; /* [chunks][rows] */
} Head;

/* Which of W keys from `j` on a row sees. */
static inline vector_mask seen(const Row *row, const uint8_t *mask, int64_t mask_s, int64_t j) {
    int32_t lanes[W];
    for (int i = 0; i < W; i++)
        lanes[i] = -(j + i >= row->low && j + i < row->high && (!mask || mask[(j + i) * mask_s]));
    vector_mask all;
    memcpy(&all, lanes, sizeof all);
    return all;
}

/* Weights of a block of keys, relative to the chunk's shift, added to `sum`; where g is given, its
 * products with the keys as well. */
static void weigh(
    const Head *h, Row *row, Part *part, Rows keys, int64_t from, int64_t start, vector *sum,
    vector *products
) {
    const Call *call = h->call;
    const int edge = h->mask || from < row->low || from + BLOCK > row->high;
    vector score[BLOCK / W];
    vector_mask sees[BLOCK / W];
    float top = -INFINITY;
    for (int i = 0; i < BLOCK / W; i++) {
        const int64_t j = from + i * W;
        score[i] = dots(rows_from(keys, i * W), h->padded, row->q);
        sees[i] = edge ? seen(row, h->mask, h->mask_step, j) : (vector_mask){0} - 1;
        if (row->bias || row->decay) {
            float add[W] = {0};
            for (int l = 0; l < W; l++) {
                if (edge && !sees[i][l]) continue; /* it may lie beyond the keys */
                if (row->decay)
                    add[l] = (float)(row->decayed - row->decay[(j + l) * call->decay_sums.row]);
                if (row->bias) add[l] += row->bias[(j + l) * call->key_bias.row];
            }
            score[i] += v_load(add) * LOG2E;
        }
        score[i] = v_select(sees[i], score[i], v_broadcast(-INFINITY));
        top = fmaxf(top, v_top(score[i]));
    }
    if (top == -INFINITY) {
        int lost = 0; /* NaN, which is no maximum */
        for (int i = 0; i < BLOCK / W; i++) lost |= v_any((vector_mask)(score[i] != score[i]));
        if (!lost) {
            for (int i = 0; i < BLOCK / W; i++) v_store(row->p + from + i * W, (vector){0});
            return;
        }
        top = 0;
    }
    if (part->shift == -INFINITY) {
        part->shift = top;
    } else if (top > part->shift + LAZY) {
        const float factor = exp2f(part->shift - top);
        part->shift = top;
        *sum *= factor, *products *= factor;
        for (int64_t j = start; j < from; j++) row->p[j] *= factor;
        for (int64_t c = 0; c < h->padded; c++) part->total[c] *= factor;
        if (part->moments)
            for (int64_t c = 0; c < h->padded * h->padded; c++) part->moments[c] *= factor;
    }
    for (int i = 0; i < BLOCK / W; i++) {
        const vector p = v_keep(sees[i], v_exp2(score[i] - part->shift));
        v_store(row->p + from + i * W, p);
        *sum += p;
        if (row->product) {
            const vector product = dots(rows_from(keys, i * W), h->padded, row->x);
            v_store(row->product + from + i * W, v_keep(sees[i], product));
            *products += v_keep(sees[i], p * product);
        }
    }
}

/* One phase over one chunk, for all rows that take part. */
static void do_chunk(const Head *h, int64_t number, float *scratch) {
    const Call *call = h->call;
    const int64_t padded = h->padded, padded_v = h->padded_v;
    const int64_t start = (h->first_chunk + number) * CHUNK;
    const int64_t stop = start + CHUNK < call->keys ? start + CHUNK : call->keys;
    const int scores = h->phase == SCORES, output = h->phase == OUTPUT;
    const int direct = scores && call->mode == SOLVED && call->direct;
    const int needs_keys = scores || !(output && call->mode != SOLVED);
    Part *part = h->part + number * h->rows;
    float *keys_copy = scratch, *scaled = keys_copy + BLOCK * padded;
    float *values_copy = scaled + BLOCK * padded, *zeros = values_copy + BLOCK * padded_v;
    memset(zeros, 0, (padded > padded_v ? padded : padded_v) * sizeof(float));
    vector sum[h->rows], products[h->rows];
    for (int64_t r = 0; r < h->rows; r++) {
        sum[r] = products[r] = (vector){0};
        if (scores) part[r].shift = -INFINITY;
        memset(part[r].total, 0, (output ? padded_v : padded) * sizeof(float));
        if (direct) memset(part[r].moments, 0, padded * padded * sizeof(float));
    }
    for (int64_t from = start; from < stop; from += BLOCK) {
        const int64_t count = from + BLOCK < stop ? BLOCK : stop - from;
        int any = 0, cut = 0; /* whether some row sees keys of the block, and not all of them */
        for (int64_t r = 0; r < h->rows; r++) {
            const Row *row = h->row + r;
            if (!row->active || from >= row->high || from + BLOCK <= row->low) continue;
            any = 1;
            cut |= from < row->low || from + BLOCK > row->high;
        }
        if (!any) continue;
        Rows keys = {0}, values = {0};
        const uint8_t *mask = h->mask ? h->mask + from * h->mask_step : NULL;
        if (needs_keys)
            keys = read_rows(keys_copy, zeros, h->keys, from, count, call->channels, padded,
                             h->centre, mask, h->mask_step, direct || cut);
        if (output)
            values = read_rows(values_copy, zeros, h->values, from, count, call->value_channels,
                               padded_v, NULL, mask, h->mask_step, 0);
        for (int64_t r = 0; r < h->rows; r++) {
            Row *row = h->row + r;
            if (!row->active || from >= row->high || from + BLOCK <= row->low) continue;
            if (scores) {
                weigh(h, row, part + r, keys, from, start, sum + r, products + r);
                if (call->mode == SOLVED && call->intercept)
                    gather(keys, row->p + from, part[r].total, padded);
                if (direct) add_moments(keys.at, row->p + from, scaled, part[r].moments, padded);
                continue;
            }
            float t[BLOCK];
            for (int i = 0; i < BLOCK / W; i++) {
                const vector p = v_load(row->p + from + i * W);
                vector product = {0};
                if (!output || call->mode == SOLVED) {
                    product = dots(rows_from(keys, i * W), padded, row->x);
                    product = row->constant - product;
                } else if (call->mode == GIVEN) {
                    product = row->constant - v_load(row->product + from + i * W);
                } else {
                    product = v_broadcast(1.0f);
                }
                /* An unseen key may be any number, and 0 times inf is no 0. */
                const vector weighted = v_keep(p > 0.0f, p * product);
                v_store(t + i * W, weighted);
                sum[r] += weighted;
            }
            if (output) gather(values, t, part[r].total, padded_v);
            else gather(keys, t, part[r].total, padded);
        }
    }
    for (int64_t r = 0; r < h->rows; r++) {
        part[r].sum = v_sum(sum[r]);
        part[r].products = v_sum(products[r]);
    }
}

/* Numbers of scratch memory that one thread needs: see do_chunk. */
static int64_t scratch_floats(int64_t padded, int64_t padded_v) {
    return BLOCK * (2 * padded + padded_v) + padded + padded_v;
}

static float dot(const float *x, const float *y, int64_t padded) {
    vector sum = {0};
    for (int64_t c = 0; c < padded; c += W) sum += v_load(x + c) * v_load(y + c);
    return v_sum(sum);
}

/* to += factor x */
static void add(float *to, float factor, const float *x, int64_t padded) {
    for (int64_t c = 0; c < padded; c += W)
        v_store(to + c, v_load(to + c) + factor * v_load(x + c));
}

/* What a part counts in the whole: its weights are relative to its own shift. */
static float share(const Row *row, const Part *part) {
    return part->shift == -INFINITY ? 0.0f : exp2f(part->shift - row->shift) * row->inverse;
}

/* to = factor times the sum of the parts' totals */
static void merge(const Head *h, int64_t r, float *to, float factor, int64_t padded) {
    memset(to, 0, padded * sizeof(float));
    for (int64_t c = 0; c < h->chunks; c++) {
        const Part *part = h->part + c * h->rows + r;
        const float times = share(h->row + r, part);
        if (times != 0) add(to, factor * times, part->total, padded);
    }
}

/* The sum of what a phase has weighted, relative to that of the weights. */
static float sum_of(const Head *h, int64_t r) {
    float total = 0;
    for (int64_t c = 0; c < h->chunks; c++) {
        const Part *part = h->part + c * h->rows + r;
        total += share(h->row + r, part) * part->sum;
    }
    return total;
}

/* Shift, normaliser and log-sum-exp of every row, after SCORES. */
static void normalise(Head *h) {
    const Call *call = h->call;
    for (int64_t r = 0; r < h->rows; r++) {
        Row *row = h->row + r;
        float shift = -INFINITY;
        for (int64_t c = 0; c < h->chunks; c++) {
            const Part *part = h->part + c * h->rows + r;
            shift = fmaxf(shift, part->shift);
        }
        row->shift = shift;
        row->inverse = 1;
        float total = 0, products = 0;
        for (int64_t c = 0; c < h->chunks; c++) {
            const Part *part = h->part + c * h->rows + r;
            total += share(row, part) * part->sum;
            products += share(row, part) * part->products;
        }
        row->some = row->active = total != 0; /* NaN too, which is to be seen */
        row->inverse = row->some ? 1 / total : 0;
        row->at_mean = 1 + products * row->inverse;
        row->lse = -INFINITY;
        if (!row->some) continue;
        row->lse = (shift + log2f(total)) / LOG2E;
        if (h->centre) row->lse += dot(row->q, h->centre, h->padded) / LOG2E;
        if (call->row_bias.data)
            row->lse += operand_at(call->row_bias, h->b, row->head, row->at % call->queries, 0);
    }
}

#endif
