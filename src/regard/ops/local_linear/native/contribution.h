/* What one tile of queries contributes to the gradients: the weights again, one more solve.
 *
 * With e the gradient of an output, gamma_j = e . v_j centred by its weighted mean, and
 * u = (C + lambda I)^-1 sum_j p_j gamma_j k_j,  a_j = g . (k_j - kbar),  b_j = u . (k_j - kbar):
 *
 *     dS_j = p_j ((1 - a_j)(gamma_j - b_j) + lambda g . u)      (no last term: absolute ridge)
 *     dq   = u + scale sum_j dS_j k_j
 *     dk_j = sum_i scale dS_ij q_i - p_ij (gamma_ij - b_ij) g_i - p_ij (1 - a_ij) u_i
 *     dv_j = sum_i p_ij (1 - a_ij) e_i
 *
 * backward.py says more.
 */
#ifndef LOCAL_LINEAR_CONTRIBUTION_H
#define LOCAL_LINEAR_CONTRIBUTION_H

#include "backward.h"
#include "reduce.h"
#include "solve.h"
#include "spread.h"

#define SUB_KEYS 48 /* keys whose three factors and rows are in the first cache together */

/* Gradients of the keys and values of one key head, to which its tiles add. */
typedef struct {
    float *k, *v;    /* [keys of all blocks][channels, padded to whole vectors] */
    double *columns; /* [sets][keys of all blocks] sums of dS over queries */
} Share;

/* One thread's space beside its tile. */
typedef struct {
    Tile tile;
    lanes *gamma;   /* [span] e . v_j, centred */
    lanes *right;   /* kbar - q, then t */
    lanes *factors; /* [3][SUB_KEYS]: dS, p (gamma - b), p (1 - a), times the sum of the weights */
    float *rows;    /* [3 * LANES][channels]: scale q, -g, -u, over the sum of the weights */
    float *values;  /* [LANES][value channels]: e, likewise */
    vector_mask live[REGARD_VECTORS];
    lanes average;  /* taken from gamma: its weighted mean, if there is an intercept */
    lanes base;     /* added to every (1 - a)(gamma - b) of a row */
    lanes row_sum;  /* lambda g . u: what a row of dS sums to, with the other sign */
} Space;

static inline int64_t in_vectors(int64_t channels) { return up_to(channels, REGARD_WIDTH); }

/* Products of channels are packed for making factors only, and then the factors as well. */
static int64_t products_to_pack(const Backward *back) {
    return back->factors ? 0 : outer_channels(&back->call);
}

static int64_t matrix_size(const Backward *back) {
    const int64_t d = up_to(back->call.channels, REGARD_ROWS);
    return back->factors ? d * d : matrix_rows(&back->call);
}

static void space_lay_out(Space *space, const Backward *back, char **at) {
    const Call *call = &back->call;
    const int64_t row = sizeof(lanes);
    tile_lay_out(&space->tile, call, matrix_size(back), at);
    space->gamma = space->tile.products; /* not needed otherwise */
    if (!space->gamma) space->gamma = take_bytes(at, tile_span(call) * row);
    space->right = take_bytes(at, up_to(call->channels, REGARD_ROWS) * row);
    space->factors = take_bytes(at, 3 * SUB_KEYS * row);
    space->rows = take_bytes(at, 3 * LANES * in_vectors(call->channels) * 4);
    space->values = take_bytes(at, LANES * in_vectors(call->value_channels) * 4);
}

/* Rows that see a key and have a gradient; of the others nothing is to reach anything, whatever
 * their queries contain. */
static void find_live(Space *space) {
    Tile *tile = &space->tile;
    const Call *call = tile->call;
    const float *e = (const float *)tile->out;
    int32_t live[LANES];
    FOR_LANES(i) {
        live[i] = 0;
        for (int64_t c = 0; c < call->value_channels && i < tile->rows; c++)
            if (e[c * LANES + i] != 0) live[i] = -1;
    }
    memcpy(space->live, live, sizeof live);
}

static void keep(lanes *x, int64_t rows, const vector_mask *mask) {
    for (int64_t c = 0; c < rows; c++) FOR_VECTORS(v) x[c][v] = v_keep(mask[v], x[c][v]);
}

