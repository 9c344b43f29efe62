/* Vectors at the ragged end of a row. */
#ifndef LINEAR_PARTS_H
#define LINEAR_PARTS_H

#include <string.h>

#include "sweep.h"

/* Kept out of the loops that seldom come here. */
static __attribute__((noinline, unused)) vector ragged_load(const float *from, int64_t count) {
    vector x = {0};
    if (count > 0) memcpy(&x, from, (size_t)count * sizeof(float));
    return x;
}

static __attribute__((noinline, unused)) void ragged_store(float *to, vector x, int64_t count) {
    if (count > 0) memcpy(to, &x, (size_t)count * sizeof(float));
}

/* The first `count` floats, zeros behind them; never reads further. */
static inline vector part_load(const float *from, int64_t count) {
    return count >= REGARD_WIDTH ? v_load(from) : ragged_load(from, count);
}

static inline void part_store(float *to, vector x, int64_t count) {
    if (count >= REGARD_WIDTH) v_store(to, x);
    else ragged_store(to, x, count);
}

#define LINE 16 /* floats in a line of the cache */

/* Asks for rows that are read soon. */
static inline void fetch_ahead(const float *from, int64_t step, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < width; c += LINE) __builtin_prefetch(from + r * step + c);
}

#endif
