/* The keys and values that queries of a head share: one of every finished chunk, packed.
 *
 * Slots of earlier calls come first, in use up to `old`, then the last places of this call's
 * chunks. A query at place p sees the first `old + p / chunk` of them, and itself.
 */
#ifndef RAT_ENDS_H
#define RAT_ENDS_H

#include <math.h>

#include "call.h"
#include "exp.h"
#include "panel.h"
#include "reduce.h"
#include "threads.h"

#define W REGARD_WIDTH
#define R REGARD_ROWS
#define BLOCK 64 /* keys */

typedef struct {
    int64_t old, count;
    float *k, *v;
} Ends;

static inline const float *row_of(Rows rows, int64_t b, int64_t h, int64_t i) {
    return rows.data + b * rows.batch + h * rows.head + i * rows.row;
}

/* Chunks of this call whose end some query may see. */
static inline int64_t finished(const Call *call) {
    return call->places ? (call->places - 1) / call->chunk : 0;
}

static inline int64_t row_of_table(int64_t rows, int64_t batch, int64_t b) {
    return b * rows / batch;
}

/* A count or a place comes from a state, which may be damaged: never read outside of memory. */
static inline int64_t old_of(const Call *call, int64_t b) {
    if (!call->count_rows) return call->past;
    const int64_t count = call->past_count[row_of_table(call->count_rows, call->batch, b)];
    return count < 0 ? 0 : count < call->past ? count : call->past;
}

static inline int64_t place_of(const Call *call, int64_t b, int64_t i) {
    if (!call->place_rows) return i + call->offset;
    const int64_t row = row_of_table(call->place_rows, call->batch, b);
    const int64_t place = call->place[row * call->queries + i];
    return place < call->places ? place : call->places - 1;
}

/* Turns x by the angles of a chunk (or back, with sign -1), pairing its halves. */
static inline void turn(
    const Call *call, int64_t b, int64_t chunk, float sign, const float *restrict x,
    float *restrict y
) {
    const int64_t D = call->channels, half = D / 2;
    if (!call->table_rows) {
        if (x != y) memcpy(y, x, (size_t)D * sizeof(float));
        return;
    }
    const int64_t chunks = (call->places + call->chunk - 1) / call->chunk;
    const int64_t at = (row_of_table(call->table_rows, call->batch, b) * chunks + chunk) * half;
    const float *restrict cosine = call->cosine + at, *restrict sine = call->sine + at;
    for (int64_t c = 0; c < half; c++) {
        y[c] = x[c] * cosine[c] - sign * x[c + half] * sine[c];
        y[c + half] = x[c + half] * cosine[c] + sign * x[c] * sine[c];
    }
}

static inline int64_t blocks_of(int64_t count) { return (count + BLOCK - 1) / BLOCK; }

/* Packs the keys and values of a head; `rows` is [BLOCK][D] to work in. */
static void ends_pack(Ends *ends, const Call *call, int64_t b, int64_t h, float *rows) {
    const int64_t D = call->channels;
    const Panel panel = panel_of(BLOCK, D);
    ends->old = old_of(call, b);
    ends->count = ends->old + finished(call);
    const Source from = {.data = rows, .row = D, .column = 1};
    for (int64_t block = 0; block < blocks_of(ends->count); block++) {
        const int64_t start = block * BLOCK;
        const int64_t count = ends->count - start < BLOCK ? ends->count - start : BLOCK;
        for (int value = 0; value < 2; value++) {
            const float *past = value ? call->past_v : call->past_k;
            for (int64_t i = 0; i < count; i++) {
                const int64_t j = start + i, chunk = j - ends->old;
                const int64_t slot = (b * call->key_heads + h) * call->past + j;
                const int64_t last = chunk * call->chunk + call->chunk - 1;
                float *to = rows + i * D;
                if (chunk < 0) memcpy(to, past + slot * D, (size_t)D * sizeof(float));
                else if (value) memcpy(to, row_of(call->v, b, h, last), (size_t)D * sizeof(float));
                else turn(call, b, chunk, 1, row_of(call->k, b, h, last), to);
            }
            float *to = (value ? ends->v : ends->k) + block * panel.floats;
            panel_pack(to, panel, 0, from, D, NULL, count, NULL);
        }
    }
}

/* Cuts the memory of a head from `at`. */
static void ends_lay_out(Ends *ends, const Call *call, char **at) {
    const Panel panel = panel_of(BLOCK, call->channels);
    const int64_t floats = blocks_of(call->past + finished(call)) * panel.floats;
    ends->k = take_bytes(at, floats * (int64_t)sizeof(float));
    ends->v = take_bytes(at, floats * (int64_t)sizeof(float));
}

static inline float dot(const float *restrict x, const float *restrict y, int64_t count) {
    vector sum = {0};
    int64_t c = 0;
    for (; c + W <= count; c += W) sum += v_load(x + c) * v_load(y + c);
    float rest = 0;
    for (; c < count; c++) rest += x[c] * y[c];
    return v_sum(sum) + rest;
}

/* Scores 2^s of R keys of a block, -inf where a lane does not see them. */
REGARD_INLINE void scores_of(
    const float *block, Panel panel, int64_t key, int64_t first, const lanes *x, const lanes sees,
    const int cut, vector s[R][REGARD_VECTORS]
) {
    FOR_ROWS(r) FOR_VECTORS(v) s[r][v] = (vector){0};
    panel_dot(block, panel, key, x, s);
    if (!cut) return;
    FOR_ROWS(r) FOR_VECTORS(v) {
        const vector number = v_broadcast((float)(first + key + r));
        s[r][v] = v_select((vector_mask)(number < sees[v]), s[r][v], v_broadcast(-INFINITY));
    }
}

#endif
