/* What a call asks for, as Python fills it in (library.py mirrors this file field by field). */
#ifndef LOCAL_LINEAR_CALL_H
#define LOCAL_LINEAR_CALL_H

#include <stdint.h>

#include "panel.h"

/* A tensor with one axis of each name; strides in elements, 0 along what is broadcast. float32
 * unless said otherwise; `half` says so of q, k and v. `data` is NULL where there is no such
 * operand. */
typedef struct {
    const void *data;
    int64_t batch, head, row, column;
    int64_t half; /* FLOAT32, BFLOAT16 or FLOAT16 */
} Operand;

enum { SOLVED = 0, GIVEN = 1, AVERAGE = 2 }; /* where the probe g comes from */

typedef struct {
    int64_t batch, heads, key_heads, queries, keys, channels, value_channels;
    int64_t bias_heads, decay_heads; /* 1, key_heads or heads */
    int64_t left, right;             /* reach around a query's own position, -1 without bound */
    int64_t causal;                  /* a decay is read at the query's position, not at the end */
    int64_t banded;                  /* some query does not see all: centred at the first key */
    int64_t intercept, absolute, mode, direct;
    int64_t precise; /* also as to the rounding of means (solve.py says more) */
    int64_t max_iters, threads;
    double tol;
    Operand q, k, v, probe; /* rows are tokens */
    Operand ridge, scale;   /* [batch, head, row] and [batch, head] */
    Operand key_mask;       /* bytes [batch, row], not 0 for a real key */
    Operand key_bias;       /* [batch, bias head, row] */
    Operand decay_sums;     /* double [batch, decay head, row] */
    Operand decay_first;    /* int64 likewise */
    Operand row_bias;       /* [batch, head, row] */
    /* Results, contiguous, float32 unless said otherwise. */
    float *out;   /* [batch, head, query, value channel] */
    float *slope; /* [batch, head, query, channel] */
    float *lse;   /* [batch, head, query], as the following */
    int32_t *iterations;
    float *residual;
    uint8_t *failed; /* 1: not what was asked for */
    float *factors;  /* [.., pair]: Cholesky factors of the direct solver, or NULL */
} Call;

/* The rows of one batch element and head. */
static inline Source operand_rows(Operand x, int64_t b, int64_t h) {
    return (Source){x.data, b * x.batch + h * x.head, x.row, x.column, (int)x.half};
}

static inline float operand_at(Operand x, int64_t b, int64_t h, int64_t row, int64_t column) {
    return source_at(operand_rows(x, b, h), row, column);
}

static inline double decay_at(Operand x, int64_t b, int64_t h, int64_t row) {
    return ((const double *)x.data)[b * x.batch + h * x.head + row * x.row];
}

static inline int64_t first_at(Operand x, int64_t b, int64_t h, int64_t row) {
    return ((const int64_t *)x.data)[b * x.batch + h * x.head + row * x.row];
}

/* The head of an operand with `count` heads that serves query head h. */
static inline int64_t operand_head(const Call *call, int64_t count, int64_t h) {
    return count == 1 ? 0 : h / (call->heads / count);
}

/* Query heads that share the rows of a tile: all of a key head, unless what is added to the scores
 * differs between them. */
static inline int64_t folded_heads(const Call *call) {
    const int64_t group = call->heads / call->key_heads;
    const int differs = (call->key_bias.data && call->bias_heads > call->key_heads) ||
                        (call->decay_sums.data && call->decay_heads > call->key_heads);
    return differs ? 1 : group;
}

#endif
