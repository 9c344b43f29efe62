/* The forward of attention to lists of rows; see call.h.
 *
 * Threads take block after block of queries, from the last, the longest if causal, to the first. A
 * block writes its own rows only, so the result does not depend on who does it.
 */
#include "threads.h"
#include "tile.h"

#define BAD_PLAN (-2) /* a level or an index that may not be */

typedef struct {
    List list;
    Piece piece;
    Tile tiles[MOST_TILES];
    lanes *weights; /* [PIECE] */
} Space;

typedef struct {
    Shape shape;
    Team team;
    Space *spaces; /* [threads] */
    int64_t next, bad;
} Plan;

static void space_lay_out(Space *space, const Shape *shape, char **at) {
    list_lay_out(&space->list, shape->call, shape->longest, at);
    piece_lay_out(&space->piece, shape, at);
    for (int i = 0; i < MOST_TILES; i++) tile_lay_out(space->tiles + i, shape, at);
    space->weights = take_bytes(at, PIECE * (int64_t)sizeof(lanes));
}

static void attend_begin(Tile *tile, const Shape *shape) {
    FOR_VECTORS(v) {
        tile->shift[v] = v_broadcast(-INFINITY);
        tile->total[v] = (vector){0};
    }
    memset(tile->out, 0, (size_t)padded(shape->v_panel) * sizeof(lanes));
}

static void attend(Tile *tile, const Shape *shape, const Piece *piece, lanes *weights) {
    const Part part = part_of(tile, piece);
    const int64_t count = part.to - part.from;
    if (!count) return;
    lanes top, factor;
    score(tile, shape, piece, part, weights, top);
    if (online_raise(top, tile->shift, tile->total, factor))
        for (int64_t c = 0; c < padded(shape->v_panel); c++)
            FOR_VECTORS(v) tile->out[c][v] *= factor[v];
    online_weigh(tile->vectors, weights + part.from, count, tile->shift, tile->total);
    panel_collect(
        tile->vectors, piece->v + part.from * REGARD_ROWS, shape->v_panel, count,
        (const lanes *)weights + part.from, tile->out
    );
}

static void attend_end(Tile *tile, const Shape *shape) {
    const Call *call = shape->call;
    FOR_VECTORS(v) {
        const vector_mask some = (vector_mask)(tile->total[v] > (vector){0});
        const vector inverse = v_keep(some, 1.0f / tile->total[v]);
        for (int64_t c = 0; c < call->value_channels; c++) tile->out[c][v] *= inverse;
    }
    tile_scatter(tile, (const lanes *)tile->out, call->value_channels, 1, call->out);
    const float *shift = (const float *)tile->shift, *total = (const float *)tile->total;
    for (int i = 0; i < tile->rows; i++) {
        if (tile->at[i] < 0) continue;
        const double bits = (double)shift[i] + log2((double)total[i]);
        call->lse[tile->at[i]] = total[i] == 0 ? -INFINITY : (float)(bits / REGARD_LOG2E);
    }
}

static void do_job(Space *space, Plan *plan, Job job) {
    const Shape *shape = &plan->shape;
    const int64_t all = job_rows(shape, job);
    if (!make_list(&space->list, shape->call, job.plan, job.number)) {
        __atomic_store_n(&plan->bad, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t begin = 0; begin < all; begin += MOST_TILES * LANES) {
        const int64_t rows = smaller(all - begin, MOST_TILES * LANES), tiles = tiles_for(rows);
        const int64_t each = rows_of_tile(rows, tiles);
        int64_t count = 0;
        for (int64_t at = 0; at < rows; at += each, count++) {
            tile_begin(space->tiles + count, shape, job, begin + at, smaller(each, rows - at));
            attend_begin(space->tiles + count, shape);
        }
        for (int64_t number = 0; number * PIECE < space->list.count; number++) {
            piece_pack(&space->piece, shape, job, &space->list, number);
            for (int64_t i = 0; i < count; i++)
                attend(space->tiles + i, shape, &space->piece, space->weights);
        }
        for (int64_t i = 0; i < count; i++) attend_end(space->tiles + i, shape);
    }
}

static void work(void *shared, int64_t thread) {
    Plan *plan = shared;
    const Shape *shape = &plan->shape;
    const int64_t lists = shape->call->lists, per_row = shape->units * lists;
    int64_t next;
    while ((next = take_next(&plan->next)) < shape->call->batch * per_row) {
        const int64_t within = next % per_row, number = lists - 1 - within % lists;
        do_job(plan->spaces + thread, plan, job_of(shape, next / per_row, within / lists, number));
    }
}

/* Computes a call; REGARD_NO_MEMORY or BAD_PLAN if it could not. */
REGARD_EXPORT(int64_t, block_sparse_forward)
(const Call *call) {
    if (!call->batch || !call->heads || !call->lists) return 0;
    const int64_t threads = call->threads > 1 ? call->threads : 1;
    Plan plan = {.shape = shape_of(call)};
    Space one;
    char *end = 0;
    space_lay_out(&one, &plan.shape, &end);
    const int64_t spaces = aligned_bytes(threads * (int64_t)sizeof(Space));
    char *memory = aligned_block(spaces + threads * (intptr_t)end);
    if (!memory) return REGARD_NO_MEMORY;
    char *at = memory;
    plan.spaces = take_bytes(&at, spaces);
    for (int64_t i = 0; i < threads; i++) {
        space_lay_out(plan.spaces + i, &plan.shape, &at);
        list_prepare(&plan.spaces[i].list, call);
        piece_prepare(&plan.spaces[i].piece, &plan.shape);
    }
    run_team(&plan.team, threads, work, &plan);
    free_block(memory);
    return plan.bad ? BAD_PLAN : 0;
}

/* Bytes of the structure that Python has to fill in. */
REGARD_EXPORT(int64_t, block_sparse_call_size)
(void) { return sizeof(Call); }
