/* One token per sequence, as Python packs it (decode.py mirrors this file field by field). */
#ifndef LINEAR_DECODE_H
#define LINEAR_DECODE_H

#include <stdint.h>

enum { MAP_IDENTITY, MAP_UNIT, MAP_ELU, MAP_RELU };

/* Elements between batches and heads of an operand, whose last axis is contiguous. */
typedef struct {
    int64_t batch, head;
} StepStrides;

/* All float32. What changes from token to token comes first. */
typedef struct {
    const float *q, *k, *v, *log_decay, *beta; /* the last two may be NULL */
    const float *state, *total;                /* contiguous, or NULL for zeros */
    float *out, *next_state, *next_total;
    int64_t batch, heads, key_heads, features, channels;
    int64_t query_map, key_map, per_channel, normaliser;
    double scale, minimum, epsilon;
    StepStrides q_at, k_at, v_at, log_decay_at, beta_at;
} Step;

#endif
