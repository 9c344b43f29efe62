/* 2^x on vectors: a polynomial of degree 6 on [-1/2, 1/2] and an exponent put together from bits.
 *
 * The largest relative error is 1e-7, less than a float's last digit. 2^0 is exactly 1. Below
 * REGARD_LEAST_EXPONENT the result is exactly 0: products with it would be denormal, and what is
 * hidden has minus infinity for a score. NaN stays NaN. x must not exceed 126.
 */
#ifndef REGARD_EXP_H
#define REGARD_EXP_H

#include "vector.h"

#define REGARD_LEAST_EXPONENT (-100.0f)
#define REGARD_LOG2E 1.4426950408889634

static inline vector v_exp2(vector x) {
    const vector least = v_broadcast(REGARD_LEAST_EXPONENT);
    const vector_mask large_enough = ~(vector_mask)(x < least);
    x = v_max(least, x); /* this way round, NaN passes */
    /* Adding 1.5 * 2^23 rounds to an integer, which then stands in the last bits; 127 on top
     * makes it the biased exponent. */
    const vector magic = v_broadcast(12582912.0f + 127.0f);
    const vector shifted = x + magic;
    const vector f = x - (shifted - magic);
    vector y = 1.5353362e-4f * f + 1.3398875e-3f;
    y = y * f + 9.618437e-3f;
    y = y * f + 5.5503324e-2f;
    y = y * f + 2.4022648e-1f;
    y = y * f + 6.931472e-1f;
    y = y * f + 1.0f;
    return v_keep(large_enough, y * (vector)((vector_mask)shifted << 23));
}

#endif
