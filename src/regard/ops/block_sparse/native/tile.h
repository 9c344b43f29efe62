/* Tiles of queries that share a list, and pieces of the list packed for them.
 *
 * The queries of a block, of all heads that share its list, are rows of tiles in the order query,
 * head. A block of many is taken MOST_TILES at a time; these meet their list piece by piece: PIECE
 * rows are gathered and packed once for all of them. What a piece contains beyond the list, because
 * its size is rounded up, is hidden from everyone.
 */
#ifndef BLOCK_SPARSE_TILE_H
#define BLOCK_SPARSE_TILE_H

#include "lists.h"
#include "online.h"

#define PIECE 64                            /* rows: a multiple of every R */
#define MOST_TILES ((288 + LANES - 1) / LANES)
#define FOR_LANES(i) for (int i = 0; i < LANES; i++)

/* Everything that depends on the call alone. */
typedef struct {
    const Call *call;
    Panel k_panel, v_panel;
    int64_t fold;  /* query heads that share a list and its keys */
    int64_t units; /* of so many heads, in a batch row */
    int64_t longest;
} Shape;

typedef struct {
    int rows;    /* with a query; the other lanes have zeros */
    int vectors; /* with rows to work on */
    int64_t at[LANES];       /* the query, counted through all heads; -1 for none */
    int64_t place;           /* the first row's place in the block: where its masks begin */
    vector_mask low[REGARD_VECTORS], high[REGARD_VECTORS]; /* tokens inside: seen */
    int32_t least_low, most_low, least_high, most_high;
    lanes *x;                /* [channels] q scale log2 e */
    lanes *out;              /* [value channels]; of a backward, the gradient of it */
    lanes shift, total;
} Tile;

/* PIECE rows of a list, or what is left of it. */
typedef struct {
    int64_t begin;  /* in the list */
    int64_t count;  /* rows of the list */
    float *k, *v;   /* packed */
    float *bias;    /* [PIECE] times log2 e */
    int biased;     /* whether there are any */
    float *mean, *nothing; /* [channels] of one row; zeros */
    int32_t first[PIECE], last[PIECE];
    const int8_t *mask;
} Piece;

/* The rows [from, to) of a piece that a tile looks at; `cut`: not every lane sees every one. */
typedef struct {
    int64_t from, to;
    int cut;
} Part;

static inline Shape shape_of(const Call *call) {
    const int64_t group = call->heads / call->key_heads;
    const int together = call->kind != BOXES && call->plan_heads < call->heads;
    Shape shape = {.call = call};
    shape.k_panel = panel_of(PIECE, call->channels);
    shape.v_panel = panel_of(PIECE, call->value_channels);
    shape.fold = together ? group : 1;
    shape.units = call->heads / shape.fold;
    shape.longest = longest_list(call);
    return shape;
}

static inline int64_t padded(Panel panel) { return panel.groups * REGARD_ROWS; }

static inline void tile_lay_out(Tile *tile, const Shape *shape, char **at) {
    tile->x = take_bytes(at, padded(shape->k_panel) * (int64_t)sizeof(lanes));
    tile->out = take_bytes(at, padded(shape->v_panel) * (int64_t)sizeof(lanes));
}

static inline void piece_lay_out(Piece *piece, const Shape *shape, char **at) {
    piece->k = take_bytes(at, shape->k_panel.floats * 4);
    piece->v = take_bytes(at, shape->v_panel.floats * 4);
    piece->bias = take_bytes(at, PIECE * 4);
    const int64_t widest = larger(padded(shape->k_panel), padded(shape->v_panel)) * 4;
    piece->mean = take_bytes(at, widest);
    piece->nothing = take_bytes(at, widest);
}

/* What of it does not change. */
static inline void piece_prepare(Piece *piece, const Shape *shape) {
    const int64_t widest = larger(padded(shape->k_panel), padded(shape->v_panel));
    memset(piece->nothing, 0, (size_t)widest * sizeof(float));
}

