/* The backward of attention to lists of rows: the forward's tiles and pieces, the weights again.
 *
 * With e the gradient of an output o, p the weights and s_j = p_j (e . v_j - e . o):
 *
 *     dq = sum_j s_j k_j      dk_j = sum_i s_ij q_i      dv_j = sum_i p_ij e_i      db_j = sum_i s_ij
 *
 * with the scale as a factor of dq and dk.
 *
 * The blocks of queries of each key head are dealt out to a number of shares that depends on the
 * plan's size alone. The first share adds to the results; every other one has sums of its own, which
 * are added afterwards, in order. So the result does not depend on how many threads there are.
 */
#include "reduce.h"
#include "spread.h"
#include "threads.h"
#include "tile.h"

#define MOST_SHARES 4
#define BLOCKS_PER_SHARE 8

/* Gradients of the rows of one key head. */
typedef struct {
    float *k, *v, *bias; /* [rows][channels], [rows][value channels], [rows] or NULL */
} Share;

typedef struct {
    Tile tile;     /* its `out` is e */
    lanes *dq;     /* [channels] */
    float *q, *e;  /* [LANES][channels in vectors]: rows of the same */
    lanes lse, less; /* log2 of the normaliser; e . o */
    vector_mask live[REGARD_VECTORS]; /* rows that see something and have a gradient */
} Back;

typedef struct {
    List list;
    Piece piece;
    Back backs[MOST_TILES];
    lanes *p, *s;        /* [PIECE] */
    float *dk, *dv, *db; /* of a piece, [PIECE][channels in vectors], [PIECE] */
} Space;

typedef struct {
    Shape shape;
    Team team;
    Space *spaces;  /* [threads] */
    Share *shares;  /* [heads of a wave][slots] */
    int64_t count;  /* shares */
    int64_t slots;  /* shares at once */
    int64_t wave;   /* key heads at once */
    int64_t *counters; /* [waves][rounds][2] */
} Plan;

static inline int64_t in_vectors(int64_t channels) { return up_to(channels, REGARD_WIDTH); }

static void space_lay_out(Space *space, const Shape *shape, char **at) {
    const Call *call = shape->call;
    const int64_t wide_k = in_vectors(call->channels), wide_v = in_vectors(call->value_channels);
    list_lay_out(&space->list, call, shape->longest, at);
    piece_lay_out(&space->piece, shape, at);
    for (int i = 0; i < MOST_TILES; i++) {
        Back *back = space->backs + i;
        tile_lay_out(&back->tile, shape, at);
        back->dq = take_bytes(at, padded(shape->k_panel) * (int64_t)sizeof(lanes));
        back->q = take_bytes(at, LANES * wide_k * 4);
        back->e = take_bytes(at, LANES * wide_v * 4);
    }
    space->p = take_bytes(at, PIECE * (int64_t)sizeof(lanes));
    space->s = take_bytes(at, PIECE * (int64_t)sizeof(lanes));
    space->dk = take_bytes(at, PIECE * wide_k * 4);
    space->dv = take_bytes(at, PIECE * wide_v * 4);
    space->db = take_bytes(at, PIECE * 4);
}

static void share_lay_out(Share *share, const Call *call, char **at) {
    share->k = take_bytes(at, call->rows * call->channels * 4);
    share->v = take_bytes(at, call->rows * call->value_channels * 4);
    share->bias = call->d_bias ? take_bytes(at, call->rows * 4) : 0;
}

/* Rows of the lanes in [LANES][width] times a factor, 0 for those that are not live. */
static void copy_rows(
    const Back *back, const float *from, int64_t channels, float factor, float *to
) {
    const int64_t width = in_vectors(channels);
    for (int i = 0; i < back->tile.rows; i++, to += width) {
        memset(to, 0, (size_t)width * sizeof(float));
        if (!((const int32_t *)back->live)[i]) continue;
        const float *row = from + back->tile.at[i] * channels;
        for (int64_t c = 0; c < channels; c++) to[c] = row[c] * factor;
    }
}

