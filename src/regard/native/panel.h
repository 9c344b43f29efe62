/* Matrix microkernels with the queries of a tile in the lanes, and the keys packed for them.
 *
 * A tile is LANES = REGARD_VECTORS * REGARD_WIDTH rows (queries). Everything that belongs to it
 * has a row of LANES numbers, `lanes`, per key or per channel: weights [keys][LANES], queries,
 * outputs and search directions [channels][LANES]. Dot products over channels, exponentials and
 * scalars of a solver are then vertical operations, and no vector is ever shuffled.
 *
 * Keys and values are packed once per head into blocks of `keys` rows:
 *
 *     packed[block][channel / R][key][channel % R]        R = REGARD_ROWS
 *
 * zeros filling up channels to a multiple of R and keys to a multiple of `keys`. Both kernels read
 * a block from front to back:
 *
 *     panel_dot       acc[r] += sum_c K[key + r, c] X[c]     R keys at once, in registers
 *     panel_collect   Y[c]   += sum_key K[key, c] T[key]     R channels at once
 *
 * Sums over keys are formed block by block, which is also what keeps long sums accurate. Hidden
 * keys must have a T of exactly 0, and packed numbers are finite, so that hidden keys change no bit
 * of any sum. `keys` is a multiple of R, and so are the numbers of keys handed to the kernels.
 */
#ifndef REGARD_PANEL_H
#define REGARD_PANEL_H

#include <float.h>
#include <string.h>

#include "memory.h"
#include "vector.h"

#define LANES (REGARD_VECTORS * REGARD_WIDTH)
#define REGARD_INLINE static inline __attribute__((always_inline))

typedef vector lanes[REGARD_VECTORS];

#define FOR_VECTORS(v) REGARD_UNROLL for (int v = 0; v < REGARD_VECTORS; v++)
#define FOR_ROWS(r) REGARD_UNROLL for (int r = 0; r < REGARD_ROWS; r++)

/* The shape of packed keys or values. */
typedef struct {
    int64_t keys;   /* per block */
    int64_t groups; /* of R channels */
    int64_t floats; /* per block */
} Panel;

static inline Panel panel_of(int64_t keys, int64_t channels) {
    const int64_t groups = up_to(channels, REGARD_ROWS) / REGARD_ROWS;
    return (Panel){keys, groups, keys * groups * REGARD_ROWS};
}

static inline int64_t panel_blocks(Panel panel, int64_t count) {
    return (count + panel.keys - 1) / panel.keys;
}

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* Rows of a user's tensor, of the kind that `half` says. Strides in elements. */
typedef struct {
    const void *data;
    int64_t start; /* the first element of row 0 */
    int64_t row, column;
    int half;
} Source;

static inline float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float source_at(Source from, int64_t row, int64_t column) {
    const int64_t at = from.start + row * from.row + column * from.column;
    if (from.half == FLOAT32) return ((const float *)from.data)[at];
    const uint32_t bits = ((const uint16_t *)from.data)[at];
    if (from.half == BFLOAT16) return float_of_bits(bits << 16);
    /* The exponent of a half, moved into place and corrected by a product: right for subnormals. */
    const uint32_t size = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    const int special = size >= 0x0f800000; /* infinity or NaN */
    const float x = special ? float_of_bits(size | 0x7f800000) : float_of_bits(size) * 0x1p112f;
    return sign ? -x : x;
}

/* A difference may overflow: large instead of infinite, because 0 times infinity is no 0. */
static inline float finite_difference(float x, float centre) {
    const float d = x - centre;
    return d > FLT_MAX ? FLT_MAX : d < -FLT_MAX ? -FLT_MAX : d;
}

/* Packs block `number` of the `count` rows at `index` (NULL: all), less a centre (NULL: 0). */
static inline void panel_pack(
    float *block, Panel panel, int64_t number, Source from, int64_t channels,
    const int32_t *index, int64_t count, const float *centre
) {
    const int64_t start = number * panel.keys;
    const int plain = from.half == FLOAT32 && from.column == 1;
    int64_t rows = count - start;
    if (rows > panel.keys) rows = panel.keys;
    for (int64_t group = 0; group < panel.groups; group++) {
        float *to = block + group * panel.keys * REGARD_ROWS;
        const int64_t c0 = group * REGARD_ROWS;
        const int64_t width = channels - c0 < REGARD_ROWS ? channels - c0 : REGARD_ROWS;
        float zero[REGARD_ROWS] = {0};
        if (centre) memcpy(zero, centre + c0, (size_t)width * sizeof(float));
        for (int64_t key = 0; key < rows; key++, to += REGARD_ROWS) {
            const int64_t row = index ? index[start + key] : start + key;
            if (plain && width == REGARD_ROWS) { /* the usual case, in vectors */
                const float *x = (const float *)from.data + from.start + row * from.row + c0;
                FOR_ROWS(c) to[c] = centre ? finite_difference(x[c], zero[c]) : x[c];
                continue;
            }
            for (int64_t c = 0; c < width; c++) {
                const float x = source_at(from, row, c0 + c);
                to[c] = centre ? finite_difference(x, zero[c]) : x;
            }
            for (int64_t c = width; c < REGARD_ROWS; c++) to[c] = 0;
        }
        memset(to, 0, (size_t)((panel.keys - rows) * REGARD_ROWS) * sizeof(float));
    }
}