/* One block of queries: batch row, first query head, number in the plan's lists. */
typedef struct {
    int64_t b, head, key_head, plan, number;
} Job;

static inline Job job_of(const Shape *shape, int64_t b, int64_t unit, int64_t number) {
    const Call *call = shape->call;
    const int64_t head = unit * shape->fold, group = call->heads / call->key_heads;
    const int64_t of_plan = call->plan_heads == 1 ? 0 : head / (call->heads / call->plan_heads);
    const int64_t row = b / (call->batch / call->plan_batch);
    return (Job){b, head, head / group, row * call->plan_heads + of_plan, number};
}

/* Rows of the block of a job, counted over heads. */
static inline int64_t job_rows(const Shape *shape, Job job) {
    const Call *call = shape->call;
    if (call->order) return call->block_q;
    return smaller(call->block_q, call->queries - job.number * call->block_q) * shape->fold;
}

/* Cuts what is left of a block, `rows` of them, into tiles of nearly the same number of vectors. */
static inline int64_t tiles_for(int64_t rows) { return (rows + LANES - 1) / LANES; }

static inline int64_t rows_of_tile(int64_t rows, int64_t tiles) {
    const int64_t vectors = (rows + REGARD_WIDTH - 1) / REGARD_WIDTH;
    return smaller(rows, (vectors + tiles - 1) / tiles * REGARD_WIDTH);
}

/* Reads queries into the lanes, [channels][LANES] times a factor; zeros beyond, and without one. */
static inline void tile_gather(
    const Tile *tile, const float *from, int64_t channels, float factor, lanes *to
) {
    const int64_t all = up_to(channels, REGARD_ROWS);
    float *at = (float *)to;
    if (tile->rows < LANES) memset(to, 0, (size_t)all * sizeof(lanes));
    else memset(to + channels, 0, (size_t)(all - channels) * sizeof(lanes));
    for (int i = 0; i < tile->rows; i++) {
        if (tile->at[i] < 0) {
            for (int64_t c = 0; c < channels; c++) at[c * LANES + i] = 0;
            continue;
        }
        const float *row = from + tile->at[i] * channels;
        for (int64_t c = 0; c < channels; c++) at[c * LANES + i] = row[c] * factor;
    }
}

static inline void tile_scatter(
    const Tile *tile, const lanes *from, int64_t channels, float factor, float *to
) {
    const float *at = (const float *)from;
    for (int i = 0; i < tile->rows; i++) {
        if (tile->at[i] < 0) continue;
        float *row = to + tile->at[i] * channels;
        for (int64_t c = 0; c < channels; c++) row[c] = at[c * LANES + i] * factor;
    }
}

/* Begins a tile: `rows` rows of a job's block from `place` on, and what they see. */
static inline void tile_begin(Tile *tile, const Shape *shape, Job job, int64_t place, int64_t rows) {
    const Call *call = shape->call;
    const int64_t offset = call->keys - call->queries;
    tile->rows = (int)rows;
    tile->place = place;
    tile->vectors = (int)((rows + REGARD_WIDTH - 1) / REGARD_WIDTH);
    if (tile->vectors > 2) tile->vectors = REGARD_VECTORS;
    tile->least_low = tile->least_high = INT32_MAX;
    tile->most_low = tile->most_high = -1;
    FOR_LANES(i) {
        const int64_t row = place + smaller(i, rows - 1);
        const int64_t within = job.number * call->block_q + row / shape->fold;
        const int64_t query = call->order ? call->order[within] : within;
        int64_t low = 0, high = UNBOUNDED;
        if (call->kind != BOXES) {
            if (call->left >= 0) low = larger(query + offset - call->left, 0);
            if (call->right >= 0) high = larger(query + offset + call->right, -1);
        }
        const int64_t head = job.b * call->heads + job.head + row % shape->fold;
        tile->at[i] = i < rows && query >= 0 ? head * call->queries + query : -1;
        ((int32_t *)tile->low)[i] = (int32_t)low;
        ((int32_t *)tile->high)[i] = (int32_t)high;
        tile->least_low = (int32_t)smaller(tile->least_low, low);
        tile->most_low = (int32_t)larger(tile->most_low, low);
        tile->least_high = (int32_t)smaller(tile->least_high, high);
        tile->most_high = (int32_t)larger(tile->most_high, high);
    }
    const float factor = (float)(REGARD_LOG2E * call->scale);
    tile_gather(tile, call->q, call->channels, factor, tile->x);
}

