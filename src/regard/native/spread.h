/* Contractions over the rows of a tile, for gradients of keys and values.
 *
 *     G[key, c] += sum_part sum_row A[part][key][row] B[part][row][c]     over the first rows
 *
 * Here the channels lie in the vectors and the factors A are broadcast: R keys x SPREAD_COLUMNS
 * vectors of channels are in registers.
 */
#ifndef REGARD_SPREAD_H
#define REGARD_SPREAD_H

#include "panel.h"

#define SPREAD_COLUMNS (REGARD_REGISTERS >= 32 && REGARD_ROWS == 8 ? 3 : 2)

/* `step` is that of A from part to part; B is [parts * LANES][width] and G [keys][width], with a
 * width that is a multiple of REGARD_WIDTH. */
REGARD_INLINE void spread_some(
    int64_t rows, const float *a, int64_t parts, int64_t step, const float *b, float *g,
    int64_t width, int64_t count, const int columns
) {
    for (int64_t key = 0; key < count; key += REGARD_ROWS) {
        vector acc[REGARD_ROWS][SPREAD_COLUMNS];
        FOR_ROWS(r) REGARD_UNROLL for (int v = 0; v < columns; v++) acc[r][v] = (vector){0};
        FOR_ROWS(r) REGARD_UNROLL for (int v = 0; v < columns; v++)
            __builtin_prefetch(g + (key + r) * width + v * REGARD_WIDTH, 1);
        for (int64_t part = 0; part < parts; part++) {
            const float *factor = a + part * step + key * LANES, *row = b + part * LANES * width;
            for (int64_t lane = 0; lane < rows; lane++, factor++, row += width) {
                FOR_ROWS(r) REGARD_UNROLL for (int v = 0; v < columns; v++)
                    acc[r][v] += factor[r * LANES] * v_load(row + v * REGARD_WIDTH);
            }
        }
        FOR_ROWS(r) REGARD_UNROLL for (int v = 0; v < columns; v++) {
            float *to = g + (key + r) * width + v * REGARD_WIDTH;
            v_store(to, v_load(to) + acc[r][v]);
        }
    }
}

/* `count` keys, a multiple of R. */
REGARD_SHARED void spread(
    int64_t rows, const lanes *a, int64_t parts, int64_t step, const float *b, float *g,
    int64_t width, int64_t count
) {
    const float *factors = (const float *)a;
    const int64_t vectors = width / REGARD_WIDTH;
    step *= LANES;
    for (int64_t v = 0; v < vectors;) {
        /* Never one vector alone behind others: it would wait for its own sums. */
        const int64_t left = vectors - v;
        int64_t columns = left == SPREAD_COLUMNS + 1 ? 2 : SPREAD_COLUMNS;
        if (columns > left) columns = left;
        const float *from = b + v * REGARD_WIDTH;
        float *to = g + v * REGARD_WIDTH;
        if (columns == 1) spread_some(rows, factors, parts, step, from, to, width, count, 1);
        else if (columns == 2) spread_some(rows, factors, parts, step, from, to, width, count, 2);
        else spread_some(rows, factors, parts, step, from, to, width, count, SPREAD_COLUMNS);
        v += columns;
    }
}

#endif
