/* (C + lambda I) x = b for the rows of a tile, by a Cholesky factor each, refined once.
 *
 * C is the second moment of the centred keys less that of the mean. Up to OUTER_CHANNELS channels
 * the products k_a k_b of every key are packed beforehand, and the lower triangles of all rows are
 * one matrix product of weights and products. Above, the keys are weighted channel by channel and
 * that is multiplied with the channels up to it: no memory, and at most R - 1 idle columns.
 */
#ifndef LOCAL_LINEAR_DIRECT_H
#define LOCAL_LINEAR_DIRECT_H

#include "cg.h"

#define OUTER_CHANNELS 32
#define OUTER_BYTES ((int64_t)64 << 20) /* of one key head's products; more are not kept */
#define ROUGH 1e-2f /* a first solution with a larger residual is not worth refining */

/* Products that are packed per key, 0 for none. */
static inline int64_t outer_channels(const Call *call) {
    const int64_t d = call->channels, pairs = d * (d + 1) / 2;
    const int kept = call->mode == SOLVED && call->direct && d <= OUTER_CHANNELS &&
                     pairs * call->keys * (int64_t)sizeof(float) <= OUTER_BYTES;
    return kept ? pairs : 0;
}

/* Where row a of the lower triangle begins. */
static inline int64_t matrix_row(const Tile *tile, int64_t a) {
    return tile->keys->outer ? a * (a + 1) / 2 : a * up_to(tile->call->channels, REGARD_ROWS);
}

/* Rows of LANES numbers that the matrix takes. */
static inline int64_t matrix_rows(const Call *call) {
    if (call->mode != SOLVED || !call->direct) return 0;
    const int64_t d = up_to(call->channels, REGARD_ROWS), pairs = outer_channels(call);
    return pairs ? up_to(pairs, REGARD_ROWS) : d * d;
}

/* Packs the products of block `number`, whose keys have been packed. A product may overflow: large
 * instead of infinite, as a hidden key's weight is 0. */
static inline void outer_pack(Keys *keys, const Call *call, int64_t number) {
    const Panel panel = keys->outer_panel;
    const int64_t d = call->channels;
    if (!keys->outer || number * panel.keys >= keys->count) return;
    const float *k = keys->k + number * keys->k_panel.floats;
    float *to = keys->outer + number * panel.floats;
    float row[OUTER_CHANNELS], pairs[OUTER_CHANNELS * (OUTER_CHANNELS + 1) / 2 + REGARD_ROWS];
    memset(pairs, 0, sizeof pairs);
    for (int64_t key = 0; key < panel.keys; key++) {
        for (int64_t c = 0; c < d; c++)
            row[c] = k[(c / REGARD_ROWS * panel.keys + key) * REGARD_ROWS + c % REGARD_ROWS];
        float *pair = pairs;
        for (int64_t a = 0; a < d; pair += ++a) {
            for (int64_t b = 0; b <= a; b++) {
                const float x = row[a] * row[b];
                pair[b] = x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x;
            }
        }
        for (int64_t group = 0; group < panel.groups; group++)
            memcpy(
                to + (group * panel.keys + key) * REGARD_ROWS, pairs + group * REGARD_ROWS,
                REGARD_ROWS * sizeof(float)
            );
    }
}

/* The factors of every row to or from `kept` [batch, head, query, pair]. */
REGARD_SHARED void keep_factors(const Tile *tile, float *kept) {
    const int64_t d = tile->call->channels, pairs = d * (d + 1) / 2;
    for (int i = 0; i < tile->rows; i++) {
        float *to = kept + tile_row(tile, i) * pairs;
        for (int64_t a = 0; a < d; a++) {
            const float *row = (const float *)(tile->matrix + matrix_row(tile, a));
            for (int64_t b = 0; b <= a; b++) *to++ = row[b * LANES + i];
        }
    }
}

