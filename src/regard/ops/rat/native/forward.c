/* Every query attends to the ends of finished chunks and to its own running key; see call.h.
 *
 * A tile is LANES queries of a head. The maximum starts at the score of a query's own key, which
 * always is there, and is raised block by block.
 */
#include "ends.h"

typedef struct {
    lanes *x;        /* queries, turned and scaled to base 2, [channels] */
    lanes *sum;      /* weighted values, [channels] */
    lanes *weights;  /* [BLOCK] */
    float *rows;     /* [BLOCK][D] */
} Tile;

typedef struct {
    const Call *call;
    Ends *ends;
    Tile *tiles;
    int64_t heads_done, tiles_done;
    Team team;
} Plan;

static void tile_lay_out(Tile *tile, const Call *call, char **at) {
    const int64_t padded = up_to(call->channels, R);
    tile->x = take_bytes(at, padded * (int64_t)sizeof(lanes));
    tile->sum = take_bytes(at, padded * (int64_t)sizeof(lanes));
    tile->weights = take_bytes(at, BLOCK * (int64_t)sizeof(lanes));
    tile->rows = take_bytes(at, BLOCK * call->channels * (int64_t)sizeof(float));
}

REGARD_INLINE void attend_block(
    Tile *tile, const Ends *ends, Panel panel, int64_t block, int64_t last, const lanes sees,
    lanes top, lanes total, const int cut
) {
    const int64_t first = block * BLOCK, left = up_to(last - first, R);
    const int64_t count = left < BLOCK ? left : BLOCK;
    lanes most, sum;
    FOR_VECTORS(v) most[v] = top[v], sum[v] = (vector){0};
    for (int64_t key = 0; key < count; key += R) {
        vector s[R][REGARD_VECTORS];
        scores_of(
            ends->k + block * panel.floats, panel, key, first, (const lanes *)tile->x, sees, cut, s
        );
        FOR_ROWS(r) FOR_VECTORS(v) {
            tile->weights[key + r][v] = s[r][v];
            most[v] = v_max(most[v], s[r][v]);
        }
    }
    int raised = 0;
    FOR_VECTORS(v) raised |= v_any((vector_mask)(most[v] > top[v]));
    if (raised) {
        lanes factor;
        FOR_VECTORS(v) {
            factor[v] = v_exp2(top[v] - most[v]);
            total[v] *= factor[v];
            top[v] = most[v];
        }
        for (int64_t c = 0; c < panel.groups * R; c++)
            FOR_VECTORS(v) tile->sum[c][v] *= factor[v];
    }
    for (int64_t key = 0; key < count; key++)
        FOR_VECTORS(v) {
            const vector p = v_exp2(tile->weights[key][v] - top[v]);
            tile->weights[key][v] = p;
            sum[v] += p;
        }
    FOR_VECTORS(v) total[v] += sum[v];
    panel_collect(
        REGARD_VECTORS, ends->v + block * panel.floats, panel, count,
        (const lanes *)tile->weights, tile->sum
    );
}