/* gamma_j = e . v_j of a block, 0 where hidden; adds them, weighted, to `sum`. */
REGARD_INLINE void project_block(const int vectors, Space *space, Block block, vector *sum) {
    Tile *tile = &space->tile;
    const float *values = block_of_v(tile, block);
    lanes part;
    FOR_FIRST(v) part[v] = (vector){0};
    for (int64_t key = 0; key < block.count; key += REGARD_ROWS) {
        vector acc[REGARD_ROWS][REGARD_VECTORS];
        FOR_ROWS(r) FOR_FIRST(v) acc[r][v] = (vector){0};
        panel_dot_of(
            vectors, values, tile->keys->v_panel, key, (const lanes *)tile->out, acc
        );
        FOR_ROWS(r) FOR_FIRST(v) {
            const vector weight = tile->weights[block.at + key + r][v];
            vector x = acc[r][v];
            if (block.cut) x = v_keep((vector_mask)(weight != (vector){0}), x);
            space->gamma[block.at + key + r][v] = x;
            part[v] += weight * x;
        }
    }
    FOR_FIRST(v) sum[v] += part[v];
}

/* gamma of all keys and its weighted mean. */
static void project_values(Space *space) {
    Tile *tile = &space->tile;
    lanes sum;
    FOR_VECTORS(v) sum[v] = (vector){0};
    for (int64_t i = 0; i < tile->blocks; i++)
        WITH_VECTORS(tile->vectors, project_block, space, tile_block(tile, i), sum);
    FOR_VECTORS(v) space->average[v] = sum[v] * tile->inverse[v];
}

/* t = sum_j p_j (gamma_j - average) k_j into `right`. */
static void find_right(Space *space) {
    Tile *tile = &space->tile;
    const Panel panel = tile->keys->k_panel;
    const int64_t channels = panel.groups * REGARD_ROWS;
    memset(space->right, 0, (size_t)channels * sizeof(lanes));
    for (int64_t i = 0; i < tile->blocks; i++) {
        const Block block = tile_block(tile, i);
        for (int64_t key = 0; key < block.count; key++) for (int v = 0; v < tile->vectors; v++) {
            const vector x = space->gamma[block.at + key][v] - space->average[v];
            tile->scratch[key][v] = tile->weights[block.at + key][v] * x;
        }
        panel_collect(
            tile->vectors, block_of_k(tile, block), panel, block.count,
            (const lanes *)tile->scratch, space->right
        );
    }
    for (int64_t c = 0; c < channels; c++)
        FOR_VECTORS(v) space->right[c][v] *= tile->inverse[v];
}

/* Weights and their totals, without the mean key. */
static void weigh_only(Tile *tile) {
    const int64_t channels = tile->keys->k_panel.groups * REGARD_ROWS;
    weigh_begin(tile, tile->mean, channels);
    for (int64_t i = 0; i < tile->blocks; i++)
        weigh_block(tile, tile_block(tile, i), tile->mean, 0);
    weigh_end(tile);
}

/* Leaves out the rows that are not `kept`: whatever was found for them reaches nothing. */
static void drop(Space *space, const vector_mask *kept) {
    Tile *tile = &space->tile;
    const int64_t size = tile->keys->k_panel.keys;
    keep(tile->weights, tile->blocks * size, kept);
    keep(space->gamma, tile->blocks * size, kept);
    keep(tile->g, up_to(tile->call->channels, REGARD_ROWS), kept);
    keep(tile->x, up_to(tile->call->channels, REGARD_ROWS), kept);
    keep(space->right, up_to(tile->call->channels, REGARD_ROWS), kept);
    keep(&space->average, 1, kept);
    keep(tile->out, up_to(tile->call->value_channels, REGARD_ROWS), kept);
    FOR_VECTORS(v) space->live[v] &= kept[v];
}

/* g to the tolerance of the backward, from what the forward found, and u. Rows that fail are left
 * to others. */
