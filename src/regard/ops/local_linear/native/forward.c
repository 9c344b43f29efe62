/* The forward of local linear attention: softmax weights, a probe g, output; see call.h.
 *
 *     kbar = sum_j p_j k_j        (C + lambda I) g = kbar - q
 *     o = sum_j p_j (1 - g . (k_j - kbar)) v_j
 *
 * Key heads are taken in waves that fit into a cache. Of each wave first every key head is
 * prepared, then its blocks are packed, then its tiles are computed, the longest first; threads
 * take what is next. A tile writes its own rows only, so the result does not depend on who does it.
 */
#include "solve.h"
#include "threads.h"

#define WAVE_BYTES ((int64_t)2 << 20) /* of packed keys, per thread; at least one head */

/* The output divided by the sum of the signed weights, which is that of the weights but for
 * rounding: so constants come back exactly. Without an intercept they sum to anything. */
static void normalise(Tile *tile, const lanes total) {
    lanes inverse;
    FOR_VECTORS(v) {
        const vector off = total[v] * tile->inverse[v] - 1.0f;
        const vector_mask close = (vector_mask)(off < v_broadcast(0.5f)) &
                                  (vector_mask)(off > v_broadcast(-0.5f));
        inverse[v] = tile->call->intercept ? v_select(close, 1.0f / total[v], tile->inverse[v])
                                           : tile->inverse[v];
    }
    for (int64_t c = 0; c < tile->call->value_channels; c++)
        FOR_VECTORS(v) tile->out[c][v] *= inverse[v];
}

/* Adds weights [count] and what they weigh of the values of a block. */
static void collect_values(Tile *tile, Block block, const lanes *weights, lanes total) {
    add_weights(tile->vectors, block.count, weights, total);
    panel_collect(
        tile->vectors, block_of_v(tile, block), tile->keys->v_panel, block.count, weights, tile->out
    );
}

static void clear_out(Tile *tile, lanes total) {
    FOR_VECTORS(v) total[v] = (vector){0};
    memset(tile->out, 0, (size_t)(tile->keys->v_panel.groups * REGARD_ROWS) * sizeof(lanes));
}

REGARD_INLINE void sum_signed_(
    const int vectors, const Tile *tile, Block block, const vector *constant, vector *total
) {
    const float *k = block_of_k(tile, block);
    lanes sum;
    FOR_FIRST(v) sum[v] = (vector){0};
    for (int64_t key = 0; key < block.count; key += REGARD_ROWS) {
        vector acc[REGARD_ROWS][REGARD_VECTORS];
        FOR_ROWS(r) FOR_FIRST(v) acc[r][v] = constant[v];
        panel_dot_of(vectors, k, tile->keys->k_panel, key, (const lanes *)tile->x, acc);
        lanes part;
        FOR_FIRST(v) part[v] = (vector){0};
        FOR_ROWS(r) FOR_FIRST(v) {
            const vector weight = tile->weights[block.at + key + r][v];
            part[v] += v_keep((vector_mask)(weight != (vector){0}), weight * acc[r][v]);
        }
        FOR_FIRST(v) sum[v] += part[v];
    }
    FOR_FIRST(v) total[v] += sum[v];
}

/* `constant` less what the signed weights w_j (constant + x . k_j) then sum to beyond 1: the
 * rounding of g . kbar. */
static void balance(const Tile *tile, lanes constant) {
    lanes total;
    FOR_VECTORS(v) total[v] = (vector){0};
    for (int64_t i = 0; i < tile->blocks; i++)
        WITH_VECTORS(tile->vectors, sum_signed_, tile, tile_block(tile, i), constant, total);
    FOR_VECTORS(v) {
        const vector excess = total[v] * tile->inverse[v] - 1.0f;
        const vector_mask close = (vector_mask)(excess < v_broadcast(0.5f)) &
                                  (vector_mask)(excess > v_broadcast(-0.5f));
        constant[v] -= v_keep(close, excess);
    }
}

/* g solved for: sum_j w_j (1 + g . kbar - g . k_j) v_j. */
static void attend_solved(Tile *tile) {
    const Call *call = tile->call;
    const Panel panel = tile->keys->k_panel;
    const int64_t channels = panel.groups * REGARD_ROWS;
    weigh(tile);
    solve(tile);
    lanes constant, total;
    lanes_dot(tile->g, tile->mean, channels, constant);
    if (call->intercept) FOR_VECTORS(v) constant[v] += 1.0f;
    for (int64_t c = 0; c < channels; c++) FOR_VECTORS(v) tile->x[c][v] = -tile->g[c][v];
    if (call->intercept && call->precise) balance(tile, constant);
    clear_out(tile, total);
    for (int64_t i = 0; i < tile->blocks; i++) {
        const Block block = tile_block(tile, i);
        panel_weigh(
            tile->vectors, block_of_k(tile, block), panel, block.count, (const lanes *)tile->x,
            constant, (const lanes *)tile->weights + block.at, tile->scratch, block.cut
        );
        collect_values(tile, block, (const lanes *)tile->scratch, total);
    }
    normalise(tile, total);
}

