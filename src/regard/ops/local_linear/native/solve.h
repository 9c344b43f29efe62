/* The probe g of the rows of a tile, (C + lambda I) g = kbar - q, and which rows failed. */
#ifndef LOCAL_LINEAR_SOLVE_H
#define LOCAL_LINEAR_SOLVE_H

#include "direct.h"

#define NOISE 1e-3f /* the rounding of |g| times that of the keys which weights may carry */
#define EPSILON 1.1920929e-7f

/* The ridge of every row as it is added to the covariance of normalised weights. */
REGARD_SHARED void find_ridges(Tile *tile) {
    const Call *call = tile->call;
    float *ridge = (float *)tile->ridge;
    FOR_LANES(i) {
        ridge[i] = operand_at(call->ridge, tile->keys->b, tile->head[i], tile->query[i], 0);
        const float lse = ((const float *)tile->lse)[i];
        const int some = ((const float *)tile->total)[i] > 0;
        if (call->absolute && some) ridge[i] *= expf(-lse);
    }
}

/* Adds the rows whose g is so large that the rounding of the keys would show. */
REGARD_SHARED void find_noise(const Tile *tile, const lanes *right, vector_mask *failed) {
    const int64_t channels = tile->keys->k_panel.groups * REGARD_ROWS;
    lanes g, mean, b;
    lanes_dot((const lanes *)tile->g, (const lanes *)tile->g, channels, g);
    lanes_dot((const lanes *)tile->mean, (const lanes *)tile->mean, channels, mean);
    lanes_dot(right, right, channels, b);
    FOR_VECTORS(v) {
        const vector noise = EPSILON * v_sqrt(g[v]) * (v_sqrt(mean[v]) + v_sqrt(b[v]));
        failed[v] |= ~(vector_mask)(noise < v_broadcast(NOISE));
    }
}

/* The rows that have not reached the tolerance. The residual is the root of what was compared: a
 * last digit must not decide. */
REGARD_SHARED void find_unsolved(const Tile *tile, const lanes residual, vector_mask *failed) {
    const vector most = v_broadcast((float)(tile->call->tol * (1 + 1e-5)));
    FOR_VECTORS(v) failed[v] = (vector_mask)(residual[v] > most);
}

/* The g of every row, and how it went. */
REGARD_SHARED void solve(Tile *tile) {
    const Call *call = tile->call;
    const int64_t channels = tile->keys->k_panel.groups * REGARD_ROWS;
    const vector zero = {0};
    lanes *right = tile->queries; /* not needed any more */
    find_ridges(tile);
    for (int64_t c = 0; c < channels; c++) FOR_VECTORS(v) {
        const vector_mask some = (vector_mask)(tile->total[v] > zero);
        right[c][v] = v_keep(some, tile->mean[c][v] - tile->queries[c][v]);
    }
    if (call->direct) {
        vector_mask sound[REGARD_VECTORS];
        moments(tile);
        factorise(tile, sound);
        solve_directly(tile, sound, (const lanes *)right, tile->g, tile->residual, tile->failed);
        FOR_VECTORS(v) tile->iterations[v] = (vector_mask){0};
    } else {
        conjugate_gradient(
            tile, (const lanes *)right, tile->g, 0, call->tol, call->max_iters, tile->residual,
            tile->iterations
        );
        find_unsolved(tile, tile->residual, tile->failed);
    }
    find_noise(tile, (const lanes *)right, tile->failed);
}

#endif