static void solve_both(Space *space, const Backward *back) {
    Tile *tile = &space->tile;
    const Call *call = tile->call;
    const int64_t channels = tile->keys->k_panel.groups * REGARD_ROWS;
    lanes *m = tile->queries, residual;
    vector_mask failed[REGARD_VECTORS], more[REGARD_VECTORS], steps[REGARD_VECTORS];
    find_ridges(tile); /* where nothing matters, it may be infinite */
    FOR_VECTORS(v) tile->ridge[v] = v_select(space->live[v], tile->ridge[v], v_broadcast(1));
    for (int64_t c = 0; c < channels; c++)
        FOR_VECTORS(v) m[c][v] = v_keep(space->live[v], tile->mean[c][v] - m[c][v]);
    const lanes *first = (const lanes *)m, *second = (const lanes *)space->right;
    if (call->direct) {
        /* The g of the forward, which has refined it, is as good as another. */
        vector_mask sound[REGARD_VECTORS];
        if (back->factors) {
            recall_factors(tile, back->factors, sound);
        } else {
            moments(tile);
            factorise(tile, sound);
        }
        FOR_VECTORS(v) failed[v] = ~sound[v];
        solve_directly(tile, sound, second, tile->x, residual, more);
    } else {
        FOR_VECTORS(v) failed[v] = (vector_mask){0};
        if (back->refines) {
            tile_apply(tile, (const lanes *)tile->g, tile->y);
            for (int64_t c = 0; c < channels; c++)
                FOR_VECTORS(v) tile->r[c][v] = m[c][v] - tile->y[c][v];
            conjugate_gradient(
                tile, first, tile->g, 1, call->tol, call->max_iters, residual, steps
            );
            find_unsolved(tile, residual, failed);
        }
        conjugate_gradient(tile, second, tile->x, 0, call->tol, call->max_iters, residual, steps);
        find_unsolved(tile, residual, more);
    }
    find_noise(tile, first, failed);
    if (!back->rescues) return;
    FOR_VECTORS(v) failed[v] = (failed[v] | more[v]) & space->live[v];
    vector_mask any = {0};
    FOR_VECTORS(v) any |= failed[v];
    if (!v_any(any)) return;
    for (int i = 0; i < tile->rows; i++)
        if (((const int32_t *)failed)[i]) back->failed[tile_row(tile, i)] = 1;
    FOR_VECTORS(v) failed[v] = ~failed[v];
    drop(space, failed);
}

/* [channels][LANES] times a number per row, into [LANES][width]. */
static void transpose(
    const lanes *from, const lanes factor, int64_t channels, float *to, int64_t width
) {
    const float *at = (const float *)from, *factors = (const float *)factor;
    FOR_LANES(i) {
        for (int64_t c = 0; c < channels; c++) to[i * width + c] = at[c * LANES + i] * factors[i];
        for (int64_t c = channels; c < width; c++) to[i * width + c] = 0;
    }
}

/* The factors of `count` keys of a block from `start` on. */
REGARD_INLINE void find_factors(
    const int vectors, Space *space, Block block, int64_t start, int64_t count,
    const lanes *minus_g, const lanes *minus_u, const vector *at_zero, const vector *rest_at_zero,
    int probed, int solved
) {
    Tile *tile = &space->tile;
    const Panel panel = tile->keys->k_panel;
    const float *k = block_of_k(tile, block);
    lanes *ds = space->factors, *rest_of = ds + SUB_KEYS, *factor_of = rest_of + SUB_KEYS;
    for (int64_t j = 0; j < count; j += REGARD_ROWS) {
        const lanes *weights = (const lanes *)tile->weights + block.at + start + j;
        const lanes *gamma = (const lanes *)space->gamma + block.at + start + j;
        vector acc[REGARD_ROWS][REGARD_VECTORS];
        FOR_ROWS(r) FOR_FIRST(v) acc[r][v] = at_zero[v];
        if (probed) panel_dot_of(vectors, k, panel, start + j, minus_g, acc);
        FOR_ROWS(r) FOR_FIRST(v) {
            const vector weight = weights[r][v];
            vector x = weight * acc[r][v];
            if (block.cut) x = v_keep((vector_mask)(weight != (vector){0}), x);
            factor_of[j + r][v] = x;
            acc[r][v] = gamma[r][v] + rest_at_zero[v];
        }
        if (solved) panel_dot_of(vectors, k, panel, start + j, minus_u, acc);
        FOR_ROWS(r) FOR_FIRST(v) {
            const vector weight = weights[r][v];
            vector rest = acc[r][v];
            if (block.cut) rest = v_keep((vector_mask)(weight != (vector){0}), rest);
            ds[j + r][v] = factor_of[j + r][v] * rest + weight * space->base[v];
            rest_of[j + r][v] = weight * rest;
        }
    }
}

