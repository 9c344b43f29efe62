/* A tile: LANES rows of one key head, which keys each of them sees, and the space it works in.
 *
 * Row r of a key head is query r / fold of its head r % fold, so that the query heads of a group
 * read the same keys at once. A tile that sticks out repeats its last row.
 */
#ifndef LOCAL_LINEAR_TILE_H
#define LOCAL_LINEAR_TILE_H

#include "keys.h"

#define FOR_LANES(i) for (int i = 0; i < LANES; i++)

typedef struct {
    const Call *call;
    const Keys *keys;
    int64_t set;   /* of biases and decays */
    int64_t rows;  /* that are not repetitions */
    int vectors;   /* with rows to work on; a row beyond them sees nothing */
    int64_t query[LANES], head[LANES];
    vector_mask low[REGARD_VECTORS], high[REGARD_VECTORS]; /* row i sees low <= number < high */
    double decay[LANES]; /* the running sum where the row stands */
    int64_t all_low, all_high;   /* every row sees these, */
    int64_t first, blocks;       /* none sees anything but in these blocks */
    int64_t end;                 /* one after the last key that any row sees */
    /* Rows of LANES numbers, one per channel unless said otherwise. Channels are padded with 0. */
    lanes *queries; /* as they are, less the centre */
    lanes *scaled;  /* times scale and log2 e */
    lanes *mean;    /* kbar - centre */
    lanes *g;
    lanes *x, *r, *p, *y; /* of a solver */
    lanes *out;           /* [value channels] */
    lanes *weights;       /* [blocks * keys of a block] 2^(score - shift) */
    lanes *products;      /* likewise, where the probe is given */
    lanes *scratch;       /* [keys of a block] */
    lanes *matrix;        /* of the direct solver */
    lanes ridge;          /* effective */
    lanes shift, total, inverse; /* of the weights; inverse is 0 where total is not above 0 */
    lanes lse;
    lanes residual;
    vector_mask iterations[REGARD_VECTORS], failed[REGARD_VECTORS];
} Tile;

/* One block of keys as a tile meets it. */
typedef struct {
    int64_t number; /* of the head's blocks */
    int64_t start;  /* its first key */
    int64_t count;  /* keys to look at, a multiple of R */
    int64_t at;     /* where its weights begin */
    int cut;        /* some row does not see some key of it */
} Block;

static inline Block tile_block(const Tile *tile, int64_t i) {
    const int64_t size = tile->keys->k_panel.keys, start = (tile->first + i) * size;
    int64_t count = up_to(tile->end - start, REGARD_ROWS);
    if (count > size) count = size;
    const int cut = start < tile->all_low || start + count > tile->all_high;
    return (Block){tile->first + i, start, count, i * size, cut};
}

static inline const float *block_of_k(const Tile *tile, Block block) {
    return tile->keys->k + block.number * tile->keys->k_panel.floats;
}

static inline const float *block_of_v(const Tile *tile, Block block) {
    return tile->keys->v + block.number * tile->keys->v_panel.floats;
}

/* Keys that a tile may have to hold weights of. */
static inline int64_t tile_span(const Call *call) {
    const int64_t size = block_keys(call->channels);
    int64_t span = call->keys;
    if (call->left >= 0 && call->right >= 0) {
        const int64_t queries = (LANES + folded_heads(call) - 1) / folded_heads(call) + 1;
        const int64_t seen = call->left + call->right + queries;
        if (seen < span) span = seen;
    }
    return up_to(span, size) + size;
}

/* Cuts the work space of one thread; `matrix` is the rows of the direct solver's matrix. */
static inline void tile_lay_out(Tile *tile, const Call *call, int64_t matrix, char **at) {
    const int64_t d = up_to(call->channels, REGARD_ROWS);
    const int64_t dv = up_to(call->value_channels, REGARD_ROWS), row = sizeof(lanes);
    *tile = (Tile){0};
    lanes **of_channels[] = {
        &tile->queries, &tile->scaled, &tile->mean, &tile->g,
        &tile->x, &tile->r, &tile->p, &tile->y,
    };
    for (size_t i = 0; i < sizeof of_channels / sizeof *of_channels; i++)
        *of_channels[i] = take_bytes(at, d * row);
    tile->out = take_bytes(at, dv * row);
    const int64_t span = call->mode == AVERAGE ? block_keys(call->channels) : tile_span(call);
    tile->weights = take_bytes(at, span * row);
    if (call->mode == GIVEN) tile->products = take_bytes(at, span * row);
    tile->scratch = take_bytes(at, block_keys(call->channels) * row);
    tile->matrix = take_bytes(at, matrix * row);
}

