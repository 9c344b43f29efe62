/* Rows of Hedgehog's feature maps: z = x W + b (+ x), a product per tile of rows, and phi of z.
 *
 * A row is read from the L1 cache as often as its activation needs it and is written once. `full`
 * says whether the half of -z is there, `shifted` (EXP) that the largest feature is divided out.
 * Values below LEAST are LEAST (not for EXP and JOINT).
 */
#ifndef LINEAR_ACTIVATE_H
#define LINEAR_ACTIVATE_H

#include "exp.h"
#include "product.h"
#include "reduce.h"

enum { SOFTMAX = 0, EXP_DIM = 1, EXP = 2, JOINT = 3, POS_ELU = 4 };

#define LEAST 1e-12f
#define LIMIT 60.0f

typedef struct {
    int64_t name, channels, full, shifted;
} Activation;

REGARD_SHARED int64_t features_of(const Activation *kind) {
    const int twice = (kind->name <= EXP && kind->full) || kind->name == JOINT;
    return kind->channels * (twice ? 2 : 1);
}

/* `count` numbers from `from`, the rest `fill`. */
static inline vector some(const float *from, int64_t count, float fill) {
    if (count >= REGARD_WIDTH) return v_load(from);
    float part[REGARD_WIDTH];
    for (int64_t i = 0; i < REGARD_WIDTH; i++) part[i] = i < count ? from[i] : fill;
    return v_load(part);
}

static inline void put(float *to, int64_t count, vector x) {
    if (count >= REGARD_WIDTH) {
        v_store(to, x);
        return;
    }
    float part[REGARD_WIDTH];
    v_store(part, x);
    for (int64_t i = 0; i < count; i++) to[i] = part[i];
}

static inline vector v_min(vector a, vector b) { return v_select(a < b, a, b); }

static inline float least_of(vector x) { return -v_top(-x); }

/* e^x for |x| <= 80, to a relative error of 1e-7 + 4e-8 |x|. */
static inline vector v_exp(vector x) { return v_exp2(x * (float)REGARD_LOG2E); }

/* phi = e^(sign x - shift) of one half; returns the sum of its first `channels` numbers. */
static inline float half(
    const float *z, float *phi, int64_t channels, float sign, float shift, float times
) {
    vector sum = {0};
    for (int64_t c = 0; c < channels; c += REGARD_WIDTH) {
        const int64_t left = channels - c;
        const vector x = sign * times * some(z + c, left, 0) - shift;
        const vector y = v_exp(x);
        put(phi + c, left, y);
        if (left >= REGARD_WIDTH) sum += y;
        else sum += some(phi + c, left, 0);
    }
    return v_sum(sum);
}

/* e^x and e^-x for |x| <= 80, to a relative error of 1e-7: one range reduction, and the even and
 * the odd part of one polynomial. NaN stays NaN. */
static inline void exp_both(vector x, vector *up, vector *down) {
    const vector magic = v_broadcast(12582912.0f); /* 1.5 * 2^23 rounds to an integer */
    const vector shifted = x * (float)REGARD_LOG2E + magic, n = shifted - magic;
    const vector f = (x - n * 0.693359375f) + n * 2.12194440e-4f, g = f * f;
    const vector even = ((g * (1.0f / 720) + 1.0f / 24) * g + 0.5f) * g + 1.0f;
    const vector odd = (((g * (1.0f / 5040) + 1.0f / 120) * g + 1.0f / 6) * g + 1.0f) * f;
    const vector_mask power = ((vector_mask)shifted - (vector_mask)magic) << 23;
    const vector_mask one = (vector_mask)v_broadcast(1.0f);
    *up = (even + odd) * (vector)(one + power);
    *down = (even - odd) * (vector)(one - power);
}

#define NO_OVERFLOW 40.0f /* sums of e^40 and their inverses are well inside the range */

/* Both halves of SOFTMAX of a row whose exponents cannot overflow: its weights need no shift then.
 * Whether it is such a row. */
REGARD_SHARED int softmax_both(const float *z, float *phi, int64_t channels) {
    const vector most = v_broadcast(NO_OVERFLOW);
    vector up = {0}, down = {0};
    vector_mask outside = {0};
    for (int64_t c = 0; c < channels; c += REGARD_WIDTH) {
        const vector x = v_load(z + c);
        vector a, b;
        outside |= (vector_mask)~(v_max(x, -x) <= most) | (vector_mask)(x != x);
        exp_both(x, &a, &b);
        v_store(phi + c, a), v_store(phi + channels + c, b);
        up += a, down += b;
    }
    if (v_any(outside)) return 0;
    const vector least = v_broadcast(LEAST);
    const float first = 1.0f / v_sum(up), second = 1.0f / v_sum(down);
    for (int64_t c = 0; c < channels; c += REGARD_WIDTH) {
        v_store(phi + c, v_max(least, v_load(phi + c) * first)); /* this way round, NaN passes */
        v_store(phi + channels + c, v_max(least, v_load(phi + channels + c) * second));
    }
    return 1;
}

