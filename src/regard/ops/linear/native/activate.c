/* Feature maps of Hedgehog on rows: z [rows][channels] -> phi [rows][width], and back.
 *
 * A row is read from the L1 cache as often as its activation needs it and is written once; the
 * gradient needs phi alone. `full` says whether the half of -z is there, `shifted` (EXP) that the
 * largest feature is divided out. Values below LEAST are LEAST and have no gradient (not for EXP
 * and JOINT).
 */
#include <math.h>

#include "exp.h"
#include "reduce.h"
#include "threads.h"

enum { SOFTMAX = 0, EXP_DIM = 1, EXP = 2, JOINT = 3, POS_ELU = 4 };

#define LEAST 1e-12f
#define LIMIT 60.0f
#define ROWS_AT_ONCE 64 /* that a thread takes */

typedef struct {
    Team team;
    const float *z, *phi_in, *gradient;
    float *out;
    int64_t rows, channels, kind, full, shifted, next;
} Job;

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

static inline void finish(float *phi, int64_t count, float factor) {
    for (int64_t c = 0; c < count; c += REGARD_WIDTH) {
        const int64_t left = count - c;
        const vector x = some(phi + c, left, 0) * factor;
        put(phi + c, left, v_max(v_broadcast(LEAST), x)); /* this way round, NaN passes */
    }
}