REGARD_INLINE void multiply_block_(
    const int vectors, Tile *tile, Block block, const lanes *weights, vector *sum
) {
    lanes *products = tile->products + block.at, whole;
    const float *k = block_of_k(tile, block);
    FOR_FIRST(v) whole[v] = (vector){0};
    for (int64_t key = 0; key < block.count; key += REGARD_ROWS) {
        vector acc[REGARD_ROWS][REGARD_VECTORS];
        FOR_ROWS(r) FOR_FIRST(v) acc[r][v] = (vector){0};
        panel_dot_of(vectors, k, tile->keys->k_panel, key, (const lanes *)tile->g, acc);
        lanes part;
        FOR_FIRST(v) part[v] = (vector){0};
        FOR_ROWS(r) FOR_FIRST(v) {
            const vector weight = weights[key + r][v];
            const vector x = v_keep((vector_mask)(weight != (vector){0}), acc[r][v]);
            products[key + r][v] = x;
            part[v] += weight * x;
        }
        FOR_FIRST(v) whole[v] += part[v];
    }
    FOR_FIRST(v) sum[v] += whole[v];
}

/* Products g . k_j of a block, 0 where hidden; adds them, weighted, to `sum`. */
static void multiply_block(Tile *tile, Block block, const lanes *weights, lanes sum) {
    WITH_VECTORS(tile->vectors, multiply_block_, tile, block, weights, sum);
}

/* g given: no mean key is needed, only its product with g. */
static void attend_given(Tile *tile) {
    lanes at_mean[1], constant, total;
    tile_gather(tile, tile->call->probe, tile->call->channels, tile->g);
    weigh_begin(tile, at_mean, 1);
    for (int64_t i = 0; i < tile->blocks; i++) {
        const Block block = tile_block(tile, i);
        const lanes *weights = weigh_block(tile, block, at_mean, 1);
        multiply_block(tile, block, weights, at_mean[0]);
    }
    weigh_end(tile);
    clear_out(tile, total);
    FOR_VECTORS(v) constant[v] = 1.0f + at_mean[0][v] * tile->inverse[v];
    for (int64_t i = 0; i < tile->blocks; i++) {
        const Block block = tile_block(tile, i);
        for (int64_t key = 0; key < block.count; key++) {
            const int64_t j = block.at + key;
            for (int v = 0; v < tile->vectors; v++)
                tile->scratch[key][v] = tile->weights[j][v] * (constant[v] - tile->products[j][v]);
        }
        collect_values(tile, block, (const lanes *)tile->scratch, total);
    }
    normalise(tile, total);
}

/* g = 0: softmax attention, one pass. */
static void attend_average(Tile *tile) {
    const Panel panel = tile->keys->v_panel;
    weigh_begin(tile, tile->out, panel.groups * REGARD_ROWS);
    for (int64_t i = 0; i < tile->blocks; i++) {
        const Block block = tile_block(tile, i);
        const lanes *weights = weigh_block(tile, block, tile->out, panel.groups * REGARD_ROWS);
        panel_collect(
            tile->vectors, block_of_v(tile, block), panel, block.count, weights, tile->out
        );
    }
    weigh_end(tile);
    for (int64_t c = 0; c < tile->call->value_channels; c++)
        FOR_VECTORS(v) tile->out[c][v] *= tile->inverse[v];
}

static void compute_tile(
    Tile *tile, const Call *call, const Keys *keys, int64_t set, int64_t number
) {
    tile_begin(tile, call, keys, set, number);
    tile_narrow(tile);
    if (call->mode == SOLVED) attend_solved(tile);
    else if (call->mode == GIVEN) attend_given(tile);
    else attend_average(tile);
    tile_scatter(tile, (const lanes *)tile->out, call->value_channels, call->out);
    if (call->mode != AVERAGE)
        tile_scatter(tile, (const lanes *)tile->g, call->channels, call->slope);
    if (call->mode == SOLVED && call->direct && call->factors) keep_factors(tile, call->factors);
    for (int i = 0; i < tile->rows; i++) {
        const int64_t at = tile_row(tile, i);
        call->lse[at] = ((const float *)tile->lse)[i];
        if (call->mode == AVERAGE)
            memset(call->slope + at * call->channels, 0, (size_t)call->channels * sizeof(float));
        if (call->mode != SOLVED) continue;
        call->iterations[at] = ((const int32_t *)tile->iterations)[i];
        call->residual[at] = ((const float *)tile->residual)[i];
        call->failed[at] = ((const int32_t *)tile->failed)[i] != 0;
    }
}

