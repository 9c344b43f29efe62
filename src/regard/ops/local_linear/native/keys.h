/* One key head made ready: masked keys dropped, the others centred and packed.
 *
 * Keys have packed numbers from here on: 0 .. count - 1 are the real ones in their order. What a
 * masked key contains is never read again, and costs nothing.
 */
#ifndef LOCAL_LINEAR_KEYS_H
#define LOCAL_LINEAR_KEYS_H

#include "call.h"
#include "exp.h"

/* Keys per block: weights and keys of one block, or one of them and a tile of products, fit into
 * the first cache. */
#define BLOCK_KEYS 96
#define BLOCK_KEYS_WIDE 48
#define WIDE_CHANNELS 64

static inline int64_t block_keys(int64_t channels) {
    return channels <= WIDE_CHANNELS ? BLOCK_KEYS : BLOCK_KEYS_WIDE;
}

typedef struct {
    int64_t b, h;    /* batch element and key head */
    int64_t count;   /* real keys */
    int32_t *index;  /* [count] their places; NULL without a mask: number = place */
    int32_t *before; /* [keys + 1] real keys before a place; NULL without a mask */
    float *centre;   /* [channels] taken off every key */
    Panel k_panel, v_panel;
    float *k, *v;      /* packed */
    int64_t sets;      /* of biases and decays: one, or one per query head of the group */
    float *bias;       /* [sets][blocks * keys of a block], times log2 e; NULL without */
    double *decay;     /* likewise, running sums */
    float *outer;      /* packed products of channels (direct.h); NULL if they are not kept */
    Panel outer_panel;
} Keys;

/* Lays out the pieces of one key head from `*at` on, with room for all keys. */
static inline void keys_lay_out(Keys *keys, const Call *call, int64_t outer_channels, char **at) {
    const int64_t size = block_keys(call->channels), places = call->keys;
    *keys = (Keys){0};
    keys->k_panel = panel_of(size, call->channels);
    keys->v_panel = panel_of(size, call->value_channels);
    keys->outer_panel = panel_of(size, outer_channels);
    const int64_t blocks = panel_blocks(keys->k_panel, places);
    if (call->key_mask.data) {
        keys->index = take_bytes(at, places * 4);
        keys->before = take_bytes(at, (places + 1) * 4);
    }
    keys->centre = take_bytes(at, call->channels * 4);
    keys->k = take_bytes(at, blocks * keys->k_panel.floats * 4);
    keys->v = take_bytes(at, blocks * keys->v_panel.floats * 4);
    keys->sets = call->heads / call->key_heads / folded_heads(call);
    if (call->key_bias.data) keys->bias = take_bytes(at, keys->sets * blocks * size * 4);
    if (call->decay_sums.data) keys->decay = take_bytes(at, keys->sets * blocks * size * 8);
    if (outer_channels) keys->outer = take_bytes(at, blocks * keys->outer_panel.floats * 4);
}

static inline int64_t place_of(const Keys *keys, int64_t number) {
    return keys->index ? keys->index[number] : number;
}

/* The packed number of the first real key at or after a place. */
static inline int64_t number_at(const Keys *keys, int64_t place) {
    return keys->before ? keys->before[place] : place;
}

/* Entries of one set of biases or decays. */
static inline int64_t set_size(const Keys *keys, const Call *call) {
    return panel_blocks(keys->k_panel, call->keys) * keys->k_panel.keys;
}

/* The mean key, or the first where some query does not see all keys. */
static inline void find_centre(Keys *keys, const Call *call) {
    const Source k = operand_rows(call->k, keys->b, keys->h);
    const int64_t of = !call->intercept ? 0 : call->banded && keys->count ? 1 : keys->count;
    for (int64_t c0 = 0; c0 < call->channels; c0 += 16) {
        const int64_t width = call->channels - c0 < 16 ? call->channels - c0 : 16;
        double sum[16] = {0};
        for (int64_t j = 0; j < of; j++) {
            const int64_t row = place_of(keys, j);
            for (int64_t c = 0; c < width; c++) sum[c] += source_at(k, row, c0 + c);
        }
        for (int64_t c = 0; c < width; c++)
            keys->centre[c0 + c] = of ? (float)(sum[c] / (double)of) : 0;
    }
}

/* Everything but the packed matrices, of batch element b and key head h. */
static inline void keys_prepare(Keys *keys, const Call *call, int64_t b, int64_t h) {
    keys->b = b;
    keys->h = h;
    keys->count = call->keys;
    if (call->key_mask.data) {
        const uint8_t *mask = call->key_mask.data;
        int64_t count = 0;
        for (int64_t s = 0; s < call->keys; s++) {
            keys->before[s] = (int32_t)count;
            if (mask[b * call->key_mask.batch + s * call->key_mask.row])
                keys->index[count++] = (int32_t)s;
        }
        keys->before[call->keys] = (int32_t)count;
        keys->count = count;
    }
    find_centre(keys, call);
    const int64_t size = set_size(keys, call), group = call->heads / call->key_heads;
    for (int64_t set = 0; set < keys->sets; set++) {
        const int64_t head = h * group + set; /* one query head for which it holds */
        for (int64_t j = 0; j < size && keys->bias; j++) {
            const int64_t of = operand_head(call, call->bias_heads, head);
            keys->bias[set * size + j] =
                j < keys->count
                    ? operand_at(call->key_bias, b, of, place_of(keys, j), 0) * (float)REGARD_LOG2E
                    : 0;
        }
        for (int64_t j = 0; j < size && keys->decay; j++) {
            const int64_t of = operand_head(call, call->decay_heads, head);
            keys->decay[set * size + j] =
                j < keys->count ? decay_at(call->decay_sums, b, of, place_of(keys, j)) : 0;
        }
    }
}

/* Packs block `number` of keys and values. */
static inline void keys_pack(Keys *keys, const Call *call, int64_t number) {
    if (number * keys->k_panel.keys >= keys->count) return;
    panel_pack(
        keys->k + number * keys->k_panel.floats, keys->k_panel, number,
        operand_rows(call->k, keys->b, keys->h), call->channels, keys->index, keys->count,
        keys->centre
    );
    panel_pack(
        keys->v + number * keys->v_panel.floats, keys->v_panel, number,
        operand_rows(call->v, keys->b, keys->h), call->value_channels, keys->index, keys->count, 0
    );
}

#endif
