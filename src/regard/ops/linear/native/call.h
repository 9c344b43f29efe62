/* What a call asks for, as Python fills it in (library.py mirrors this file field by field). */
#ifndef LINEAR_CALL_H
#define LINEAR_CALL_H

#include <stdint.h>

/* A float32 tensor [batch, head, token, ...] by strides in elements; the last axis, if there is
 * a fourth one, is contiguous. `data` is NULL where there is no such operand. */
typedef struct {
    const float *data;
    int64_t batch, head, token;
} Operand;

enum { NO_NORMALISER = 0, BY_SUM = 1, BY_CLAMP = 2 };

typedef struct {
    int64_t batch, heads, key_heads, tokens, features, channels; /* F and E: S is [F, E] */
    int64_t per_channel; /* log_decay is [batch, head, token, F] */
    int64_t normaliser, threads;
    double minimum, epsilon;
    Operand q, k, v, log_decay, beta; /* beta is given for the delta rule */
    const float *state, *total;       /* S and z before the first token, contiguous, or NULL */
    float *out, *weight;              /* [batch, head, token, E]; [batch, head, token] */
    float *last_state, *last_total;   /* after the last token, or NULL */
    /* The backward: gradients of results, `out` as it was, gradients of operands. */
    Operand d_out, given_out;
    const float *given_weight, *d_last_state, *d_last_total;
    float *dq, *dk, *dv, *d_log_decay, *d_beta, *d_state, *d_total; /* d_log_decay may be NULL */
} Call;

static inline const float *operand_rows(const Operand *x, int64_t b, int64_t h) {
    return x->data ? x->data + b * x->batch + h * x->head : 0;
}

#endif