/* A token of a row, where those behind the last key are the last key again. */
static inline int64_t token_of(const Call *call, int64_t token) {
    return smaller(token, call->keys - 1);
}

/* Puts one row of whole groups where a packed block has row j. */
static inline void put_row(float *block, int64_t j, const float *row, int64_t groups) {
    float *to = block + j * REGARD_ROWS;
    for (int64_t group = 0; group < groups; group++, to += PIECE * REGARD_ROWS)
        memcpy(to, row + group * REGARD_ROWS, REGARD_ROWS * sizeof(float));
}

/* Packs the rows of a piece, [channels] each: row by row, so that each is read at once. */
static inline void pack_rows(
    float *block, Panel panel, const Piece *piece, const int32_t *row, const float *from,
    int64_t channels
) {
    const int64_t whole = channels / REGARD_ROWS, left = channels % REGARD_ROWS;
    float end[REGARD_ROWS] = {0};
    for (int64_t j = 0; j < PIECE; j++) {
        if (j >= piece->count) {
            put_row(block, j, piece->nothing, panel.groups);
            continue;
        }
        const float *at = from + row[j] * channels;
        put_row(block, j, at, whole);
        if (!left) continue;
        memcpy(end, at + channels - left, (size_t)left * sizeof(float));
        put_row(block + whole * PIECE * REGARD_ROWS, j, end, 1);
    }
}

/* The same of rows that are averages of tokens. */
static inline void pack_means(
    float *block, Panel panel, const Piece *piece, const Call *call, const float *from,
    int64_t channels
) {
    float *mean = piece->mean;
    memset(mean, 0, (size_t)padded(panel) * sizeof(float));
    for (int64_t j = 0; j < PIECE; j++) {
        if (j >= piece->count) {
            put_row(block, j, piece->nothing, panel.groups);
            continue;
        }
        const int64_t first = piece->first[j], count = piece->last[j] - first + 1;
        const float *row = from + token_of(call, first) * channels;
        if (count == 1) {
            memcpy(mean, row, (size_t)channels * sizeof(float));
        } else {
            const float share = 1.0f / (float)count;
            const float *second = from + token_of(call, first + 1) * channels;
            for (int64_t c = 0; c < channels; c++) mean[c] = row[c] + second[c];
            for (int64_t t = 2; t < count; t++) {
                const float *next = from + token_of(call, first + t) * channels;
                for (int64_t c = 0; c < channels; c++) mean[c] += next[c];
            }
            for (int64_t c = 0; c < channels; c++) mean[c] *= share;
        }
        put_row(block, j, mean, panel.groups);
    }
}

