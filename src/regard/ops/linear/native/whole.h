/* What the forward and the backward of a call without an order of tokens share: tiles and tasks.
 *
 * Keys of a head are summed in slices, which are merged: how they are cut depends on the length
 * alone, so that no result depends on the number of threads.
 */
#ifndef LINEAR_WHOLE_H
#define LINEAR_WHOLE_H

#include "call.h"
#include "maps.h"
#include "product.h"
#include "reduce.h"
#include "threads.h"

#define TILE 64           /* tokens whose rows are in the L1 cache together */
#define LEAST_SLICE 2048  /* tokens */
#define MOST_SLICES 16

/* The sums of a slice, [D][E], and of keys (z, or their mean) and of values (their mean). */
typedef struct {
    float *of_both, *of_keys, *of_values;
} Sums;

/* Work space of a thread. */
typedef struct {
    float *left, *right, *result, *more; /* [TILE][stride] of whichever is wider */
    float *keys, *values;                /* a row of each */
} Tiles;

typedef struct {
    Team team;
    const Whole *call;
    int64_t next[6]; /* a counter per round of tasks */
    int64_t key_slice, query_slice, key_slices, query_slices;
    int64_t features, channels; /* D and E, filled up */
    float *sums;    /* [key head of the batch][slice] */
    float *matrix;  /* [key head of the batch]: what queries read or gradients pass */
    float *transposed;
    Tiles tiles[REGARD_MOST_THREADS];
} Work;

static int64_t slice_of(int64_t tokens) {
    const int64_t each = up_to((tokens + MOST_SLICES - 1) / MOST_SLICES, TILE);
    return each > LEAST_SLICE ? each : LEAST_SLICE;
}

static int64_t slices_of(int64_t tokens) {
    const int64_t count = (tokens + slice_of(tokens) - 1) / slice_of(tokens);
    return count > 0 ? count : 1;
}

static int64_t sums_floats(const Work *work) {
    return work->features * work->channels + work->features + work->channels;
}

static Sums sums_at(const Work *work, int64_t head, int64_t slice) {
    const int64_t slices = work->key_slices > work->query_slices ? work->key_slices
                                                                 : work->query_slices;
    float *at = work->sums + (head * slices + slice) * sums_floats(work);
    float *keys = at + work->features * work->channels;
    return (Sums){at, keys, keys + work->features};
}

static float *matrix_at(const Work *work, int64_t head) {
    return work->matrix + head * work->features * work->channels;
}

REGARD_SHARED float *transposed_at(const Work *work, int64_t head) {
    return work->transposed + head * work->features * work->channels;
}

static const float *rows_at(const Operand *x, int64_t b, int64_t h) {
    return x->data + b * x->batch + h * x->head;
}

/* Rows, mapped, less `minus`, into a tile [count][stride]; `total` gets their sum on top. Columns
 * behind `width` are 0. */
INLINE void take_(
    const int map, const float *from, int64_t step, int64_t count, int64_t width, int64_t stride,
    const float *minus, float *tile, float *total
) {
    for (int64_t c = 0; c < stride; c += REGARD_WIDTH) {
        const int64_t left = width - c;
        vector less = {0}, sum = {0};
        if (minus) less = v_load(minus + c);
        for (int64_t t = 0; t < count; t++) {
            vector x = map_(map, part_load(from + t * step + c, left));
            if (map >= MAP_ELU && left < REGARD_WIDTH) { /* phi(0) is not 0 */
                float lanes[REGARD_WIDTH];
                v_store(lanes, x);
                x = part_load(lanes, left);
            }
            x -= less;
            sum += x;
            v_store(tile + t * stride + c, x);
        }
        if (total) v_store(total + c, v_load(total + c) + sum);
    }
}

REGARD_SHARED void take(
    int64_t map, const float *from, int64_t step, int64_t count, int64_t width, int64_t stride,
    const float *minus, float *tile, float *total
) {
    switch (map) {
        case MAP_RELU: take_(MAP_RELU, from, step, count, width, stride, minus, tile, total); break;
        case MAP_ELU: take_(MAP_ELU, from, step, count, width, stride, minus, tile, total); break;
        case MAP_LEAKY:
            take_(MAP_LEAKY, from, step, count, width, stride, minus, tile, total);
            break;
        case MAP_EXP: take_(MAP_EXP, from, step, count, width, stride, minus, tile, total); break;
        default: take_(MAP_IDENTITY, from, step, count, width, stride, minus, tile, total);
    }
}

/* A product takes rows in blocks: zeros behind the last one. */
static void fill_rows(float *tile, int64_t count, int64_t stride) {
    const int64_t whole = up_to(count, BLOCK_ROWS);
    memset(tile + count * stride, 0, (size_t)((whole - count) * stride) * sizeof(float));
}

/* Rows of [rows][stride] into a contiguous matrix of the user. */

static void narrow(const float *from, int64_t rows, int64_t columns, int64_t stride, float *to) {
    for (int64_t r = 0; r < rows; r++)
        memcpy(to + r * columns, from + r * stride, (size_t)columns * sizeof(float));
}

static void widen_row(const float *from, int64_t count, int64_t stride, float *to) {
    memset(to, 0, (size_t)stride * sizeof(float));
    if (from) memcpy(to, from, (size_t)count * sizeof(float));
}