static inline void finish(float *phi, int64_t count, float factor) {
    for (int64_t c = 0; c < count; c += REGARD_WIDTH) {
        const int64_t left = count - c;
        const vector x = some(phi + c, left, 0) * factor;
        put(phi + c, left, v_max(v_broadcast(LEAST), x)); /* this way round, NaN passes */
    }
}

REGARD_SHARED void activate_row(const Activation *kind, const float *z, float *phi) {
    const int64_t C = kind->channels;
    vector large = v_broadcast(z[0]), small = large;
    for (int64_t c = 0; c < C; c += REGARD_WIDTH) {
        const vector x = some(z + c, C - c, z[0]);
        large = v_max(large, x);
        small = v_min(small, x);
    }
    const float most = v_top(large), least = least_of(small);
    switch (kind->name) {
        case SOFTMAX:
            finish(phi, C, 1.0f / half(z, phi, C, 1.0f, most, 1.0f));
            if (kind->full) finish(phi + C, C, 1.0f / half(z, phi + C, C, -1.0f, -least, 1.0f));
            break;
        case EXP_DIM:
            half(z, phi, C, 1.0f, most, 1.0f);
            finish(phi, C, 1.0f);
            if (kind->full) {
                half(z, phi + C, C, -1.0f, -least, 1.0f);
                finish(phi + C, C, 1.0f);
            }
            break;
        case JOINT: {
            const float top = 2.0f * (most > -least ? most : -least);
            const float sum = half(z, phi, C, 1.0f, top, 2.0f) +
                              half(z, phi + C, C, -1.0f, top, 2.0f);
            for (int64_t c = 0; c < 2 * C; c += REGARD_WIDTH)
                put(phi + c, 2 * C - c, some(phi + c, 2 * C - c, 0) * (1.0f / sum));
            break;
        }
        case EXP: {
            float shift = 0;
            if (kind->shifted) {
                shift = most < LIMIT ? (most > -LIMIT ? most : -LIMIT) : LIMIT;
                const float other = -least < LIMIT ? (-least > -LIMIT ? -least : -LIMIT) : LIMIT;
                if (kind->full && other > shift) shift = other;
            }
            const vector limit = v_broadcast(LIMIT);
            for (int64_t c = 0; c < C; c += REGARD_WIDTH) {
                const int64_t left = C - c;
                vector x = some(z + c, left, 0);
                x = v_select(x > limit, limit, v_select(x < -limit, -limit, x));
                put(phi + c, left, v_exp(x - shift));
                if (kind->full) put(phi + C + c, left, v_exp(-x - shift));
            }
            break;
        }
        default:
            for (int64_t c = 0; c < C; c += REGARD_WIDTH) {
                const vector x = some(z + c, C - c, 0), zero = {0};
                const vector below = v_exp(v_max(v_broadcast(-80.0f), v_select(x > zero, zero, x)));
                const vector y = below + v_select(x > zero, x, zero);
                put(phi + c, C - c, v_max(v_broadcast(LEAST), v_select(x != x, x, y)));
            }
    }
}

/* phi of `count` rows of z [count][stride]. */
REGARD_SHARED void activate_rows(
    const Activation *kind, const float *z, int64_t count, int64_t stride, float *phi
) {
    const int64_t C = kind->channels, width = features_of(kind);
    const int pairs = kind->name == SOFTMAX && kind->full && C % REGARD_WIDTH == 0;
    for (int64_t row = 0; row < count; row++, z += stride, phi += width)
        if (!pairs || !softmax_both(z, phi, C)) activate_row(kind, z, phi);
}

/* z = x W + b (+ x), W [inner][stride], b [stride] or NULL; `stride` is `channels` filled up. */
typedef struct {
    const float *weight, *bias;
    int64_t inner, channels, stride, skip;
} Projection;

/* Floats of work space for a tile of `rows`: z and a copy of ragged x. */
REGARD_SHARED int64_t projection_floats(int64_t rows, int64_t inner, int64_t stride) {
    return up_to(rows, BLOCK_ROWS) * (stride + up_to(inner, REGARD_WIDTH));
}

/* z [count][stride] at the beginning of `tile`, of the rows x [count][step]. */
REGARD_SHARED void project_rows(
    const Projection *by, const float *x, int64_t step, int64_t count, float *tile
) {
    const int64_t D = by->inner, stride = by->stride, whole = up_to(count, BLOCK_ROWS);
    Left left = {x, step, 1};
    if (whole != count) { /* a product takes whole blocks of rows */
        float *rows = tile + whole * stride;
        for (int64_t t = 0; t < whole; t++) {
            if (t < count) memcpy(rows + t * D, x + t * step, (size_t)D * sizeof(float));
            else memset(rows + t * D, 0, (size_t)D * sizeof(float));
        }
        left = (Left){rows, D, 1};
    }
    product(whole, stride, D, left, by->weight, stride, by->bias, tile, stride);
    for (int64_t t = 0; by->skip && t < count; t++)
        for (int64_t c = 0; c < by->channels; c += REGARD_WIDTH) {
            float *at = tile + t * stride + c;
            v_store(at, v_load(at) + part_load(x + t * step + c, by->channels - c));
        }
}

#endif