static void back_begin(Back *back, const Shape *shape, Job job, int64_t place, int64_t rows) {
    const Call *call = shape->call;
    Tile *tile = &back->tile;
    tile_begin(tile, shape, job, place, rows);
    FOR_LANES(i) {
        const int64_t at = i < tile->rows ? tile->at[i] : -1;
        const float lse = at < 0 ? -INFINITY : call->lse[at];
        double less = 0;
        int live = 0;
        for (int64_t c = 0; c < call->value_channels && lse != -INFINITY; c++) {
            const float e = call->d_out[at * call->value_channels + c];
            if (e == 0) continue; /* what no loss looks at may be anything */
            live = -1;
            less += (double)e * (double)call->out[at * call->value_channels + c];
        }
        ((int32_t *)back->live)[i] = live;
        ((float *)back->less)[i] = (float)less;
        ((float *)back->lse)[i] = live ? (float)((double)lse * REGARD_LOG2E) : INFINITY;
    }
    tile_gather(tile, call->d_out, call->value_channels, 1, tile->out);
    memset(back->dq, 0, (size_t)padded(shape->k_panel) * sizeof(lanes));
    copy_rows(back, call->q, call->channels, (float)call->scale, back->q);
    copy_rows(back, call->d_out, call->value_channels, 1, back->e);
}

REGARD_INLINE void slopes_(
    const int vectors, const Back *back, const Shape *shape, const Piece *piece, Part part,
    lanes *p, lanes *s
) {
    for (int64_t key = part.from; key < part.to; key += REGARD_ROWS) {
        vector acc[REGARD_ROWS][REGARD_VECTORS];
        FOR_ROWS(r) FOR_FIRST(v) acc[r][v] = (vector){0};
        panel_dot_of(vectors, piece->v, shape->v_panel, key, (const lanes *)back->tile.out, acc);
        FOR_ROWS(r) FOR_FIRST(v) {
            const vector weight = v_keep(back->live[v], v_exp2(p[key + r][v] - back->lse[v]));
            p[key + r][v] = weight;
            const vector slope = weight * (acc[r][v] - back->less[v]);
            s[key + r][v] = v_keep((vector_mask)(weight != (vector){0}), slope);
        }
    }
}

/* Scores p to weights, and their gradients s. */
static void slopes(
    const Back *back, const Shape *shape, const Piece *piece, Part part, lanes *p, lanes *s
) {
    WITH_VECTORS(back->tile.vectors, slopes_, back, shape, piece, part, p, s);
}

static void differentiate(Back *back, const Shape *shape, Space *space) {
    const Call *call = shape->call;
    const Piece *piece = &space->piece;
    const Part part = part_of(&back->tile, piece);
    const int64_t from = part.from, count = part.to - from;
    if (!count) return;
    lanes top;
    score(&back->tile, shape, piece, part, space->p, top);
    slopes(back, shape, piece, part, space->p, space->s);
    panel_collect(
        back->tile.vectors, piece->k + from * REGARD_ROWS, shape->k_panel, count,
        (const lanes *)space->s + from, back->dq
    );
    const int64_t wide_k = in_vectors(call->channels), wide_v = in_vectors(call->value_channels);
    spread(
        back->tile.rows, (const lanes *)space->s + from, 1, 0, back->q, space->dk + from * wide_k,
        wide_k, count
    );
    spread(
        back->tile.rows, (const lanes *)space->p + from, 1, 0, back->e, space->dv + from * wide_v,
        wide_v, count
    );
    if (!call->d_bias) return;
    for (int64_t key = from; key < part.to; key++) {
        vector sum = space->s[key][0];
        for (int v = 1; v < back->tile.vectors; v++) sum += space->s[key][v];
        space->db[key] += v_sum(sum);
    }
}