/* Rows of a user's tensor into the lanes, [channels][LANES], zeros beyond the channels. */
static inline void tile_gather(const Tile *tile, Operand from, int64_t channels, lanes *to) {
    float *at = (float *)to;
    const int plain = from.half == FLOAT32 && from.column == 1;
    FOR_LANES(i) {
        const Source row = operand_rows(from, tile->keys->b, tile->head[i]);
        if (plain) { /* the usual case, without a question per number */
            const float *x = (const float *)row.data + row.start + tile->query[i] * row.row;
            for (int64_t c = 0; c < channels; c++) at[c * LANES + i] = x[c];
        } else {
            for (int64_t c = 0; c < channels; c++)
                at[c * LANES + i] = source_at(row, tile->query[i], c);
        }
    }
    const int64_t padded = up_to(channels, REGARD_ROWS);
    memset(to + channels, 0, (size_t)(padded - channels) * sizeof(lanes));
}

/* One number per row of a contiguous result [batch, head, query]. */
static inline int64_t tile_row(const Tile *tile, int i) {
    const Call *call = tile->call;
    return (tile->keys->b * call->heads + tile->head[i]) * call->queries + tile->query[i];
}

/* The lanes back into a contiguous result [batch, head, query, channels]. */
static inline void tile_scatter(const Tile *tile, const lanes *from, int64_t channels, float *to) {
    const float *at = (const float *)from;
    for (int i = 0; i < tile->rows; i++) {
        float *row = to + tile_row(tile, i) * channels;
        for (int64_t c = 0; c < channels; c++) row[c] = at[c * LANES + i];
    }
}

static inline int64_t clamped(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
}

/* The keys that row i of a tile sees, and its decay. */
static inline void tile_sees(Tile *tile, int i) {
    const Call *call = tile->call;
    const int64_t keys = call->keys, position = tile->query[i] + keys - call->queries;
    int64_t low = call->left < 0 ? 0 : clamped(position - call->left, 0, keys);
    int64_t high = call->right < 0 ? keys : clamped(position + call->right + 1, 0, keys);
    tile->decay[i] = 0;
    if (call->decay_sums.data && keys) {
        const int64_t head = operand_head(call, call->decay_heads, tile->head[i]);
        const int64_t stands = call->causal ? clamped(position, 0, keys - 1) : keys - 1;
        const int64_t first = first_at(call->decay_first, tile->keys->b, head, stands);
        if (first > low) low = first;
        tile->decay[i] = decay_at(call->decay_sums, tile->keys->b, head, stands);
    }
    low = number_at(tile->keys, low < keys ? low : keys);
    high = number_at(tile->keys, high);
    if (high < low) high = low;
    if (low < high) {
        if (low < tile->first) tile->first = low;
        if (high > tile->end) tile->end = high;
    }
    if (low > tile->all_low) tile->all_low = low;
    if (high < tile->all_high) tile->all_high = high;
    ((int32_t *)tile->low)[i] = (int32_t)low;
    ((int32_t *)tile->high)[i] = (int32_t)high;
}

/* Leaves vectors without a row of their own alone. */
static inline void tile_narrow(Tile *tile) {
    tile->vectors = (int)((tile->rows + REGARD_WIDTH - 1) / REGARD_WIDTH);
    if (tile->vectors > 2) tile->vectors = REGARD_VECTORS;
}

/* Begins tile `number` of a set of rows: who is in it, what they see, and the queries. */
static inline void tile_begin(
    Tile *tile, const Call *call, const Keys *keys, int64_t set, int64_t number
) {
    const int64_t fold = folded_heads(call), rows = call->queries * fold, start = number * LANES;
    const int64_t group = call->heads / call->key_heads, size = keys->k_panel.keys;
    tile->call = call;
    tile->keys = keys;
    tile->set = set;
    tile->rows = rows - start < LANES ? rows - start : LANES;
    tile->vectors = REGARD_VECTORS;
    tile->all_low = 0;
    tile->all_high = tile->first = keys->count;
    tile->end = 0;
    FOR_LANES(i) {
        const int64_t row = start + (i < tile->rows ? i : tile->rows - 1);
        tile->query[i] = row / fold;
        tile->head[i] = keys->h * group + set * fold + row % fold;
        tile_sees(tile, i);
    }
    tile->first = tile->end ? tile->first / size : 0;
    tile->blocks = tile->end ? (tile->end - 1) / size + 1 - tile->first : 0;
    tile_gather(tile, call->q, call->channels, tile->queries);
    lanes scale;
    FOR_LANES(i) ((float *)scale)[i] =
        operand_at(call->scale, keys->b, tile->head[i], 0, 0) * (float)REGARD_LOG2E;
    for (int64_t c = 0; c < up_to(call->channels, REGARD_ROWS); c++) {
        const float centre = c < call->channels ? keys->centre[c] : 0;
        FOR_VECTORS(v) {
            tile->scaled[c][v] = tile->queries[c][v] * scale[v];
            tile->queries[c][v] -= v_broadcast(centre);
        }
    }
}

#endif
