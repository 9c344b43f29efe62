/* Sums and maxima over the lanes of vectors.
 *
 * Lanes are brought together by shuffles that stay within 128 bits as long as possible; the order
 * of the additions is fixed.
 */
#ifndef REGARD_REDUCE_H
#define REGARD_REDUCE_H

#include "vector.h"

/* Lanes of two vectors, counted through both. GCC before 12 knows only the older builtin. */
#if defined(__clang__) || __GNUC__ >= 12
#define REGARD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define REGARD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vector_mask){__VA_ARGS__})
#endif

/* The sum of each of W vectors of W lanes: lane i is the sum of x[i]. */
#if REGARD_WIDTH == 16
static inline vector v_evens_(vector a, vector b) { /* within 128 bits */
    return REGARD_SHUFFLE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           REGARD_SHUFFLE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}
static inline vector v_quarters_(vector a, vector b) {
    return REGARD_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           REGARD_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
static inline vector v_sums(const vector x[16]) {
    vector four[4];
    REGARD_UNROLL
    for (int i = 0; i < 4; i++)
        four[i] = v_evens_(v_evens_(x[4 * i], x[4 * i + 1]), v_evens_(x[4 * i + 2], x[4 * i + 3]));
    return v_quarters_(v_quarters_(four[0], four[1]), v_quarters_(four[2], four[3]));
}
#define REGARD_ROTATE_(x, n)                                                                      \
    REGARD_SHUFFLE(x, x, n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7, n + 8, n + 9, n + 10, \
                   n + 11, n + 12, n + 13, n + 14, n + 15)
#elif REGARD_WIDTH == 8
static inline vector v_evens_(vector a, vector b) {
    return REGARD_SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           REGARD_SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
static inline vector v_sums(const vector x[8]) {
    const vector low = v_evens_(v_evens_(x[0], x[1]), v_evens_(x[2], x[3]));
    const vector high = v_evens_(v_evens_(x[4], x[5]), v_evens_(x[6], x[7]));
    return REGARD_SHUFFLE(low, high, 0, 1, 2, 3, 8, 9, 10, 11) +
           REGARD_SHUFFLE(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
}
#define REGARD_ROTATE_(x, n) \
    REGARD_SHUFFLE(x, x, n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7)
#else
static inline vector v_evens_(vector a, vector b) {
    return REGARD_SHUFFLE(a, b, 0, 2, 4, 6) + REGARD_SHUFFLE(a, b, 1, 3, 5, 7);
}
static inline vector v_sums(const vector x[4]) {
    return v_evens_(v_evens_(x[0], x[1]), v_evens_(x[2], x[3]));
}
#define REGARD_ROTATE_(x, n) REGARD_SHUFFLE(x, x, n, n + 1, n + 2, n + 3)
#endif

/* The sum of all lanes. */
static inline float v_sum(vector x) {
#if REGARD_WIDTH >= 16
    x += REGARD_ROTATE_(x, 8);
#endif
#if REGARD_WIDTH >= 8
    x += REGARD_ROTATE_(x, 4);
#endif
    x += REGARD_ROTATE_(x, 2);
    x += REGARD_ROTATE_(x, 1);
    return x[0];
}

/* The largest lane. */
static inline float v_top(vector x) {
#if REGARD_WIDTH >= 16
    x = v_max(x, REGARD_ROTATE_(x, 8));
#endif
#if REGARD_WIDTH >= 8
    x = v_max(x, REGARD_ROTATE_(x, 4));
#endif
    x = v_max(x, REGARD_ROTATE_(x, 2));
    x = v_max(x, REGARD_ROTATE_(x, 1));
    return x[0];
}

#endif