/* Adds [rows of a piece][width] to gradients of all rows, or of the tokens that a row averages. */
static void add_rows(
    const float *from, int64_t width, const Piece *piece, const List *list, const Call *call,
    int64_t channels, float *to
) {
    for (int64_t j = 0; j < piece->count; j++, from += width) {
        const int64_t row = list->row[piece->begin + j];
        const int64_t count = call->pools ? piece->last[j] - piece->first[j] + 1 : 1;
        if (count == 1) {
            float *at = to + row * channels;
            for (int64_t c = 0; c < channels; c++) at[c] += from[c];
            continue;
        }
        const float share = 1.0f / (float)count;
        for (int64_t t = 0; t < count; t++) {
            float *at = to + token_of(call, row + t) * channels;
            for (int64_t c = 0; c < channels; c++) at[c] += share * from[c];
        }
    }
}

static void do_job(Space *space, const Shape *shape, Job job, const Share *share) {
    const Call *call = shape->call;
    const int64_t wide_k = in_vectors(call->channels), wide_v = in_vectors(call->value_channels);
    const int64_t all = job_rows(shape, job);
    make_list(&space->list, call, job.plan, job.number);
    for (int64_t begin = 0; begin < all; begin += MOST_TILES * LANES) {
        const int64_t rows = smaller(all - begin, MOST_TILES * LANES), tiles = tiles_for(rows);
        const int64_t each = rows_of_tile(rows, tiles);
        int64_t count = 0;
        for (int64_t at = 0; at < rows; at += each, count++)
            back_begin(space->backs + count, shape, job, begin + at, smaller(each, rows - at));
        for (int64_t number = 0; number * PIECE < space->list.count; number++) {
            piece_pack(&space->piece, shape, job, &space->list, number);
            memset(space->dk, 0, (size_t)(PIECE * wide_k) * sizeof(float));
            memset(space->dv, 0, (size_t)(PIECE * wide_v) * sizeof(float));
            memset(space->db, 0, PIECE * sizeof(float));
            for (int64_t i = 0; i < count; i++) differentiate(space->backs + i, shape, space);
            const Piece *piece = &space->piece;
            const List *list = &space->list;
            add_rows(space->dk, wide_k, piece, list, call, call->channels, share->k);
            add_rows(space->dv, wide_v, piece, list, call, call->value_channels, share->v);
            if (share->bias) add_rows(space->db, 1, piece, list, call, 1, share->bias);
        }
        for (int64_t i = 0; i < count; i++) {
            const Back *back = space->backs + i;
            tile_scatter(
                &back->tile, (const lanes *)back->dq, call->channels, (float)call->scale, call->dq
            );
        }
    }
}

/* The first share of a key head: the results themselves. */
static Share share_of(const Call *call, int64_t head) {
    return (Share){
        call->dk + head * call->rows * call->channels,
        call->dv + head * call->rows * call->value_channels,
        call->d_bias ? call->d_bias + head * call->rows : 0,
    };
}

static int64_t rounds_of(const Plan *plan) {
    return (plan->count + plan->slots - 1) / plan->slots;
}

/* Adds the shares of a round to one part of the results of a key head, in their order. */
static void gather(const Plan *plan, int64_t head, int64_t first, int64_t now, int64_t slice) {
    const Call *call = plan->shape.call;
    const Share *own = plan->shares + head % plan->wave * plan->slots, to = share_of(call, head);
    const int64_t start = slice * call->rows / 16, stop = (slice + 1) * call->rows / 16;
    for (int64_t s = first ? 0 : 1; s < now; s++) {
        for (int64_t i = start * call->channels; i < stop * call->channels; i++)
            to.k[i] += own[s].k[i];
        for (int64_t i = start * call->value_channels; i < stop * call->value_channels; i++)
            to.v[i] += own[s].v[i];
        for (int64_t i = start; i < stop && to.bias; i++) to.bias[i] += own[s].bias[i];
    }
}

static void clear(const Call *call, const Share *share) {
    memset(share->k, 0, (size_t)(call->rows * call->channels) * sizeof(float));
    memset(share->v, 0, (size_t)(call->rows * call->value_channels) * sizeof(float));
    if (share->bias) memset(share->bias, 0, (size_t)call->rows * sizeof(float));
}