static void activate_row(const Job *job, const float *z, float *phi) {
    const int64_t C = job->channels;
    vector large = v_broadcast(z[0]), small = large;
    for (int64_t c = 0; c < C; c += REGARD_WIDTH) {
        const vector x = some(z + c, C - c, z[0]);
        large = v_max(large, x);
        small = v_min(small, x);
    }
    const float most = v_top(large), least = least_of(small);
    switch (job->kind) {
        case SOFTMAX:
            finish(phi, C, 1.0f / half(z, phi, C, 1.0f, most, 1.0f));
            if (job->full) finish(phi + C, C, 1.0f / half(z, phi + C, C, -1.0f, -least, 1.0f));
            break;
        case EXP_DIM:
            half(z, phi, C, 1.0f, most, 1.0f);
            finish(phi, C, 1.0f);
            if (job->full) {
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
            if (job->shifted) {
                shift = most < LIMIT ? (most > -LIMIT ? most : -LIMIT) : LIMIT;
                const float other = -least < LIMIT ? (-least > -LIMIT ? -least : -LIMIT) : LIMIT;
                if (job->full && other > shift) shift = other;
            }
            const vector limit = v_broadcast(LIMIT);
            for (int64_t c = 0; c < C; c += REGARD_WIDTH) {
                const int64_t left = C - c;
                vector x = some(z + c, left, 0);
                x = v_select(x > limit, limit, v_select(x < -limit, -limit, x));
                put(phi + c, left, v_exp(x - shift));
                if (job->full) put(phi + C + c, left, v_exp(-x - shift));
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

/* The gradient of one half's exponents, weighed by phi: sign g phi, less what goes through the
 * sum (SOFTMAX) or the largest (EXP_DIM, shifted EXP) of that half. `add`: onto dz. */
static inline float weighed_sum(const float *g, const float *phi, int64_t count, float least) {
    vector sum = {0};
    for (int64_t c = 0; c < count; c += REGARD_WIDTH) {
        const vector p = some(phi + c, count - c, 0), x = some(g + c, count - c, 0);
        sum += v_keep(p > v_broadcast(least), x * p);
    }
    return v_sum(sum);
}

static inline float count_of_ones(const float *phi, int64_t count) {
    float ones = 0;
    for (int64_t c = 0; c < count; c++) ones += phi[c] == 1.0f;
    return ones;
}

static void half_gradient(
    const Job *job, const float *g, const float *phi, float *dz, float sign, int add, float least,
    float edge, float mean, float share
) {
    const int64_t C = job->channels;
    for (int64_t c = 0; c < C; c += REGARD_WIDTH) {
        const int64_t left = C - c;
        const vector p = some(phi + c, left, 0), x = some(g + c, left, 0);
        vector_mask live = (vector_mask)(p > v_broadcast(least));
        if (edge > 0) live &= (vector_mask)(p < v_broadcast(edge));
        vector y = v_keep(live, x * p) - mean * p;
        if (share != 0) y -= v_keep((vector_mask)(p == v_broadcast(1.0f)), v_broadcast(share));
        y *= sign;
        if (add) y += some(dz + c, left, 0);
        put(dz + c, left, y);
    }
}

static void differentiate_row(const Job *job, const float *g, const float *phi, float *dz) {
    const int64_t C = job->channels, halves = job->full ? 2 : 1;
    const float none = -1.0f;
    switch (job->kind) {
        case SOFTMAX:
        case EXP_DIM:
            for (int64_t h = 0; h < halves; h++) {
                const float *gh = g + h * C, *ph = phi + h * C;
                const float sum = weighed_sum(gh, ph, C, LEAST);
                const int softmax = job->kind == SOFTMAX;
                const float share = softmax ? 0 : sum / count_of_ones(ph, C);
                half_gradient(job, gh, ph, dz, h ? -1.0f : 1.0f, h > 0, LEAST, 0,
                              softmax ? sum : 0, share);
            }
            break;
        case JOINT: {
            const float sum = weighed_sum(g, phi, 2 * C, none);
            half_gradient(job, g, phi, dz, 2.0f, 0, none, 0, sum, 0);
            half_gradient(job, g + C, phi + C, dz, -2.0f, 1, none, 0, sum, 0);
            break;
        }
        case EXP: {
            float share = 0, least = none, edge = 0;
            if (job->shifted)
                share = weighed_sum(g, phi, halves * C, none) / count_of_ones(phi, halves * C);
            else {
                edge = expf(LIMIT) * 0.99999f;
                least = 1.00001f / expf(LIMIT);
            }
            half_gradient(job, g, phi, dz, 1.0f, 0, least, edge, 0, share);
            if (job->full) half_gradient(job, g + C, phi + C, dz, -1.0f, 1, least, edge, 0, share);
            break;
        }
        default:
            for (int64_t c = 0; c < C; c += REGARD_WIDTH) {
                const int64_t left = C - c;
                const vector p = some(phi + c, left, 0), one = v_broadcast(1.0f);
                const vector slope = v_select(p < one, p, one);
                const vector_mask live = (vector_mask)(p > v_broadcast(LEAST));
                put(dz + c, left, v_keep(live, some(g + c, left, 0) * slope));
            }
    }
}

static void take_rows(void *shared, int64_t thread) {
    Job *job = shared;
    (void)thread;
    const int64_t twice = (job->kind <= EXP && job->full) || job->kind == JOINT;
    const int64_t C = job->channels, width = C * (twice ? 2 : 1);
    int64_t start;
    while ((start = take_next(&job->next) * ROWS_AT_ONCE) < job->rows) {
        const int64_t stop = start + ROWS_AT_ONCE < job->rows ? start + ROWS_AT_ONCE : job->rows;
        for (int64_t row = start; row < stop; row++) {
            if (job->z) activate_row(job, job->z + row * C, job->out + row * width);
            else
                differentiate_row(job, job->gradient + row * width, job->phi_in + row * width,
                                  job->out + row * C);
        }
    }
}

REGARD_EXPORT(void, linear_activate)
(const float *z, float *phi, int64_t rows, int64_t channels, int64_t kind, int64_t full,
 int64_t shifted, int64_t threads) {
    Job job = {.z = z, .out = phi, .rows = rows, .channels = channels, .kind = kind,
               .full = full, .shifted = shifted};
    run_team(&job.team, threads, take_rows, &job);
}

REGARD_EXPORT(void, linear_activate_backward)
(const float *gradient, const float *phi, float *dz, int64_t rows, int64_t channels, int64_t kind,
 int64_t full, int64_t shifted, int64_t threads) {
    Job job = {.gradient = gradient, .phi_in = phi, .out = dz, .rows = rows,
               .channels = channels, .kind = kind, .full = full, .shifted = shifted};
    run_team(&job.team, threads, take_rows, &job);
}
