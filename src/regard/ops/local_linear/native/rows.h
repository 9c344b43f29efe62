/* Keys and values as rows where the user has them, for a few queries at a time.
 *
 * Vectors lie along the channels. A block of rows stays in the first cache, where it serves two
 * products, rows . x and sum_j t_j row_j. Rows that cannot be read in whole vectors, are of 16
 * bits, or hold what must not be read, are copied first.
 */
#ifndef LOCAL_LINEAR_ROWS_H
#define LOCAL_LINEAR_ROWS_H

#include "panel.h"
#include "reduce.h"

#define W REGARD_WIDTH
#define BLOCK 32 /* rows: a multiple of every width */

typedef uint16_t halves __attribute__((vector_size(2 * W), aligned(2), may_alias));

static inline vector widen(const uint16_t *from, int half) {
    const vector_mask bits = __builtin_convertvector(*(const halves *)from, vector_mask);
    if (half == BFLOAT16) return (vector)(bits << 16);
    const vector_mask sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    /* The exponent of a half, moved into place and corrected by a product: right for subnormals. */
    const vector finite = (vector)(magnitude << 13) * 0x1p112f;
    const vector_mask special = (magnitude << 13) | 0x7f800000;
    return (vector)(sign | (vector_mask)v_select(magnitude >= 0x7c00, (vector)special, finite));
}

/* A difference may overflow: large instead of infinite, because 0 times infinity is no 0. */
static inline vector finite_vector(vector x) {
    const vector most = v_broadcast(FLT_MAX);
    return v_select(x > most, most, v_select(x < -most, -most, x));
}

/* Rows `first`, ... of a source less a centre (NULL: 0), into [count][padded] with zeros beyond the
 * `width` channels; a row whose byte of `mask` is 0, or beyond `rows`, is all zero. */
static void copy_rows(
    float *to, int64_t count, Source from, int64_t first, int64_t rows, int64_t width,
    int64_t padded, const float *centre, const uint8_t *mask, int64_t mask_step
) {
    const int64_t size = from.half ? 2 : 4, full = width / W * W;
    for (int64_t j = 0; j < count; j++, to += padded) {
        if (j >= rows || (mask && !mask[j * mask_step])) {
            memset(to, 0, padded * sizeof(float));
            continue;
        }
        const char *row = (const char *)from.data + (from.start + (first + j) * from.row) * size;
        for (int64_t c = 0; c < width; c += W) {
            vector x;
            if (c < full) {
                x = from.half ? widen((const uint16_t *)row + c, from.half)
                              : v_load((const float *)row + c);
            } else {
                float end[W] = {0};
                uint16_t short_end[W] = {0};
                memcpy(from.half ? (void *)short_end : (void *)end, row + c * size,
                       (width - c) * size);
                x = from.half ? widen(short_end, from.half) : v_load(end);
            }
            v_store(to + c, centre ? finite_vector(x - v_load(centre + c)) : x);
        }
    }
}

/* Rows of one block: where they lie, or a copy in `buffer`. `centre` is what the two products are
 * still to take off: that of the keys, or zeros after a copy. */
typedef struct {
    const float *at, *centre;
    int64_t step;
} Rows;

/* `mask` is that of the first of these rows. */
static Rows read_rows(
    float *buffer, const float *zeros, Source from, int64_t first, int64_t rows, int64_t width,
    int64_t padded, const float *centre, const uint8_t *mask, int64_t mask_step, int copy
) {
    if (mask) {
        int all = 1;
        for (int64_t j = 0; j < rows; j++) all &= mask[j * mask_step] != 0;
        if (all) mask = NULL;
    }
    if (!copy && !from.half && rows == BLOCK && padded == width && !mask) {
        const float *at = (const float *)from.data + from.start + first * from.row;
        return (Rows){at, centre ? centre : zeros, from.row};
    }
    copy_rows(buffer, BLOCK, from, first, rows, width, padded, centre, mask, mask_step);
    return (Rows){buffer, zeros, padded};
}

/* Rows from `first` on. */
static inline Rows rows_from(Rows rows, int64_t first) {
    return (Rows){rows.at + first * rows.step, rows.centre, rows.step};
}

