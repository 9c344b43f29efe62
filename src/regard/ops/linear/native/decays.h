/* Factors from log decays, such that their products stay exact however many there are.
 *
 * exp(a) rounded to a float is wrong by half its last digit, always to the same side where a is
 * constant: the product over the 10^5 tokens that a decay of 1 - 1e-5 remembers would be wrong by
 * 1e-3. What rounding took from the factors so far is therefore given back with the next one: the
 * product over any run of tokens is that of the exact factors to a few last digits.
 *
 * A factor below the smallest normal float is 0, which makes its token forget exactly.
 */
#ifndef LINEAR_DECAYS_H
#define LINEAR_DECAYS_H

#include "parts.h"

/* A register of doubles: half as many as floats. */
enum { DOUBLES = REGARD_WIDTH / 2 };
typedef double doubles __attribute__((vector_size(REGARD_BYTES)));
typedef int64_t doubles_mask __attribute__((vector_size(REGARD_BYTES)));
typedef float few_floats __attribute__((vector_size(REGARD_BYTES / 2)));

#define LEAST_LOG (-87.0) /* exp of it is still a normal float */

static inline doubles d_keep(doubles_mask mask, doubles x) {
    return (doubles)(mask & (doubles_mask)x);
}

static inline doubles d_load(const float *from) {
    few_floats x;
    memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, doubles);
}

/* Stores floats and returns what they are. */
static inline doubles d_round(float *to, doubles x) {
    const few_floats rounded = __builtin_convertvector(x, few_floats);
    memcpy(to, &rounded, sizeof rounded);
    return __builtin_convertvector(rounded, doubles);
}

/* e^x for x <= 80 to the last digits of a double, exactly 0 below LEAST_LOG; NaN stays NaN. */
static inline doubles d_exp(doubles x) {
    const doubles_mask enough = ~(doubles_mask)(x < LEAST_LOG);
    x = d_keep(enough, x);
    const double magic = 6755399441055744.0; /* 1.5 * 2^52 rounds to an integer */
    const doubles shifted = x * 1.4426950408889634 + magic;
    const doubles n = shifted - magic;
    const doubles f = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
    doubles y = f * (1.0 / 39916800) + 1.0 / 3628800;
    y = y * f + 1.0 / 362880;
    y = y * f + 1.0 / 40320;
    y = y * f + 1.0 / 5040;
    y = y * f + 1.0 / 720;
    y = y * f + 1.0 / 120;
    y = y * f + 1.0 / 24;
    y = y * f + 1.0 / 6;
    y = y * f + 0.5;
    y = y * f + 1.0;
    y = y * f + 1.0;
    const doubles_mask power = ((doubles_mask)shifted + 1023) << 52;
    return d_keep(enough, y * (doubles)power);
}

/* One factor per token: log_decay[t * step] -> factor[t]. */
REGARD_SHARED void token_decays(
    const float *log_decay, int64_t step, int64_t tokens, float *factor
) {
    double owed = 0; /* relative: what rounding has taken since the last token that forgot */
    for (int64_t t = 0; t < tokens; t += DOUBLES) {
        const int64_t count = tokens - t < DOUBLES ? tokens - t : DOUBLES;
        float given[DOUBLES] = {0}, rounded[DOUBLES];
        double exact[DOUBLES], lost[DOUBLES];
        for (int64_t i = 0; i < count; i++) given[i] = log_decay[(t + i) * step];
        const doubles e = d_exp(d_load(given));
        const doubles loss = e / d_round(rounded, e) - 1.0;
        memcpy(exact, &e, sizeof e);
        memcpy(lost, &loss, sizeof loss);
        for (int64_t i = 0; i < count; i++) { /* every second one pays back */
            if (rounded[i] == 0) owed = 0;
            else if (i % 2 == 0) owed += lost[i];
            else {
                const double wanted = exact[i] * (1 + owed);
                rounded[i] = (float)wanted;
                owed = (wanted - rounded[i]) / exact[i];
            }
            factor[t + i] = rounded[i];
        }
    }
}

/* A factor per channel: rows of log_decay -> factor [tokens][stride], ones behind the last
 * channel. `owed` is work space of `stride` doubles. */
REGARD_SHARED void channel_decays(
    const float *log_decay, int64_t step, int64_t tokens, int64_t channels, int64_t stride,
    float *factor, double *owed
) {
    memset(owed, 0, (size_t)stride * sizeof(double));
    for (int64_t t = 0; t < tokens; t++) {
        const float *row = log_decay + t * step;
        for (int64_t c = 0; c < stride; c += DOUBLES) {
            float given[DOUBLES] = {0};
            const int64_t count = channels - c < DOUBLES ? channels - c : DOUBLES;
            if (count > 0) memcpy(given, row + c, (size_t)count * sizeof(float));
            const doubles e = d_exp(d_load(given));
            doubles debt;
            memcpy(&debt, owed + c, sizeof debt);
            const doubles wanted = e * (1.0 + debt);
            const doubles rounded = d_round(factor + t * stride + c, wanted);
            debt = d_keep((doubles_mask)(e != 0.0), (wanted - rounded) / e);
            memcpy(owed + c, &debt, sizeof debt);
        }
    }
}

#endif
