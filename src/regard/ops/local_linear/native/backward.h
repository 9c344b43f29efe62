/* What a backward asks for, as Python fills it in (backward.py mirrors this file). */
#ifndef LOCAL_LINEAR_BACKWARD_H
#define LOCAL_LINEAR_BACKWARD_H

#include "call.h"

typedef struct {
    Call call;           /* of the forward; tol and max_iters are those of the backward */
    Operand grad, slope; /* rows are queries */
    const float *factors; /* that the forward has kept, or NULL */
    int64_t frozen;      /* lambda times the normaliser of the weights is held constant */
    int64_t probed;      /* g is not 0 throughout */
    int64_t solves;      /* more than the gradient of v is wanted */
    int64_t refines;     /* g is not solved for as well as the backward asks */
    int64_t rescues;     /* rows that fail are left out, and told */
    int64_t wants_q, wants_k, wants_v, wants_scale;
    /* Results, contiguous; zero where nothing is written, NULL where nothing is wanted. */
    float *q, *k, *v;            /* as the operands */
    float *ridge, *scale, *row;  /* [batch, head, query] */
    float *probe;                /* [batch, head, query, channel] */
    double *columns;             /* [batch, head, key] sums of dS over the queries of some heads */
    uint8_t *failed;             /* [batch, head, query] */
} Backward;

#endif