/* A tile of few rows leaves its last vectors alone: kernels take how many `vectors` there are to
 * work on, as a constant, and the number of a tile chooses between their copies. */
#define FOR_FIRST(v) REGARD_UNROLL for (int v = 0; v < vectors; v++)
#if REGARD_VECTORS > 2
#define WITH_VECTORS(vectors, function, ...)                        \
    do {                                                            \
        if ((vectors) == 1) function(1, __VA_ARGS__);               \
        else if ((vectors) == 2) function(2, __VA_ARGS__);          \
        else function(REGARD_VECTORS, __VA_ARGS__);                 \
    } while (0)
#else
#define WITH_VECTORS(vectors, function, ...)                        \
    do {                                                            \
        if ((vectors) == 1) function(1, __VA_ARGS__);               \
        else function(REGARD_VECTORS, __VA_ARGS__);                 \
    } while (0)
#endif

/* acc[r] += sum_c K[key + r, c] X[c] for the R keys from `key` on. */
REGARD_INLINE void panel_dot_of(
    const int vectors, const float *block, Panel panel, int64_t key, const lanes *x,
    vector acc[REGARD_ROWS][REGARD_VECTORS]
) {
    const float *at = block + key * REGARD_ROWS;
    const int64_t step = panel.keys * REGARD_ROWS;
    for (int64_t group = 0; group < panel.groups; group++, at += step) {
        REGARD_UNROLL
        for (int c = 0; c < REGARD_ROWS; c++) {
            const lanes *row = x + group * REGARD_ROWS + c;
            FOR_ROWS(r) FOR_FIRST(v) acc[r][v] += at[r * REGARD_ROWS + c] * (*row)[v];
        }
    }
}

REGARD_INLINE void panel_dot(
    const float *block, Panel panel, int64_t key, const lanes *x,
    vector acc[REGARD_ROWS][REGARD_VECTORS]
) {
    panel_dot_of(REGARD_VECTORS, block, panel, key, x, acc);
}

REGARD_INLINE void panel_weigh_(
    const int vectors, const float *block, Panel panel, int64_t count, const lanes *x,
    const vector *constant, const lanes *p, lanes *t, const int cut
) {
    for (int64_t key = 0; key < count; key += REGARD_ROWS) {
        vector acc[REGARD_ROWS][REGARD_VECTORS];
        FOR_ROWS(r) FOR_FIRST(v) acc[r][v] = constant[v];
        panel_dot_of(vectors, block, panel, key, x, acc);
        FOR_ROWS(r) FOR_FIRST(v) {
            const vector weight = p[key + r][v];
            vector product = weight * acc[r][v];
            if (cut) product = v_keep((vector_mask)(weight != (vector){0}), product);
            t[key + r][v] = product;
        }
    }
}

/* T[key] = P[key] (K[key] . x + constant) for `count` keys of a block. `cut` says that some lane
 * does not see some of these keys: the product with such a key may be infinite, its T is 0. */
REGARD_SHARED void panel_weigh(
    int vectors, const float *block, Panel panel, int64_t count, const lanes *x,
    const lanes constant, const lanes *p, lanes *t, int cut
) {
    if (cut) WITH_VECTORS(vectors, panel_weigh_, block, panel, count, x, constant, p, t, 1);
    else WITH_VECTORS(vectors, panel_weigh_, block, panel, count, x, constant, p, t, 0);
}

REGARD_INLINE void panel_collect_(
    const int vectors, const float *block, Panel panel, int64_t count, const lanes *t, lanes *y
) {
    for (int64_t group = 0; group < panel.groups; group++, y += REGARD_ROWS) {
        const float *at = block + group * panel.keys * REGARD_ROWS;
        vector acc[REGARD_ROWS][REGARD_VECTORS];
        FOR_ROWS(r) FOR_FIRST(v) acc[r][v] = (vector){0};
        for (int64_t key = 0; key < count; key++, at += REGARD_ROWS) {
            FOR_ROWS(r) FOR_FIRST(v) acc[r][v] += at[r] * t[key][v];
        }
        FOR_ROWS(r) FOR_FIRST(v) y[r][v] += acc[r][v];
    }
}

/* Y[c] += sum_key K[key, c] T[key] over `count` keys of a block. */
REGARD_SHARED void panel_collect(
    int vectors, const float *block, Panel panel, int64_t count, const lanes *t, lanes *y
) {
    WITH_VECTORS(vectors, panel_collect_, block, panel, count, t, y);
}

#endif
