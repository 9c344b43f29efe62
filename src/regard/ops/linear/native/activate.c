/* Feature maps of Hedgehog on rows, and back: z [rows][channels] -> phi [rows][width], where z may
 * be a product that is never written. The gradient of z needs phi alone.
 */
#include <math.h>

#include "activate.h"
#include "threads.h"

typedef struct {
    Team team;
    int64_t next;
    const float *z, *phi_in, *gradient; /* one of z, x, gradient is given */
    float *out;
    int64_t sets, tokens; /* rows: sets times tokens */
    Activation kind;
    const float *x; /* [batch][head][token][inner] by strides; a set is a head of a batch */
    int64_t batch, head, token, heads;
    Projection by; /* of the first head; all have one weight or bias, or one each */
    int64_t weights, biases;
    float *tiles; /* work space of all threads */
} Job;

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
    const Activation *kind, const float *g, const float *phi, float *dz, float sign, int add, float least,
    float edge, float mean, float share
) {
    const int64_t C = kind->channels;
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

static void differentiate_row(const Activation *kind, const float *g, const float *phi, float *dz) {
    const int64_t C = kind->channels, halves = kind->full ? 2 : 1;
    const float none = -1.0f;
    switch (kind->name) {
        case SOFTMAX:
        case EXP_DIM:
            for (int64_t h = 0; h < halves; h++) {
                const float *gh = g + h * C, *ph = phi + h * C;
                const float sum = weighed_sum(gh, ph, C, LEAST);
                const int softmax = kind->name == SOFTMAX;
                const float share = softmax ? 0 : sum / count_of_ones(ph, C);
                half_gradient(kind, gh, ph, dz, h ? -1.0f : 1.0f, h > 0, LEAST, 0,
                              softmax ? sum : 0, share);
            }
            break;
        case JOINT: {
            const float sum = weighed_sum(g, phi, 2 * C, none);
            half_gradient(kind, g, phi, dz, 2.0f, 0, none, 0, sum, 0);
            half_gradient(kind, g + C, phi + C, dz, -2.0f, 1, none, 0, sum, 0);
            break;
        }
        case EXP: {
            float share = 0, least = none, edge = 0;
            if (kind->shifted)
                share = weighed_sum(g, phi, halves * C, none) / count_of_ones(phi, halves * C);
            else {
                edge = expf(LIMIT) * 0.99999f;
                least = 1.00001f / expf(LIMIT);
            }
            half_gradient(kind, g, phi, dz, 1.0f, 0, least, edge, 0, share);
            if (kind->full) half_gradient(kind, g + C, phi + C, dz, -1.0f, 1, least, edge, 0, share);
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

#define ROWS_AT_ONCE 64 /* that a thread takes */

static void take_rows(void *shared, int64_t thread) {
    Job *job = shared;
    const Activation *kind = &job->kind;
    const int64_t C = kind->channels, width = features_of(kind);
    const int64_t tiles = (job->tokens + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    const int64_t space = projection_floats(ROWS_AT_ONCE, job->by.inner, job->by.stride);
    float *tile = job->x ? job->tiles + thread * space : 0;
    int64_t number;
    while ((number = take_next(&job->next)) < job->sets * tiles) {
        const int64_t n = number / tiles, start = number % tiles * ROWS_AT_ONCE;
        const int64_t left = job->tokens - start, count = left < ROWS_AT_ONCE ? left : ROWS_AT_ONCE;
        const int64_t first = n * job->tokens + start;
        if (job->z) activate_rows(kind, job->z + first * C, count, C, job->out + first * width);
        else if (job->x) {
            const int64_t h = n % job->heads;
            const float *x = job->x + n / job->heads * job->batch + h * job->head;
            Projection by = job->by;
            if (job->weights > 1) by.weight += h * by.inner * by.stride;
            if (by.bias && job->biases > 1) by.bias += h * by.stride;
            x += start * job->token;
            if (left > count) /* the next tile, which is most often this thread's */
                fetch_ahead(x + count * job->token, job->token,
                            left - count < count ? left - count : count, by.inner);
            project_rows(&by, x, job->token, count, tile);
            activate_rows(kind, tile, count, by.stride, job->out + first * width);
        } else for (int64_t at = first; at < first + count; at++)
            differentiate_row(kind, job->gradient + at * width, job->phi_in + at * width,
                              job->out + at * C);
    }
}

REGARD_EXPORT(void, linear_activate)
(const float *z, float *phi, int64_t rows, int64_t channels, int64_t kind, int64_t full,
 int64_t shifted, int64_t threads) {
    Job job = {.z = z, .out = phi, .sets = 1, .tokens = rows,
               .kind = {kind, channels, full, shifted}};
    run_team(&job.team, threads, take_rows, &job);
}

REGARD_EXPORT(void, linear_activate_backward)
(const float *gradient, const float *phi, float *dz, int64_t rows, int64_t channels, int64_t kind,
 int64_t full, int64_t shifted, int64_t threads) {
    Job job = {.gradient = gradient, .phi_in = phi, .out = dz, .sets = 1, .tokens = rows,
               .kind = {kind, channels, full, shifted}};
    run_team(&job.team, threads, take_rows, &job);
}

/* Rows filled up to whole vectors. */
static void fill_rows(const float *from, int64_t rows, int64_t columns, int64_t stride, float *to) {
    for (int64_t r = 0; r < rows; r++) {
        memcpy(to + r * stride, from + r * columns, (size_t)columns * sizeof(float));
        memset(to + r * stride + columns, 0, (size_t)(stride - columns) * sizeof(float));
    }
}

/* The features of x [batch][head][token][inner]; activate.py fills in the sizes. */
REGARD_EXPORT(int64_t, linear_project_activate)
(const float *x, const float *weight, const float *bias, float *phi, const int64_t *sizes) {
    const int64_t inner = sizes[3], C = sizes[4], stride = up_to(C, REGARD_WIDTH);
    const int64_t threads = sizes[14], rows = sizes[8] * inner;
    Job job = {.x = x, .out = phi, .sets = sizes[0] * sizes[1], .heads = sizes[1],
               .tokens = sizes[2], .batch = sizes[5], .head = sizes[6], .token = sizes[7],
               .weights = sizes[8], .biases = sizes[9],
               .by = {0, 0, inner, C, stride, sizes[10]},
               .kind = {sizes[11], C, sizes[12], sizes[13]}};
    const int64_t filled = (rows + (bias ? job.biases : 0)) * stride;
    const int64_t space = projection_floats(ROWS_AT_ONCE, inner, stride);
    float *block = aligned_block((filled + threads * space) * (int64_t)sizeof(float));
    if (!block) return REGARD_NO_MEMORY;
    fill_rows(weight, rows, C, stride, block);
    if (bias) fill_rows(bias, job.biases, C, stride, block + rows * stride);
    job.by.weight = block, job.by.bias = bias ? block + rows * stride : 0;
    job.tiles = block + filled;
    run_team(&job.team, threads, take_rows, &job);
    free_block(block);
    return 0;
}
