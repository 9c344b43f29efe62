/* Scores, their exponentials, the sum of these and a weighted sum of rows, in one pass: the
 * weights of online.h. */
#ifndef LOCAL_LINEAR_WEIGH_H
#define LOCAL_LINEAR_WEIGH_H

#include "online.h"
#include "tile.h"

static inline lanes *weights_of(const Tile *tile, Block block) {
    return tile->call->mode == AVERAGE ? tile->weights : tile->weights + block.at;
}

REGARD_INLINE void score_block_(
    const int vectors, Tile *tile, Block block, lanes *scores, vector *top
) {
    const Keys *keys = tile->keys;
    const int64_t offset = tile->set * set_size(keys, tile->call) + block.start;
    const float *panel = block_of_k(tile, block);
    const float *bias = keys->bias ? keys->bias + offset : 0;
    const double *decay = keys->decay ? keys->decay + offset : 0;
    const vector nothing = v_broadcast(-INFINITY);
    lanes most;
    FOR_VECTORS(v) most[v] = nothing;
    for (int64_t key = 0; key < block.count; key += REGARD_ROWS) {
        vector acc[REGARD_ROWS][REGARD_VECTORS];
        FOR_ROWS(r) FOR_FIRST(v) acc[r][v] = (vector){0};
        panel_dot_of(vectors, panel, keys->k_panel, key, (const lanes *)tile->scaled, acc);
        if (bias) {
            FOR_ROWS(r) FOR_FIRST(v) acc[r][v] += v_broadcast(bias[key + r]);
        }
        if (decay) { /* in double: the sums are large, their difference need not be */
            FOR_ROWS(r) {
                float difference[LANES];
                FOR_LANES(i) difference[i] = (float)(tile->decay[i] - decay[key + r]);
                FOR_FIRST(v) acc[r][v] +=
                    (float)REGARD_LOG2E * v_load(difference + v * REGARD_WIDTH);
            }
        }
        if (block.cut) {
            FOR_ROWS(r) FOR_FIRST(v) {
                const int32_t number = (int32_t)(block.start + key) + r;
                const vector_mask seen = (tile->low[v] <= number) & (tile->high[v] > number);
                acc[r][v] = v_select(seen, acc[r][v], nothing);
            }
        }
        FOR_ROWS(r) FOR_FIRST(v) {
            scores[key + r][v] = acc[r][v];
            most[v] = v_max(acc[r][v], most[v]);
        }
    }
    FOR_VECTORS(v) top[v] = most[v];
}

/* Scores of a block, -inf where hidden, into the place of its weights; `top` is their maximum. */
REGARD_SHARED void score_block(Tile *tile, Block block, lanes *scores, lanes top) {
    WITH_VECTORS(tile->vectors, score_block_, tile, block, scores, top);
}

/* Raises the shift of the rows whose maximum asks for it; `sum` [channels] has been weighted. */
REGARD_SHARED void raise_shift(
    Tile *tile, Block block, const lanes top, lanes *sum, int64_t channels
) {
    lanes factor;
    if (!online_raise(top, tile->shift, tile->total, factor)) return;
    for (int64_t c = 0; c < channels; c++) FOR_VECTORS(v) sum[c][v] *= factor[v];
    if (tile->call->mode == AVERAGE) return;
    for (int64_t j = 0; j < block.at; j++) FOR_VECTORS(v) tile->weights[j][v] *= factor[v];
}

/* lse of the original scores, natural; -inf where no key is seen. */
REGARD_SHARED void find_lse(Tile *tile) {
    const Call *call = tile->call;
    const float *total = (const float *)tile->total, *shift = (const float *)tile->shift;
    double bits[LANES];
    FOR_LANES(i) bits[i] = (double)shift[i] + log2((double)total[i]);
    for (int64_t c = 0; c < call->channels && call->intercept; c++) { /* what centring took off */
        const double centre = (double)tile->keys->centre[c];
        const float *scaled = (const float *)tile->scaled[c];
        FOR_LANES(i) bits[i] += (double)scaled[i] * centre;
    }
    FOR_LANES(i) {
        double lse = bits[i] / REGARD_LOG2E;
        if (call->row_bias.data)
            lse += operand_at(call->row_bias, tile->keys->b, tile->head[i], tile->query[i], 0);
        ((float *)tile->lse)[i] = total[i] == 0 ? -INFINITY : (float)lse;
    }
}

/* What the passes over the blocks begin with. */
REGARD_SHARED void weigh_begin(Tile *tile, lanes *sum, int64_t channels) {
    FOR_VECTORS(v) {
        tile->shift[v] = v_broadcast(-INFINITY);
        tile->total[v] = (vector){0};
    }
    memset(sum, 0, (size_t)channels * sizeof(lanes));
}

REGARD_SHARED void weigh_end(Tile *tile) {
    FOR_VECTORS(v) {
        const vector_mask some = (vector_mask)(tile->total[v] > (vector){0});
        tile->inverse[v] = v_keep(some, 1.0f / tile->total[v]);
    }
    find_lse(tile);
}

/* The weights of one block, with the sum of earlier ones brought to its shift. */
REGARD_SHARED lanes *weigh_block(Tile *tile, Block block, lanes *sum, int64_t channels) {
    lanes *weights = weights_of(tile, block), top;
    score_block(tile, block, weights, top);
    raise_shift(tile, block, top, sum, channels);
    online_weigh(tile->vectors, weights, block.count, tile->shift, tile->total);
    return weights;
}

REGARD_INLINE void add_weights_(
    const int vectors, int64_t count, const lanes *weights, vector *total
) {
    lanes sum;
    FOR_FIRST(v) sum[v] = (vector){0};
    for (int64_t key = 0; key < count; key += REGARD_ROWS) {
        lanes part;
        FOR_FIRST(v) part[v] = (vector){0};
        FOR_ROWS(r) FOR_FIRST(v) part[v] += weights[key + r][v];
        FOR_FIRST(v) sum[v] += part[v];
    }
    FOR_FIRST(v) total[v] += sum[v];
}

/* total += weights [count] */
REGARD_SHARED void add_weights(int vectors, int64_t count, const lanes *weights, lanes total) {
    WITH_VECTORS(vectors, add_weights_, count, weights, total);
}

/* Weights of all keys, their totals, and their mean key. */
REGARD_SHARED void weigh(Tile *tile) {
    const Panel panel = tile->keys->k_panel;
    const int64_t channels = panel.groups * REGARD_ROWS;
    weigh_begin(tile, tile->mean, channels);
    for (int64_t i = 0; i < tile->blocks; i++) {
        const Block block = tile_block(tile, i);
        const lanes *weights = weigh_block(tile, block, tile->mean, channels);
        if (tile->call->intercept)
            panel_collect(
                tile->vectors, block_of_k(tile, block), panel, block.count, weights, tile->mean
            );
    }
    weigh_end(tile);
    for (int64_t c = 0; c < channels; c++)
        FOR_VECTORS(v) tile->mean[c][v] *= tile->inverse[v];
}

#endif