/* Also says, as `factorise` does, which rows are `sound`. */
REGARD_SHARED void recall_factors(Tile *tile, const float *kept, vector_mask *sound) {
    const int64_t d = tile->call->channels, pairs = d * (d + 1) / 2;
    FOR_LANES(i) { /* the rows beyond the last are repetitions */
        const float *from = kept + tile_row(tile, i) * pairs;
        for (int64_t a = 0; a < d; a++) {
            float *row = (float *)(tile->matrix + matrix_row(tile, a));
            for (int64_t b = 0; b <= a; b++) row[b * LANES + i] = *from++;
        }
    }
    FOR_VECTORS(v) sound[v] = ~(vector_mask){0};
    for (int64_t a = 0; a < d; a++) FOR_VECTORS(v) {
        const vector inverse = tile->matrix[matrix_row(tile, a) + a][v]; /* of a pivot's root */
        sound[v] &= (vector_mask)(0.5f * tile->ridge[v] * inverse * inverse < v_broadcast(1.00001f));
    }
}

/* sum_j w_j k_j k_j^T, lower triangles. */
REGARD_SHARED void moments(Tile *tile) {
    const Panel panel = tile->keys->k_panel, outer = tile->keys->outer_panel;
    memset(tile->matrix, 0, (size_t)matrix_rows(tile->call) * sizeof(lanes));
    for (int64_t i = 0; i < tile->blocks; i++) {
        const Block block = tile_block(tile, i);
        const lanes *weights = (const lanes *)tile->weights + block.at;
        if (tile->keys->outer) {
            const float *products = tile->keys->outer + block.number * outer.floats;
            panel_collect(
                tile->vectors, products, outer, block.count, weights, tile->matrix
            );
            continue;
        }
        const float *k = block_of_k(tile, block);
        for (int64_t a = 0; a < tile->call->channels; a++) {
            const float *channel = k + a / REGARD_ROWS * panel.keys * REGARD_ROWS + a % REGARD_ROWS;
            for (int64_t key = 0; key < block.count; key++)
                for (int v = 0; v < tile->vectors; v++)
                    tile->scratch[key][v] = channel[key * REGARD_ROWS] * weights[key][v];
            const Panel part = {panel.keys, a / REGARD_ROWS + 1, 0};
            panel_collect(
                tile->vectors, k, part, block.count, (const lanes *)tile->scratch,
                tile->matrix + matrix_row(tile, a)
            );
        }
    }
}

/* The matrix of every row becomes its lower Cholesky factor, with inverse pivots. Returns in
 * `sound` the rows without a pivot below half the ridge, which bounds every exact pivot. */
REGARD_SHARED void factorise(Tile *tile, vector_mask *sound) {
    const int64_t d = tile->call->channels;
    FOR_VECTORS(v) sound[v] = ~(vector_mask){0};
    for (int64_t a = 0; a < d; a++) {
        lanes *row = tile->matrix + matrix_row(tile, a);
        for (int64_t b = 0; b <= a; b++) FOR_VECTORS(v) {
            row[b][v] = row[b][v] * tile->inverse[v] - tile->mean[a][v] * tile->mean[b][v];
            if (a == b) row[b][v] += tile->ridge[v];
        }
    }
    for (int64_t j = 0; j < d; j++) {
        lanes *pivot_row = tile->matrix + matrix_row(tile, j);
        lanes pivot;
        FOR_VECTORS(v) pivot[v] = pivot_row[j][v];
        for (int64_t k = 0; k < j; k++)
            FOR_VECTORS(v) pivot[v] -= pivot_row[k][v] * pivot_row[k][v];
        FOR_VECTORS(v) {
            sound[v] &= (vector_mask)(pivot[v] >= 0.5f * tile->ridge[v]);
            pivot[v] = 1.0f / v_sqrt(v_max(pivot[v], v_broadcast(FLT_MIN)));
            pivot_row[j][v] = pivot[v];
        }
        int64_t i = j + 1;
        for (; i + 4 <= d; i += 4) { /* four rows share what is read of the pivot's row */
            lanes *rows[4], acc[4];
            REGARD_UNROLL for (int r = 0; r < 4; r++) {
                rows[r] = tile->matrix + matrix_row(tile, i + r);
                FOR_VECTORS(v) acc[r][v] = rows[r][j][v];
            }
            for (int64_t k = 0; k < j; k++) {
                REGARD_UNROLL for (int r = 0; r < 4; r++) {
                    FOR_VECTORS(v) acc[r][v] -= rows[r][k][v] * pivot_row[k][v];
                }
            }
            REGARD_UNROLL for (int r = 0; r < 4; r++) {
                FOR_VECTORS(v) rows[r][j][v] = acc[r][v] * pivot[v];
            }
        }
        for (; i < d; i++) {
            lanes *row = tile->matrix + matrix_row(tile, i), acc;
            FOR_VECTORS(v) acc[v] = row[j][v];
            for (int64_t k = 0; k < j; k++) FOR_VECTORS(v) acc[v] -= row[k][v] * pivot_row[k][v];
            FOR_VECTORS(v) row[j][v] = acc[v] * pivot[v];
        }
    }
}