typedef struct {
    const Call *call;
    Team team;
    Keys *keys;      /* [heads of a wave] */
    Tile *tiles;     /* [threads] */
    int64_t wave;    /* key heads at once */
    int64_t sets;    /* of rows, per key head */
    int64_t per_set; /* tiles */
    int64_t blocks;  /* per key head, at most */
    int64_t counters[]; /* [waves][3] */
} Plan;

/* One thread's part of all waves. */
static void work(void *shared, int64_t thread) {
    Plan *plan = shared;
    const Call *call = plan->call;
    const int64_t all = call->batch * call->key_heads;
    int64_t *counters = plan->counters;
    for (int64_t start = 0; start < all; start += plan->wave, counters += 3) {
        const int64_t count = all - start < plan->wave ? all - start : plan->wave;
        int64_t next;
        while ((next = take_next(counters)) < count)
            keys_prepare(
                plan->keys + next, call, (start + next) / call->key_heads,
                (start + next) % call->key_heads
            );
        team_barrier(&plan->team);
        while ((next = take_next(counters + 1)) < count * plan->blocks) {
            keys_pack(plan->keys + next / plan->blocks, call, next % plan->blocks);
            outer_pack(plan->keys + next / plan->blocks, call, next % plan->blocks);
        }
        team_barrier(&plan->team);
        const int64_t tiles = plan->per_set * plan->sets;
        while ((next = take_next(counters + 2)) < count * tiles) {
            /* From the last, the longest if causal, to the first; of one thread, head by head. */
            const int64_t head = plan->team.count > 1 ? next % count : next / tiles;
            const int64_t one = plan->team.count > 1 ? next / count : next % tiles;
            const int64_t number = plan->per_set - 1 - one % plan->per_set;
            compute_tile(
                plan->tiles + thread, call, plan->keys + head, one / plan->per_set, number
            );
        }
        team_barrier(&plan->team);
    }
}

/* Computes a call; REGARD_NO_MEMORY if it could not. */
REGARD_EXPORT(int64_t, local_linear_forward)
(const Call *call) {
    const int64_t fold = folded_heads(call), all = call->batch * call->key_heads;
    if (!all || !call->queries) return 0;
    const int64_t outer = outer_channels(call), threads = call->threads > 1 ? call->threads : 1;
    Keys one;
    Tile tile;
    char *head_end = 0, *tile_end = 0;
    keys_lay_out(&one, call, outer, &head_end);
    tile_lay_out(&tile, call, matrix_rows(call), &tile_end);
    const int64_t head_bytes = (intptr_t)head_end, tile_bytes = (intptr_t)tile_end;
    int64_t wave = WAVE_BYTES * threads / (head_bytes + 1) + 1;
    if (wave > all) wave = all;
    const int64_t waves = (all + wave - 1) / wave;
    const int64_t plan_bytes = aligned_bytes((int64_t)sizeof(Plan) + waves * 3 * 8);
    const int64_t keys_bytes = aligned_bytes(wave * (int64_t)sizeof(Keys));
    const int64_t tiles_bytes = aligned_bytes(threads * (int64_t)sizeof(Tile));
    char *space = aligned_block(
        plan_bytes + keys_bytes + tiles_bytes + wave * head_bytes + threads * tile_bytes
    );
    if (!space) return REGARD_NO_MEMORY;
    char *at = space;
    Plan *plan = take_bytes(&at, plan_bytes);
    plan->keys = take_bytes(&at, keys_bytes);
    plan->tiles = take_bytes(&at, tiles_bytes);
    for (int64_t i = 0; i < wave; i++) keys_lay_out(plan->keys + i, call, outer, &at);
    for (int64_t i = 0; i < threads; i++)
        tile_lay_out(plan->tiles + i, call, matrix_rows(call), &at);
    plan->call = call;
    plan->wave = wave;
    plan->sets = call->heads / call->key_heads / fold;
    plan->per_set = (call->queries * fold + LANES - 1) / LANES;
    plan->blocks = (call->keys + block_keys(call->channels) - 1) / block_keys(call->channels);
    memset(plan->counters, 0, (size_t)(waves * 3 * 8));
    run_team(&plan->team, threads, work, plan);
    free_block(space);
    return 0;
}

/* Bytes of the structure that Python has to fill in. */
REGARD_EXPORT(int64_t, local_linear_call_size)
(void) { return sizeof(Call); }