/* Packs piece `number` of a list. */
static inline void piece_pack(
    Piece *piece, const Shape *shape, Job job, const List *list, int64_t number
) {
    const Call *call = shape->call;
    const int64_t head = (job.b * call->key_heads + job.key_head) * call->rows;
    const int64_t channels = call->channels, value_channels = call->value_channels;
    piece->begin = number * PIECE;
    piece->count = smaller(PIECE, list->count - piece->begin);
    for (int64_t j = 0; j < PIECE; j++) {
        const int there = j < piece->count;
        piece->first[j] = there ? list->first[piece->begin + j] : INT32_MAX;
        piece->last[j] = there ? list->last[piece->begin + j] : INT32_MAX;
    }
    piece->mask = list->mask ? list->mask + piece->begin * call->mask_width : 0;
    const int pools = call->pools && list->coarse;
    if (pools) {
        pack_means(piece->k, shape->k_panel, piece, call, call->k + head * channels, channels);
        pack_means(
            piece->v, shape->v_panel, piece, call, call->v + head * value_channels, value_channels
        );
    } else {
        const int32_t *row = list->row + piece->begin;
        pack_rows(piece->k, shape->k_panel, piece, row, call->k + head * channels, channels);
        pack_rows(
            piece->v, shape->v_panel, piece, row, call->v + head * value_channels, value_channels
        );
    }
    piece->biased = pools || call->bias;
    if (!piece->biased) return;
    const int64_t of = call->bias_heads > 1 ? job.key_head : 0;
    const float *bias = call->bias ? call->bias + (job.b * call->bias_heads + of) * call->rows : 0;
    for (int64_t j = 0; j < PIECE; j++) {
        piece->bias[j] = 0;
        if (j >= piece->count) continue;
        if (bias) piece->bias[j] = bias[list->row[piece->begin + j]] * (float)REGARD_LOG2E;
        else piece->bias[j] = log2f((float)(piece->last[j] - piece->first[j] + 1));
    }
}

/* What of a piece a tile looks at: rows are in the order of their tokens. */
static inline Part part_of(const Tile *tile, const Piece *piece) {
    int64_t from = 0, to = piece->count;
    while (to > 0 && piece->last[to - 1] > tile->most_high) to--;
    while (from < to && piece->first[from] < tile->least_low) from++;
    if (from >= to) return (Part){0, 0, 0};
    from = from / REGARD_ROWS * REGARD_ROWS;
    to = up_to(to, REGARD_ROWS);
    const int cut = piece->mask || piece->first[from] < tile->most_low ||
                    piece->last[to - 1] > tile->least_high;
    return (Part){from, to, cut};
}

typedef int8_t seen_bytes __attribute__((vector_size(REGARD_WIDTH), aligned(1), may_alias));

REGARD_INLINE void score_(
    const int vectors, const Tile *tile, const Shape *shape, const Piece *piece, Part part,
    lanes *scores, vector *top
) {
    const vector nothing = v_broadcast(-INFINITY);
    const int8_t *mask = piece->mask ? piece->mask + tile->place : 0;
    lanes most;
    FOR_VECTORS(v) most[v] = nothing;
    for (int64_t key = part.from; key < part.to; key += REGARD_ROWS) {
        vector acc[REGARD_ROWS][REGARD_VECTORS];
        FOR_ROWS(r) FOR_FIRST(v) acc[r][v] = (vector){0};
        panel_dot_of(vectors, piece->k, shape->k_panel, key, (const lanes *)tile->x, acc);
        if (piece->biased) {
            FOR_ROWS(r) FOR_FIRST(v) acc[r][v] += v_broadcast(piece->bias[key + r]);
        }
        if (part.cut) {
            FOR_ROWS(r) FOR_FIRST(v) {
                vector_mask seen = (tile->low[v] <= piece->first[key + r]) &
                                   (tile->high[v] >= piece->last[key + r]);
                if (mask && key + r < piece->count) {
                    const int8_t *at = mask + (key + r) * shape->call->mask_width;
                    seen &= __builtin_convertvector(
                        *(const seen_bytes *)(at + v * REGARD_WIDTH), vector_mask
                    );
                }
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

/* Scores of a part of a piece, -inf where hidden, and their maximum. */
REGARD_SHARED void score(
    const Tile *tile, const Shape *shape, const Piece *piece, Part part, lanes *scores, lanes top
) {
    WITH_VECTORS(tile->vectors, score_, tile, shape, piece, part, scores, top);
}

#endif
