/* One token per sequence, as Python packs it (decode.py mirrors this file field by field). */
#ifndef LINEAR_DECODE_H
#define LINEAR_DECODE_H

#include <stdint.h>

enum { MAP_IDENTITY, MAP_UNIT, MAP_ELU, MAP_RELU };

/* float32; strides in elements over batch and heads, the last axis contiguous. */
typedef struct {
    const float *data;
    int64_t batch, head;
} StepOperand;

typedef struct {
    int64_t batch, heads, key_heads, features, channels;
    int64_t query_map, key_map, per_channel, normaliser;
    double scale, minimum, epsilon;
    StepOperand q, k, v, log_decay, beta; /* the last two may be NULL */
    const float *state, *total;           /* contiguous, or NULL for zeros */
    float *out, *next_state, *next_total;
} Step;

#endif
