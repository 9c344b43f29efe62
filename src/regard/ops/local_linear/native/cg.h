/* (C + lambda I) x = b for the rows of a tile, by conjugate gradients.
 *
 * Every lane minds only itself: it stops at |residual| <= tol |b| and is frozen from then on, so
 * that it does not matter who its neighbours are. The tile stops with its last lane. A lane whose
 * numbers leave the range of a float stops where it is, or at x = 0; so does one that after as many
 * steps as channels, enough in exact arithmetic, is further from a solution than x = 0.
 */
#ifndef LOCAL_LINEAR_CG_H
#define LOCAL_LINEAR_CG_H

#include "weigh.h"

/* Loops over channels leave out vectors without rows: all is 0 there. */
#define FOR_LIVE(v) for (int v = 0; v < live; v++)

/* y = (C + lambda I) x. The mean is taken off before the second product, which keeps float32
 * accurate where the keys that a row looks at lie far from the common centre; to be precise, off
 * the second factor as well, for what rounding has left in the first, which exactly sums to 0. */
REGARD_SHARED void tile_apply(Tile *tile, const lanes *x, lanes *y) {
    const Panel panel = tile->keys->k_panel;
    const int64_t channels = panel.groups * REGARD_ROWS;
    const int live = tile->vectors;
    const int precise = tile->call->precise != 0;
    lanes constant, rest;
    FOR_VECTORS(v) constant[v] = rest[v] = (vector){0};
    for (int64_t c = 0; c < channels; c++)
        FOR_LIVE(v) constant[v] -= x[c][v] * tile->mean[c][v];
    memset(y, 0, (size_t)channels * sizeof(lanes));
    for (int64_t i = 0; i < tile->blocks; i++) {
        const Block block = tile_block(tile, i);
        const float *k = block_of_k(tile, block);
        panel_weigh(
            tile->vectors, k, panel, block.count, x, constant,
            (const lanes *)tile->weights + block.at, tile->scratch, block.cut
        );
        if (precise) add_weights(tile->vectors, block.count, (const lanes *)tile->scratch, rest);
        panel_collect(
            tile->vectors, k, panel, block.count, (const lanes *)tile->scratch, y
        );
    }
    for (int64_t c = 0; c < channels; c++)
        FOR_LIVE(v) {
            if (precise) y[c][v] -= rest[v] * tile->mean[c][v];
            y[c][v] = y[c][v] * tile->inverse[v] + tile->ridge[v] * x[c][v];
        }
}

static inline void lanes_dot(const lanes *x, const lanes *y, int64_t channels, lanes result) {
    lanes sum;
    FOR_VECTORS(v) sum[v] = (vector){0};
    for (int64_t c = 0; c < channels; c++) FOR_VECTORS(v) sum[v] += x[c][v] * y[c][v];
    FOR_VECTORS(v) result[v] = sum[v];
}

static inline vector v_sqrt(vector x) {
    for (int i = 0; i < REGARD_WIDTH; i++) x[i] = sqrtf(x[i]);
    return x;
}

static inline vector_mask v_finite(vector x) { return (vector_mask)(x - x == (vector){0}); }

/* Solves for x from 0, or with `started` from x with its residual in tile->r, right-hand side b.
 * Leaves the relative residuals in `residual` and the steps in `steps`. */
REGARD_SHARED void conjugate_gradient(
    Tile *tile, const lanes *b, lanes *x, int started, double tolerance, int64_t limit,
    lanes residual, vector_mask *steps
) {
    const int64_t channels = tile->keys->k_panel.groups * REGARD_ROWS;
    const int live = tile->vectors;
    const vector zero = {0}, infinite = v_broadcast(INFINITY);
    lanes *r = tile->r, *p = tile->p, *y = tile->y;
    lanes size, whole, goal;
    vector_mask active[REGARD_VECTORS];
    if (!started) {
        memset(x, 0, (size_t)channels * sizeof(lanes));
        memcpy(r, b, (size_t)channels * sizeof(lanes));
    }
    lanes_dot(b, b, channels, whole);
    lanes_dot(r, r, channels, size);
    FOR_VECTORS(v) {
        goal[v] = whole[v] * (float)(tolerance * tolerance);
        active[v] = (vector_mask)(size[v] > goal[v]) & (vector_mask)(size[v] < infinite);
        steps[v] = (vector_mask){0};
    }
    for (int64_t c = 0; c < channels; c++) FOR_LIVE(v) p[c][v] = v_keep(active[v], r[c][v]);
    for (int64_t iteration = 0; iteration < limit; iteration++) {
        vector_mask any = {0};
        FOR_VECTORS(v) any |= active[v];
        if (!v_any(any)) break;
        tile_apply(tile, p, y);
        lanes curvature, step, new, ratio;
        lanes_dot(p, y, channels, curvature);
        FOR_VECTORS(v) {
            active[v] &= (vector_mask)(curvature[v] > zero);
            active[v] &= (vector_mask)(curvature[v] < infinite);
            step[v] = v_keep(active[v], size[v] / curvature[v]);
            new[v] = zero;
        }
        for (int64_t c = 0; c < channels; c++) FOR_LIVE(v) {
            x[c][v] += step[v] * p[c][v];
            r[c][v] = v_select(active[v], r[c][v] - step[v] * y[c][v], r[c][v]);
            new[v] += r[c][v] * r[c][v];
        }
        FOR_VECTORS(v) {
            new[v] = v_select(active[v], new[v], size[v]);
            steps[v] -= active[v];
            active[v] &= (vector_mask)(new[v] > goal[v]) & (vector_mask)(new[v] < infinite);
            ratio[v] = new[v] / size[v];
            size[v] = new[v];
        }
        for (int64_t c = 0; c < channels; c++)
            FOR_LIVE(v) p[c][v] = v_keep(active[v], r[c][v] + ratio[v] * p[c][v]);
    }
    vector_mask solved[REGARD_VECTORS];
    FOR_VECTORS(v) solved[v] = ~((steps[v] >= (int32_t)tile->call->channels) &
                                 (vector_mask)(size[v] > whole[v]));
    for (int64_t c = 0; c < channels; c++) FOR_LIVE(v) solved[v] &= v_finite(x[c][v]);
    for (int64_t c = 0; c < channels; c++) FOR_LIVE(v) x[c][v] = v_keep(solved[v], x[c][v]);
    FOR_VECTORS(v) {
        const vector relative = v_keep((vector_mask)(whole[v] > zero), v_sqrt(size[v] / whole[v]));
        residual[v] = v_select(solved[v], relative, v_broadcast(1));
    }
}

#endif