/* All blocks of a share of one key head. */
static void do_share(const Plan *plan, Space *space, int64_t head, int64_t slot, int64_t number) {
    const Shape *shape = &plan->shape;
    const Call *call = shape->call;
    const int64_t units = shape->units / call->key_heads, first = head % call->key_heads * units;
    Share share = share_of(call, head);
    if (number) {
        share = plan->shares[head % plan->wave * plan->slots + slot];
        clear(call, &share);
    }
    for (int64_t one = number; one < units * call->lists; one += plan->count)
        do_job(
            space, shape,
            job_of(
                shape, head / call->key_heads, first + one / call->lists,
                call->lists - 1 - one % call->lists
            ),
            &share
        );
}

static void work(void *shared, int64_t thread) {
    Plan *plan = shared;
    const Call *call = plan->shape.call;
    const int64_t all = call->batch * call->key_heads;
    int64_t *counters = plan->counters, next;
    for (int64_t start = 0; start < all; start += plan->wave) {
        const int64_t heads = smaller(all - start, plan->wave);
        for (int64_t round = 0; round < rounds_of(plan); round++, counters += 2) {
            const int64_t first = round * plan->slots, now = smaller(plan->count - first, plan->slots);
            while ((next = take_next(counters)) < heads * now)
                do_share(
                    plan, plan->spaces + thread, start + next / now, next % now, first + next % now
                );
            team_barrier(&plan->team);
            if (plan->count == 1) continue;
            while ((next = take_next(counters + 1)) < heads * 16)
                gather(plan, start + next / 16, first, now, next % 16);
            team_barrier(&plan->team);
        }
    }
}

/* Computes the gradients of a call whose plan the forward has found right; REGARD_NO_MEMORY if it
 * could not. */
REGARD_EXPORT(int64_t, block_sparse_backward)
(const Call *call) {
    const int64_t all = call->batch * call->key_heads;
    if (!all || !call->lists) return 0;
    const int64_t threads = call->threads > 1 ? call->threads : 1;
    Plan plan = {.shape = shape_of(call)};
    const int64_t blocks = plan.shape.units / call->key_heads * call->lists;
    plan.count = larger(1, smaller(MOST_SHARES, blocks / BLOCKS_PER_SHARE));
    plan.slots = smaller(plan.count, threads);
    plan.wave = smaller(all, (threads + plan.slots - 1) / plan.slots);
    const int64_t waves = (all + plan.wave - 1) / plan.wave;
    const int64_t parts = plan.count > 1 ? plan.wave * plan.slots : 0;
    Space one;
    Share share;
    char *space_end = 0, *share_end = 0;
    space_lay_out(&one, &plan.shape, &space_end);
    share_lay_out(&share, call, &share_end);
    const int64_t counters_bytes = aligned_bytes(waves * rounds_of(&plan) * 2 * 8);
    const int64_t spaces_bytes = aligned_bytes(threads * (int64_t)sizeof(Space));
    const int64_t shares_bytes = aligned_bytes(parts * (int64_t)sizeof(Share));
    char *memory = aligned_block(
        counters_bytes + spaces_bytes + shares_bytes + threads * (intptr_t)space_end +
        parts * (intptr_t)share_end
    );
    if (!memory) return REGARD_NO_MEMORY;
    char *at = memory;
    plan.counters = take_bytes(&at, counters_bytes);
    plan.spaces = take_bytes(&at, spaces_bytes);
    plan.shares = take_bytes(&at, shares_bytes);
    memset(plan.counters, 0, (size_t)counters_bytes);
    for (int64_t i = 0; i < threads; i++) {
        space_lay_out(plan.spaces + i, &plan.shape, &at);
        list_prepare(&plan.spaces[i].list, call);
        piece_prepare(&plan.spaces[i].piece, &plan.shape);
    }
    for (int64_t i = 0; i < parts; i++) share_lay_out(plan.shares + i, call, &at);
    run_team(&plan.team, threads, work, &plan);
    free_block(memory);
    return 0;
}
