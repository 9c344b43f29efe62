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

/* What queries or keys become on their way into a walk: phi(x) times `scale`. */
enum { AS_IT_IS, TIMES, UNIT, RELU_MAP, LEARNED };

typedef struct {
    int64_t kind;
    int64_t inner;                    /* columns of x */
    int64_t name, full, shifted, skip; /* LEARNED: of `activate.h` */
    int64_t weights, biases, columns; /* one for all heads or one each; [inner][columns] */
    double scale;
    const float *weight, *bias; /* columns are a multiple of a vector; NULL for none */
} Map;

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
    Map query_map, key_map; /* of the forward alone */
} Call;

/* A call in which every query reads the state after all keys, and its backward. */
typedef struct {
    int64_t batch, heads, key_heads, queries, keys, features, channels;
    int64_t query_map, key_map; /* of `maps.h` */
    int64_t normaliser, centred, threads;
    double scale, minimum;
    Operand q, k, v, d_out;
    const float *state, *total; /* S and z before the first key, contiguous, or NULL */
    float *out;                 /* [batch, head, query, E] */
    /* S, and with `centred` the means of keys and values, else z, after the last key. */
    float *sums, *of_keys, *of_values;
    const float *d_sums, *d_of_keys, *d_of_values; /* gradients of these */
    float *dq, *dk, *dv, *d_state, *d_total;
} Whole;

static inline const float *operand_rows(const Operand *x, int64_t b, int64_t h) {
    return x->data ? x->data + b * x->batch + h * x->head : 0;
}

#endif