/* x of L L^T x = b; x may be b. Padded channels become 0. */
REGARD_SHARED void substitute(const Tile *tile, const lanes *b, lanes *x) {
    const int64_t d = tile->call->channels;
    if (x != b) memcpy(x, b, (size_t)d * sizeof(lanes));
    memset(x + d, 0, (size_t)(up_to(d, REGARD_ROWS) - d) * sizeof(lanes));
    for (int64_t i = 0; i < d; i++) {
        const lanes *row = (const lanes *)tile->matrix + matrix_row(tile, i);
        lanes acc;
        FOR_VECTORS(v) acc[v] = x[i][v];
        for (int64_t k = 0; k < i; k++) FOR_VECTORS(v) acc[v] -= row[k][v] * x[k][v];
        FOR_VECTORS(v) x[i][v] = acc[v] * row[i][v];
    }
    for (int64_t i = d - 1; i >= 0; i--) {
        const lanes *row = (const lanes *)tile->matrix + matrix_row(tile, i);
        lanes found;
        FOR_VECTORS(v) x[i][v] = found[v] = x[i][v] * row[i][v];
        for (int64_t k = 0; k < i; k++) FOR_VECTORS(v) x[k][v] -= row[k][v] * found[v];
    }
}

/* Solves with the factors in tile->matrix; one step of refinement, by the product that takes the
 * mean off first, gives back the digits that C = sum p k k^T - kbar kbar^T has lost. x = 0 where
 * that came to nothing; `failed` says where. */
REGARD_SHARED void solve_directly(
    Tile *tile, const vector_mask *sound, const lanes *b, lanes *x, lanes residual,
    vector_mask *failed
) {
    const int64_t channels = tile->keys->k_panel.groups * REGARD_ROWS;
    const vector zero = {0};
    lanes size, left;
    vector_mask good[REGARD_VECTORS];
    substitute(tile, b, x);
    tile_apply(tile, x, tile->y);
    for (int64_t c = 0; c < channels; c++)
        FOR_VECTORS(v) tile->r[c][v] = b[c][v] - tile->y[c][v];
    lanes_dot(b, b, channels, size);
    lanes_dot(tile->r, tile->r, channels, left);
    substitute(tile, tile->r, tile->p);
    FOR_VECTORS(v) {
        const vector_mask nothing = (vector_mask)(size[v] == zero);
        residual[v] = v_keep(~nothing, v_sqrt(left[v] / size[v]));
        good[v] = sound[v] & (vector_mask)(residual[v] < v_broadcast(ROUGH));
    }
    for (int64_t c = 0; c < channels; c++) FOR_VECTORS(v) {
        x[c][v] += tile->p[c][v];
        good[v] &= v_finite(x[c][v]);
    }
    FOR_VECTORS(v) {
        const vector_mask nothing = (vector_mask)(size[v] == zero);
        failed[v] = ~(good[v] | nothing);
        good[v] &= ~nothing;
        residual[v] = v_select(failed[v], v_broadcast(1), residual[v]);
    }
    for (int64_t c = 0; c < channels; c++) FOR_VECTORS(v) x[c][v] = v_keep(good[v], x[c][v]);
}

#endif