static void compute_tile(
    Tile *tile, const Call *call, const Ends *ends, int64_t b, int64_t h, int64_t start
) {
    const int64_t D = call->channels, hk = h / (call->heads / call->key_heads);
    const int64_t rows = call->queries - start < LANES ? call->queries - start : LANES;
    const Panel panel = panel_of(BLOCK, D);
    const float unit = (float)(call->scale * REGARD_LOG2E);
    lanes sees, top, total;
    float *own = (float *)top, *last = (float *)sees;
    memset(tile->x, 0, (size_t)(panel.groups * R) * sizeof(lanes));
    memset(tile->sum, 0, (size_t)(panel.groups * R) * sizeof(lanes));
    FOR_VECTORS(v) sees[v] = top[v] = total[v] = (vector){0};
    int64_t most = 0, least = INT64_MAX;
    float self[LANES], *row = tile->rows;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t place = place_of(call, b, start + i);
        const float *q = row_of(call->q, b, h, start + i);
        self[i] = 0;
        if (place >= 0) {
            self[i] = unit * dot(q, row_of(call->k, b, hk, place), D);
            last[i] = (float)(ends->old + place / call->chunk);
            turn(call, b, place / call->chunk, 1, q, row);
            for (int64_t c = 0; c < D; c++) ((float *)tile->x)[c * LANES + i] = unit * row[c];
        }
        own[i] = self[i];
        const int64_t mine = (int64_t)last[i];
        most = mine > most ? mine : most;
        least = mine < least ? mine : least;
    }
    if (rows < LANES) least = 0;
    for (int64_t block = 0; block * BLOCK < most; block++) {
        if (up_to(block * BLOCK + BLOCK < most ? block * BLOCK + BLOCK : most, R) <= least)
            attend_block(tile, ends, panel, block, most, sees, top, total, 0);
        else attend_block(tile, ends, panel, block, most, sees, top, total, 1);
    }
    for (int64_t i = 0; i < rows; i++) {
        const int64_t place = place_of(call, b, start + i);
        const int64_t at = (b * call->heads + h) * call->queries + start + i;
        float *out = call->out + at * D;
        if (place < 0) {
            memset(out, 0, (size_t)D * sizeof(float));
            call->lse[at] = INFINITY;
            continue;
        }
        const float weight = exp2f(self[i] - own[i]), all = ((float *)total)[i] + weight;
        const float inverse = 1 / all, mine = weight / all;
        const float *v = row_of(call->v, b, hk, place);
        for (int64_t c = 0; c < D; c++)
            out[c] = ((float *)tile->sum)[c * LANES + i] * inverse + mine * v[c];
        call->lse[at] = own[i] + log2f(all);
    }
}

static void work(void *shared, int64_t thread) {
    Plan *plan = shared;
    const Call *call = plan->call;
    Tile *tile = plan->tiles + thread;
    const int64_t key_heads = call->batch * call->key_heads, group = call->heads / call->key_heads;
    for (int64_t n; (n = take_next(&plan->heads_done)) < key_heads;)
        ends_pack(plan->ends + n, call, n / call->key_heads, n % call->key_heads, tile->rows);
    team_barrier(&plan->team);
    const int64_t per_head = (call->queries + LANES - 1) / LANES;
    for (int64_t n; (n = take_next(&plan->tiles_done)) < call->batch * call->heads * per_head;) {
        const int64_t head = n / per_head, number = per_head - 1 - n % per_head;
        const int64_t b = head / call->heads, h = head % call->heads;
        const Ends *ends = plan->ends + b * call->key_heads + h / group;
        compute_tile(tile, call, ends, b, h, number * LANES);
    }
}

/* Computes a call; REGARD_NO_MEMORY if it could not. */
REGARD_EXPORT(int64_t, rat_forward)
(const Call *call) {
    const int64_t heads = call->batch * call->key_heads;
    const int64_t threads = call->threads > 1 ? call->threads : 1;
    if (!heads || !call->queries) return 0;
    Ends one;
    Tile tile;
    char *head_end = 0, *tile_end = 0;
    ends_lay_out(&one, call, &head_end);
    tile_lay_out(&tile, call, &tile_end);
    const int64_t of_ends = aligned_bytes(heads * (int64_t)sizeof(Ends));
    const int64_t of_tiles = aligned_bytes(threads * (int64_t)sizeof(Tile));
    char *space = aligned_block(
        of_ends + of_tiles + heads * (int64_t)(intptr_t)head_end +
        threads * (int64_t)(intptr_t)tile_end
    );
    if (!space) return REGARD_NO_MEMORY;
    char *at = space;
    Plan plan = {.call = call};
    plan.ends = take_bytes(&at, of_ends);
    plan.tiles = take_bytes(&at, of_tiles);
    for (int64_t i = 0; i < heads; i++) ends_lay_out(plan.ends + i, call, &at);
    for (int64_t i = 0; i < threads; i++) tile_lay_out(plan.tiles + i, call, &at);
    run_team(&plan.team, threads, work, &plan);
    free_block(space);
    return 0;
}

REGARD_EXPORT(int64_t, rat_call_size)
(void) { return sizeof(Call); }
