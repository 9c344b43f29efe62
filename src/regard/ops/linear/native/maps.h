/* Feature maps that are functions of one number, and their slopes. */
#ifndef LINEAR_MAPS_H
#define LINEAR_MAPS_H

#include "parts.h"

enum { MAP_IDENTITY, MAP_RELU, MAP_ELU, MAP_LEAKY, MAP_EXP };

#define LEAKY_SLOPE 0.01f
#define EXP_RATE 0.2f
#define EXP_HIGHEST 40.0f /* of an exponent: constant beyond */

/* e^x to a relative error of 1e-7 for -103 < x <= 80, and 0 below. NaN stays NaN. */
static inline vector wide_exp(vector x) {
    const vector_mask enough = ~(vector_mask)(x < v_broadcast(-103.0f));
    x = v_keep(enough, x);
    const vector magic = v_broadcast(12582912.0f); /* 1.5 * 2^23 rounds to an integer */
    const vector shifted = x * 1.44269504f + magic;
    const vector n = shifted - magic;
    const vector f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vector y = 1.9875691500e-4f * f + 1.3981999507e-3f;
    y = y * f + 8.3334519073e-3f;
    y = y * f + 4.1665795894e-2f;
    y = y * f + 1.6666665459e-1f;
    y = y * f + 5.0000001201e-1f;
    y = y * (f * f) + f + 1.0f;
    /* 2^n in two factors: their product may be less than the smallest normal number. */
    const vector_mask power = (vector_mask)shifted - (vector_mask)magic, half = power >> 1;
    y *= (vector)((half + 127) << 23);
    return v_keep(enough, y * (vector)((power - half + 127) << 23));
}

INLINE vector map_(const int map, vector x) {
    const vector zero = {0};
    switch (map) {
        case MAP_RELU: return v_max(zero, x); /* this way round, NaN passes */
        case MAP_LEAKY: return v_select(x > zero, x, LEAKY_SLOPE * x);
        case MAP_ELU: {
            const vector below = v_select(x > zero, zero, x);
            return v_select(x > zero, x + 1.0f, wide_exp(below));
        }
        case MAP_EXP: {
            const vector most = v_broadcast(EXP_HIGHEST), scaled = EXP_RATE * x;
            return wide_exp(v_select(scaled > most, most, scaled));
        }
        default: return x;
    }
}

/* phi'(x), of the x whose phi(x) is y, times a gradient. */
INLINE vector slope_(const int map, vector x, vector y, vector gradient) {
    const vector zero = {0};
    switch (map) {
        case MAP_RELU: return v_select(x <= zero, zero, gradient);
        case MAP_LEAKY: return v_select(x > zero, gradient, LEAKY_SLOPE * gradient);
        case MAP_ELU: return v_select(y < 1.0f, y, zero + 1.0f) * gradient;
        case MAP_EXP:
            return v_select(EXP_RATE * x > EXP_HIGHEST, zero, EXP_RATE * y * gradient);
        default: return gradient;
    }
}

#endif