/* W keys times x. */
static inline vector dots(Rows keys, int64_t padded, const float *x) {
    vector sum[W];
    REGARD_UNROLL
    for (int i = 0; i < W; i++) sum[i] = (vector){0};
    for (int64_t c = 0; c < padded; c += W) {
        const vector factor = v_load(x + c), centre = v_load(keys.centre + c);
        const float *key = keys.at + c;
        REGARD_UNROLL
        for (int i = 0; i < W; i++) {
            sum[i] += (v_load(key) - centre) * factor;
            key += keys.step;
        }
    }
    return v_sums(sum);
}

/* total[vectors * W] += sum_j t_j row_j over a block; enough sums at once to hide latency. */
static inline __attribute__((always_inline)) void gather_some(
    Rows rows, const float *t, float *total, int64_t c, const int vectors
) {
    enum { SUMS = 8 };
    const int splits = SUMS / vectors;
    vector sum[SUMS], centre[SUMS];
    REGARD_UNROLL
    for (int i = 0; i < SUMS; i++) sum[i] = (vector){0};
    REGARD_UNROLL
    for (int i = 0; i < vectors; i++) centre[i] = v_load(rows.centre + c + i * W);
    for (int64_t j = 0; j < BLOCK; j += splits) {
        REGARD_UNROLL
        for (int s = 0; s < splits; s++) {
            const float *row = rows.at + (j + s) * rows.step + c;
            REGARD_UNROLL
            for (int i = 0; i < vectors; i++)
                sum[s * vectors + i] += t[j + s] * (v_load(row + i * W) - centre[i]);
        }
    }
    REGARD_UNROLL
    for (int i = 0; i < vectors; i++) {
        vector all = sum[i];
        REGARD_UNROLL
        for (int s = 1; s < splits; s++) all += sum[s * vectors + i];
        v_store(total + c + i * W, v_load(total + c + i * W) + all);
    }
}

static void gather(Rows rows, const float *t, float *total, int64_t padded) {
    int64_t c = 0;
    for (; c + 4 * W <= padded; c += 4 * W) gather_some(rows, t, total, c, 4);
    if (c + 2 * W <= padded) gather_some(rows, t, total, c, 2), c += 2 * W;
    if (c < padded) gather_some(rows, t, total, c, 1);
}

/* moments[a][c] += sum_j p_j k_ja k_jc for c >= a, from centred copies of keys. */
static void add_moments(
    const float *keys, const float *p, float *scaled, float *moments, int64_t padded
) {
    enum { ROWS = REGARD_ROWS < W ? REGARD_ROWS : W };
    for (int64_t j = 0; j < BLOCK; j++)
        for (int64_t c = 0; c < padded; c += W)
            v_store(scaled + j * padded + c, p[j] * v_load(keys + j * padded + c));
    for (int64_t a = 0; a < padded; a += ROWS) {
        int64_t c = a / W * W;
        for (; c + 2 * W <= padded; c += 2 * W) {
            vector sum[ROWS][2];
            REGARD_UNROLL
            for (int i = 0; i < ROWS; i++) sum[i][0] = sum[i][1] = (vector){0};
            for (int64_t j = 0; j < BLOCK; j++) {
                const float *left = scaled + j * padded + a, *right = keys + j * padded + c;
                const vector one = v_load(right), two = v_load(right + W);
                REGARD_UNROLL
                for (int i = 0; i < ROWS; i++) {
                    sum[i][0] += left[i] * one;
                    sum[i][1] += left[i] * two;
                }
            }
            REGARD_UNROLL
            for (int i = 0; i < ROWS; i++) {
                float *to = moments + (a + i) * padded + c;
                v_store(to, v_load(to) + sum[i][0]);
                v_store(to + W, v_load(to + W) + sum[i][1]);
            }
        }
        if (c < padded) {
            vector sum[ROWS];
            REGARD_UNROLL
            for (int i = 0; i < ROWS; i++) sum[i] = (vector){0};
            for (int64_t j = 0; j < BLOCK; j++) {
                const float *left = scaled + j * padded + a;
                const vector one = v_load(keys + j * padded + c);
                REGARD_UNROLL
                for (int i = 0; i < ROWS; i++) sum[i] += left[i] * one;
            }
            REGARD_UNROLL
            for (int i = 0; i < ROWS; i++) {
                float *to = moments + (a + i) * padded + c;
                v_store(to, v_load(to) + sum[i]);
            }
        }
    }
}

#endif
