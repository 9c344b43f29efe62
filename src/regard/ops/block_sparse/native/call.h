/* What a call asks for, as Python fills it in (library.py mirrors this file field by field). */
#ifndef BLOCK_SPARSE_CALL_H
#define BLOCK_SPARSE_CALL_H

#include <stdint.h>

/* Where lists come from: levels of all blocks of keys, indices of some blocks, or boxes. */
enum { LEVELS = 0, BLOCKS = 1, BOXES = 2 };

/* All tensors are contiguous; float32 unless said otherwise. Scores are `scale` times products. Rows
 * are keys at every resolution (pyramid.py): those of level 1, of level 2 ... one behind the other.
 * With `pools` they are the keys alone, without biases, and coarser ones are averaged as they are
 * read. */
typedef struct {
    int64_t batch, heads, key_heads, queries, rows, keys, channels, value_channels;
    int64_t kind, plan_batch, plan_heads, lists, width; /* lists per head of the plan */
    int64_t block_q, block_k, left, right;              /* reach; -1 without bound */
    int64_t replicate; /* pooled groups are whole behind the last key, too */
    int64_t pools;
    int64_t bias_heads; /* 1 or key_heads */
    int64_t threads;
    double scale;
    const float *q, *k, *v; /* [batch, head, query, channel], [batch, key head, row, channel] */
    const float *bias;      /* [batch, bias head, row], or NULL */
    const void *plan;       /* [plan batch, plan head, list, width]: int8 levels, int32 indices */
    /* Of boxes, one plan for all heads: segments of rows, and for some lists which place of the
     * list sees which row (bytes 0 or -1, [row of the list][mask_width]). */
    const int64_t *offsets, *mask_at; /* [lists + 1]; [lists], -1: all see all */
    const int32_t *start, *length;    /* [segments] */
    const int8_t *masks;
    int64_t mask_width;   /* a multiple of the widest tile's places */
    const int32_t *order; /* [lists, block_q] the query at each place, -1 for none; or NULL */
    /* Results, or of a backward what the forward has found: [.., value channel] and [..]. */
    float *out, *lse;
    const float *d_out;
    float *dq, *dk, *dv, *d_bias; /* zeros; d_bias NULL without biases */
} Call;

#endif
