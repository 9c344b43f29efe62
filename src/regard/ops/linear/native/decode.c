/* A decoding step: the state of every key head is read, written and left, in one pass or two.
 *
 * Maps of queries and keys are formed here, so that a step is one call. The new state goes to its
 * own place: an older one stays as it was. Rows of the state are read as they lie in memory.
 */
#include "decode.h"

#include <math.h>

#include "call.h"
#include "decays.h"
#include "exp.h"
#include "reduce.h"

#define WIDE 4 /* vectors of columns at a time */

/* phi(x), zeros up to a whole vector; returns nothing that a row of zeros would not keep. */
static void map_row(int64_t map, const float *x, int64_t count, double scale, float *to) {
    vector squares = {0}, largest = {0};
    const vector zero = {0};
    if (map == MAP_UNIT) {
        for (int64_t c = 0; c < count; c += REGARD_WIDTH) {
            const vector part = part_load(x + c, count - c);
            largest = v_max(largest, v_max(part, -part));
        }
        const float top = v_top(largest); /* no square overflows */
        scale = top > 0 ? scale / top : 0;
        for (int64_t c = 0; c < count; c += REGARD_WIDTH) {
            const vector part = part_load(x + c, count - c) * (float)scale;
            squares += part * part;
        }
        const float sum = v_sum(squares);
        scale = sum > 0 ? scale / sqrt((double)sum) : 0;
    }
    for (int64_t c = 0; c < count; c += REGARD_WIDTH) {
        vector y = part_load(x + c, count - c);
        if (map == MAP_ELU) {
            /* Half of the exponent, squared: v_exp2 ends at 2^-100, and a divisor may need less. */
            const vector half =
                v_exp2(v_keep((vector_mask)(y < zero), y) * (float)(REGARD_LOG2E / 2));
            y = v_select((vector_mask)(y > zero), y + 1.0f, half * half);
        } else if (map == MAP_RELU) {
            y = v_select((vector_mask)(y < zero), zero, y);
        }
        y *= (float)scale;
        if (count - c < REGARD_WIDTH) y = part_load((const float *)&y, count - c);
        v_store(to + c, y);
    }
}

/* What a step of one key head is made of, its rows prepared; `plain`: no decay is 0. */
typedef struct {
    const float *key, *decay, *held_by; /* the last: key times decay */
    const float *queries, *value, *inverse;
    int64_t stride;
    float beta;
    int plain;
} Prepared;

INLINE vector step_load(const int whole, const float *from, int64_t left) {
    return whole ? v_load(from) : part_load(from, left);
}

INLINE void step_store(const int whole, float *to, vector x, int64_t left) {
    if (whole) v_store(to, x);
    else part_store(to, x, left);
}

/* The columns [column, column + vectors * W) of a state: all of them (`whole`), or up to its end.
 * A row that is forgotten may hold anything: only where there is none (`plain`) is it read. */
INLINE void step_columns(
    const int vectors, const int whole, const int plain, const Step *s, const Prepared *p,
    int64_t n, int64_t column, float *out
) {
    const int64_t F = s->features, E = s->channels, group = s->heads / s->key_heads;
    const int64_t left = E - column;
    const float *from = s->state ? s->state + n * F * E + column : 0;
    float *to = s->next_state + n * F * E + column;
    vector write[WIDE], seen[WIDE];
    EACH(v, vectors)
        write[v] = step_load(whole, p->value + column + v * REGARD_WIDTH, left - v * REGARD_WIDTH);
    if (s->beta) {
        vector held[WIDE];
        EACH(v, vectors) held[v] = (vector){0};
        for (int64_t row = 0; from && row < F; row++) {
            if (!plain && p->decay[row] == 0) continue;
            const float weight = p->held_by[row];
            EACH(v, vectors) {
                const int64_t c = v * REGARD_WIDTH;
                held[v] += weight * step_load(whole, from + row * E + c, left - c);
            }
        }
        EACH(v, vectors) write[v] = p->beta * (write[v] - held[v]);
    }
    EACH(v, vectors) seen[v] = (vector){0};
    for (int64_t row = 0; row < F; row++) {
        const int kept = from && (plain || p->decay[row] != 0);
        EACH(v, vectors) {
            const int64_t c = v * REGARD_WIDTH;
            vector x = p->key[row] * write[v];
            if (kept) x += p->decay[row] * step_load(whole, from + row * E + c, left - c);
            step_store(whole, to + row * E + c, x, left - c);
            seen[v] += p->queries[row] * x;
        }
    }
    for (int64_t h = 0; h < group; h++) {
        if (h > 0) {
            EACH(v, vectors) seen[v] = (vector){0};
            for (int64_t row = 0; row < F; row++) EACH(v, vectors) {
                const int64_t c = v * REGARD_WIDTH;
                const vector x = step_load(whole, to + row * E + c, left - c);
                seen[v] += p->queries[h * p->stride + row] * x;
            }
        }
        EACH(v, vectors) {
            const int64_t c = v * REGARD_WIDTH;
            step_store(whole, out + h * E + column + c, seen[v] * p->inverse[h], left - c);
        }
    }
}