static void add_columns(const Space *space, double *to, int64_t count) {
    const lanes *ds = (const lanes *)space->factors;
    for (int64_t j = 0; j < count; j++) {
        vector sum = {0};
        FOR_VECTORS(v) sum += ds[j][v] * space->tile.inverse[v];
        to[j] += v_sum(sum);
    }
}

/* What a tile sends to keys and values, and sum_j dS_j (k_j - centre) into tile->p. */
static void send(Space *space, const Backward *back, const Share *share) {
    Tile *tile = &space->tile;
    const Call *call = tile->call;
    const Keys *keys = tile->keys;
    const Panel panel = keys->k_panel;
    const int64_t channels = panel.groups * REGARD_ROWS;
    const int64_t width = in_vectors(call->channels), width_v = in_vectors(call->value_channels);
    const int solved = back->solves && call->mode == SOLVED, probed = back->probed;
    lanes *minus_g = tile->r, *minus_u = tile->y, *through = tile->p;
    lanes at_zero, rest_at_zero;
    lanes_dot((const lanes *)tile->g, (const lanes *)tile->mean, channels, at_zero);
    lanes_dot((const lanes *)tile->x, (const lanes *)tile->mean, channels, rest_at_zero);
    if (call->intercept) FOR_VECTORS(v) at_zero[v] += 1.0f;
    FOR_VECTORS(v) rest_at_zero[v] -= space->average[v];
    for (int64_t c = 0; c < channels; c++) FOR_VECTORS(v) {
        minus_g[c][v] = -tile->g[c][v];
        minus_u[c][v] = -tile->x[c][v];
    }
    const int64_t rows = tile->vectors * REGARD_WIDTH;
    lanes unscaled; /* the queries were multiplied with log2 e */
    FOR_VECTORS(v) unscaled[v] = tile->inverse[v] * (float)(1 / REGARD_LOG2E);
    if (back->wants_k) {
        const int64_t d = call->channels;
        float *to = space->rows;
        transpose((const lanes *)tile->scaled, unscaled, d, to, width);
        transpose((const lanes *)minus_g, tile->inverse, d, to + LANES * width, width);
        transpose((const lanes *)minus_u, tile->inverse, d, to + 2 * LANES * width, width);
    }
    if (back->wants_v)
        transpose(
            (const lanes *)tile->out, tile->inverse, call->value_channels, space->values, width_v
        );
    memset(through, 0, (size_t)channels * sizeof(lanes));
    if (tile->vectors < REGARD_VECTORS)
        memset(space->factors, 0, 3 * SUB_KEYS * sizeof(lanes)); /* also of rows that are none */
    for (int64_t i = 0; i < tile->blocks; i++) {
        const Block block = tile_block(tile, i);
        for (int64_t start = 0; start < block.count; start += SUB_KEYS) {
            const int64_t left = block.count - start, count = left < SUB_KEYS ? left : SUB_KEYS;
            const int64_t at = block.start + start;
            WITH_VECTORS(
                tile->vectors, find_factors, space, block, start, count, (const lanes *)minus_g,
                (const lanes *)minus_u, at_zero, rest_at_zero, probed, solved
            );
            const lanes *ds = (const lanes *)space->factors;
            if (back->wants_q || back->wants_scale)
                panel_collect(
                    tile->vectors, block_of_k(tile, block) + start * REGARD_ROWS, panel, count, ds,
                    through
                );
            if (back->wants_k)
                spread(
                    rows, ds, solved ? 3 : probed ? 2 : 1, SUB_KEYS, space->rows,
                    share->k + at * width, width, count
                );
            if (back->wants_v)
                spread(
                    rows, ds + 2 * SUB_KEYS, 1, 0, space->values, share->v + at * width_v,
                    width_v, count
                );
            if (back->columns)
                add_columns(space, share->columns + tile->set * set_size(keys, call) + at, count);
        }
    }
    for (int64_t c = 0; c < channels; c++)
        FOR_VECTORS(v) through[c][v] *= tile->inverse[v];
}