/* to += weight left right^T. */
REGARD_SHARED void add_outer(
    float weight, const float *left, int64_t rows, const float *right, int64_t stride, float *to
) {
    for (int64_t r = 0; r < rows; r++) {
        const float share = weight * left[r];
        for (int64_t c = 0; c < stride; c += REGARD_WIDTH) {
            float *at = to + r * stride + c;
            v_store(at, v_load(at) + share * v_load(right + c));
        }
    }
}

static void add_row(float weight, const float *from, int64_t stride, float *to) {
    for (int64_t c = 0; c < stride; c += REGARD_WIDTH)
        v_store(to + c, v_load(to + c) + weight * v_load(from + c));
}

/* What multiplies every sum that a query reads. */
static float share_of(const Whole *call) {
    const double keys = call->keys > 0 ? (double)call->keys : 1.0;
    return (float)(call->centred ? call->scale / keys : call->scale);
}

static float dot_rows(const float *x, const float *y, int64_t stride) {
    vector sum = {0};
    for (int64_t c = 0; c < stride; c += REGARD_WIDTH) sum += v_load(x + c) * v_load(y + c);
    return v_sum(sum);
}

#define LEAST_DIVISOR 1e-37f /* the inverse of less may overflow */

/* 1 / divisor of a sum of weights, less than LEAST_DIVISOR in two steps: `again` is the second. */
static float inverse_weight(const Whole *call, float weight, float *again) {
    *again = 1;
    if (call->normaliser == BY_CLAMP && weight <= (float)call->minimum)
        return (float)(1.0 / call->minimum);
    if (weight == 0) return 0;
    if (__builtin_fabsf(weight) < LEAST_DIVISOR) {
        *again = LEAST_DIVISOR / weight;
        return 1 / LEAST_DIVISOR;
    }
    return 1 / weight;
}

/* Runs `rounds` of tasks, each of which waits for the one before. REGARD_NO_MEMORY without. */
typedef struct {
    int64_t count;
    void (*task)(const Work *work, const Tiles *tiles, int64_t number);
} Round;

typedef struct {
    Work work;
    Round rounds[6];
    int64_t count;
} Plan;

static void work_on_rounds(void *shared, int64_t thread) {
    Plan *plan = shared;
    for (int64_t r = 0; r < plan->count; r++) {
        int64_t number;
        while ((number = take_next(&plan->work.next[r])) < plan->rounds[r].count)
            plan->rounds[r].task(&plan->work, plan->work.tiles + thread, number);
        team_barrier(&plan->work.team);
    }
}

static void cut_work(const Whole *call, Work *work, int64_t threads, int backward, char **at) {
    const int64_t heads = call->batch * call->key_heads, F = (int64_t)sizeof(float);
    const int64_t wide = work->features > work->channels ? work->features : work->channels;
    const int64_t slices = work->key_slices > work->query_slices ? work->key_slices
                                                                 : work->query_slices;
    const int64_t matrices = heads * work->features * work->channels * F;
    work->sums = take_bytes(at, heads * slices * sums_floats(work) * F);
    work->matrix = take_bytes(at, matrices);
    if (backward) work->transposed = take_bytes(at, matrices);
    for (int64_t i = 0; i < threads; i++) {
        Tiles *tiles = work->tiles + i;
        float **each[4] = {&tiles->left, &tiles->right, &tiles->result, &tiles->more};
        for (int n = 0; n < 4; n++)
            *each[n] = take_bytes(at, (TILE + BLOCK_ROWS) * wide * F);
        tiles->keys = take_bytes(at, wide * F);
        tiles->values = take_bytes(at, wide * F);
    }
}

REGARD_SHARED int64_t run_rounds(
    const Whole *call, const Round *rounds, int64_t count, int backward
) {
    int64_t threads = call->threads < 1 ? 1 : call->threads;
    if (threads > REGARD_MOST_THREADS) threads = REGARD_MOST_THREADS;
    Plan *plan = calloc(1, sizeof(Plan));
    if (!plan) return REGARD_NO_MEMORY;
    Work *work = &plan->work;
    work->call = call;
    work->features = up_to(call->features, REGARD_WIDTH);
    work->channels = up_to(call->channels, REGARD_WIDTH);
    work->key_slice = slice_of(call->keys), work->key_slices = slices_of(call->keys);
    work->query_slice = slice_of(call->queries), work->query_slices = slices_of(call->queries);
    char *at = 0;
    cut_work(call, work, threads, backward, &at);
    char *block = aligned_block((int64_t)(intptr_t)at);
    if (!block) {
        free(plan);
        return REGARD_NO_MEMORY;
    }
    at = block;
    cut_work(call, work, threads, backward, &at);
    memcpy(plan->rounds, rounds, (size_t)count * sizeof(Round));
    plan->count = count;
    run_team(&work->team, threads, work_on_rounds, plan);
    free_block(block);
    free(plan);
    return 0;
}

/* Tokens [start, stop) of slice `number`. */
static int64_t slice_end(int64_t number, int64_t slice, int64_t tokens) {
    const int64_t end = (number + 1) * slice;
    return end < tokens ? end : tokens;
}

static int64_t tile_count(int64_t start, int64_t stop) {
    return stop - start < TILE ? stop - start : TILE;
}

#endif