static void step_head(const Step *s, const Prepared *p, int64_t n, float *out) {
    const int64_t E = s->channels;
    int64_t column = 0;
    for (; E - column >= WIDE * REGARD_WIDTH; column += WIDE * REGARD_WIDTH) {
        if (p->plain && s->state) step_columns(WIDE, 1, 1, s, p, n, column, out);
        else step_columns(WIDE, 1, 0, s, p, n, column, out);
    }
    for (; column < E; column += REGARD_WIDTH) step_columns(1, 0, 0, s, p, n, column, out);
}

/* Sums of weights of the queries, turned round, and the next z. */
static void step_weights(
    const Step *s, int64_t n, const float *key, const float *decay, float *queries,
    int64_t stride, float *inverse
) {
    const int64_t F = s->features, group = s->heads / s->key_heads;
    float *z = s->next_total + n * F;
    for (int64_t row = 0; row < F; row++) {
        const float before = s->total && decay[row] != 0 ? decay[row] * s->total[n * F + row] : 0;
        z[row] = before + key[row];
    }
    for (int64_t h = 0; h < group; h++) {
        vector sum = {0};
        for (int64_t c = 0; c < F; c += REGARD_WIDTH)
            sum += v_load(queries + h * stride + c) * part_load(z + c, F - c);
        float weight = v_sum(sum) + (float)s->epsilon;
        if (s->normaliser == BY_SUM && s->epsilon == 0 && weight != 0 && __builtin_fabsf(weight) < 1e-30f) {
            /* A factor of the query cancels, and the inverse of such a weight may overflow. */
            sum = (vector){0};
            for (int64_t c = 0; c < F; c += REGARD_WIDTH) {
                const vector larger = v_load(queries + h * stride + c) * 1e30f;
                v_store(queries + h * stride + c, larger);
                sum += larger * part_load(z + c, F - c);
            }
            weight = v_sum(sum);
        }
        if (s->normaliser == BY_CLAMP && weight < (float)s->minimum)
            inverse[h] = (float)(1 / s->minimum);
        else inverse[h] = weight == 0 ? 0 : 1 / weight;
    }
}

static const float *step_row(const float *x, StepStrides at, int64_t b, int64_t h) {
    return x + b * at.batch + h * at.head;
}

REGARD_EXPORT(int64_t, linear_step_size)(void) { return sizeof(Step); }

/* REGARD_NO_MEMORY without memory for a few rows, else 0. */
REGARD_EXPORT(int64_t, linear_step)(const Step *s) {
    const int64_t F = s->features, E = s->channels, group = s->heads / s->key_heads;
    const int64_t stride = up_to(F, REGARD_WIDTH);
    float *block = aligned_block(((3 + group) * stride + group) * (int64_t)sizeof(float));
    if (!block) return REGARD_NO_MEMORY;
    float *key = block, *decay = key + stride, *held_by = decay + stride;
    float *queries = held_by + stride, *inverse = queries + group * stride;
    for (int64_t n = 0; n < s->batch * s->key_heads; n++) {
        const int64_t b = n / s->key_heads, hk = n % s->key_heads;
        map_row(s->key_map, step_row(s->k, s->k_at, b, hk), F, 1.0, key);
        for (int64_t h = 0; h < group; h++) {
            map_row(s->query_map, step_row(s->q, s->q_at, b, hk * group + h), F, s->scale,
                    queries + h * stride);
            inverse[h] = 1;
        }
        for (int64_t row = 0; row < stride; row++) decay[row] = 1;
        if (s->log_decay) {
            const float *log_decay = step_row(s->log_decay, s->log_decay_at, b, hk);
            double owed[DOUBLES];
            if (s->per_channel) for (int64_t row = 0; row < F; row += DOUBLES) {
                const int64_t count = F - row < DOUBLES ? F - row : DOUBLES;
                channel_decays(log_decay + row, 0, 1, count, DOUBLES, decay + row, owed);
            } else {
                token_decays(log_decay, 0, 1, decay);
                for (int64_t row = 1; row < F; row++) decay[row] = decay[0];
            }
        }
        int plain = 1;
        for (int64_t row = 0; row < F; row++) plain &= decay[row] != 0;
        for (int64_t row = 0; row < F; row++) held_by[row] = key[row] * decay[row];
        if (s->normaliser) step_weights(s, n, key, decay, queries, stride, inverse);
        const Prepared p = {
            key, decay, held_by, queries, step_row(s->v, s->v_at, b, hk), inverse, stride,
            s->beta ? *step_row(s->beta, s->beta_at, b, hk) : 0, plain
        };
        step_head(s, &p, n, s->out + n * group * E);
    }
    free_block(block);
    return 0;
}