/* The results that belong to the rows of the tile. */
static void finish_rows(Space *space, const Backward *back) {
    Tile *tile = &space->tile;
    const Call *call = tile->call;
    const float *through = (const float *)tile->p, *u = (const float *)tile->x;
    const float *row_sum = (const float *)space->row_sum;
    const float *right = (const float *)space->right, *g = (const float *)tile->g;
    const int constant = call->absolute || back->frozen;
    for (int i = 0; i < tile->rows; i++) {
        const int64_t at = tile_row(tile, i), b = tile->keys->b;
        const float sum = constant ? row_sum[i] : 0;
        const float scale = operand_at(call->scale, b, tile->head[i], 0, 0);
        const int live = ((const int32_t *)space->live)[i] != 0;
        float of_scale = 0, agreement = 0;
        for (int64_t c = 0; c < call->channels; c++) {
            const float x = through[c * LANES + i] - sum * tile->keys->centre[c];
            if (back->q) back->q[at * call->channels + c] = u[c * LANES + i] + scale * x;
            if (back->scale && live)
                of_scale += operand_at(call->q, b, tile->head[i], tile->query[i], c) * x;
            agreement += g[c * LANES + i] * u[c * LANES + i];
            if (back->probe) back->probe[at * call->channels + c] = -right[c * LANES + i];
        }
        if (back->scale) back->scale[at] = of_scale;
        if (back->row) back->row[at] = -sum;
        if (back->ridge) {
            if (call->absolute && live) agreement *= expf(-((const float *)tile->lse)[i]);
            back->ridge[at] = agreement;
        }
    }
}

static void do_tile(
    Space *space, const Backward *back, const Keys *keys, int64_t set, int64_t number,
    const Share *share
) {
    Tile *tile = &space->tile;
    const Call *call = &back->call;
    tile_begin(tile, call, keys, set, number);
    tile_narrow(tile);
    const int64_t channels = keys->k_panel.groups * REGARD_ROWS;
    const int64_t of_values = keys->v_panel.groups * REGARD_ROWS;
    tile_gather(tile, back->grad, call->value_channels, tile->out);
    tile_gather(tile, back->slope, call->channels, tile->g);
    find_live(space);
    vector_mask any = {0};
    FOR_VECTORS(v) any |= space->live[v];
    if (!v_any(any)) return;
    keep(tile->scaled, channels, space->live);
    keep(tile->queries, channels, space->live);
    keep(tile->out, of_values, space->live);
    if (back->probed) weigh(tile);
    else weigh_only(tile);
    FOR_VECTORS(v) space->live[v] &= (vector_mask)(tile->total[v] != (vector){0});
    keep(tile->g, channels, space->live);
    keep(tile->mean, channels, space->live); /* it may be infinite, of later keys */
    memset(tile->x, 0, (size_t)channels * sizeof(lanes));
    FOR_VECTORS(v) space->base[v] = space->row_sum[v] = space->average[v] = (vector){0};
    if (back->solves) {
        project_values(space);
        if (!call->intercept) FOR_VECTORS(v) space->average[v] = (vector){0};
        if (back->probed) find_right(space);
        if (call->mode == SOLVED) {
            solve_both(space, back);
            lanes_dot((const lanes *)tile->g, (const lanes *)tile->x, channels, space->row_sum);
            FOR_VECTORS(v) space->row_sum[v] *= tile->ridge[v];
            if (!call->absolute && !back->frozen)
                FOR_VECTORS(v) space->base[v] = space->row_sum[v];
        } else if (back->probed) {
            lanes_dot((const lanes *)tile->g, (const lanes *)space->right, channels, space->base);
        }
    } else {
        memset(space->gamma, 0, (size_t)(tile->blocks * keys->k_panel.keys) * sizeof(lanes));
    }
    if (back->wants_q || back->wants_k || back->wants_v || back->wants_scale || back->columns)
        send(space, back, share);
    finish_rows(space, back);
}

#endif
