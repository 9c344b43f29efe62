/* Products of small matrices that lie in the L1 cache: what has no order of tokens is made of them.
 *
 *     c[row][col] = other + sum_n a[row * a_row + n * a_step] b[n * b_step + col]
 *
 * Columns are in the lanes and elements of `a` are broadcast, so that `a` may be read along either
 * axis and nothing is ever transposed. All are work space: rows come in multiples of BLOCK_ROWS,
 * columns in multiples of a vector, filled up with zeros.
 */
#ifndef LINEAR_PRODUCT_H
#define LINEAR_PRODUCT_H

#include "parts.h"

#define BLOCK_ROWS (REGARD_REGISTERS >= 32 ? 8 : 4)
#define TALL_ROWS (REGARD_REGISTERS >= 32 ? 8 : 6) /* at once, where there are so many */
#define BLOCK_VECTORS 2

typedef struct {
    const float *at;
    int64_t row, step;
} Left;

enum { NOTHING, ONE_ROW, RESULT }; /* `other`: 0, one row for all, or what c holds */

INLINE void block_product(
    const int rows, const int vectors, const int other, Left a, const float *b, int64_t b_step, int64_t depth,
    const float *row, float *c, int64_t c_row
) {
    vector sum[TALL_ROWS][BLOCK_VECTORS];
    EACH(r, rows) EACH(v, vectors) {
        if (other == RESULT) sum[r][v] = v_load(c + r * c_row + v * REGARD_WIDTH);
        else sum[r][v] = (vector){0};
    }
    for (int64_t n = 0; n < depth; n++, b += b_step, a.at += a.step) {
        vector x[BLOCK_VECTORS];
        EACH(v, vectors) x[v] = v_load(b + v * REGARD_WIDTH);
        EACH(r, rows) {
            const float each = a.at[r * a.row];
            EACH(v, vectors) sum[r][v] += each * x[v];
        }
    }
    EACH(r, rows) EACH(v, vectors) {
        /* Added last: a row may be large, and every step would round to its digits. */
        if (other == ONE_ROW) sum[r][v] += v_load(row + v * REGARD_WIDTH);
        v_store(c + r * c_row + v * REGARD_WIDTH, sum[r][v]);
    }
}

INLINE void product_(
    const int other, int64_t rows, int64_t columns, int64_t depth, Left a, const float *b,
    int64_t b_step, const float *row, float *c, int64_t c_row
) {
    const int64_t both = BLOCK_VECTORS * REGARD_WIDTH;
    for (int64_t col = 0; col < columns; col += both) {
        const float *first = row ? row + col : 0;
        int64_t r = 0;
#define BLOCK_(count, vectors)                                                                 \
    block_product(count, vectors, other, (Left){a.at + r * a.row, a.row, a.step}, b + col,     \
                  b_step, depth, first, c + r * c_row + col, c_row),                           \
        r += count
        while (r < rows) {
            const int64_t left = rows - r; /* of 8, two blocks of 4: 6 would leave 2 */
            const int tall = left >= TALL_ROWS && left != 2 * BLOCK_ROWS;
            if (columns - col >= both) {
                if (tall || TALL_ROWS == BLOCK_ROWS) BLOCK_(TALL_ROWS, 2);
                else BLOCK_(BLOCK_ROWS, 2);
            } else if (tall || TALL_ROWS == BLOCK_ROWS) BLOCK_(TALL_ROWS, 1);
            else BLOCK_(BLOCK_ROWS, 1);
        }
#undef BLOCK_
    }
}

/* c = a b, or with `row` the row + a b. */
REGARD_SHARED void product(
    int64_t rows, int64_t columns, int64_t depth, Left a, const float *b, int64_t b_step,
    const float *row, float *c, int64_t c_row
) {
    if (row) product_(ONE_ROW, rows, columns, depth, a, b, b_step, row, c, c_row);
    else product_(NOTHING, rows, columns, depth, a, b, b_step, 0, c, c_row);
}

/* c += a b. */
REGARD_SHARED void product_add(
    int64_t rows, int64_t columns, int64_t depth, Left a, const float *b, int64_t b_step,
    float *c, int64_t c_row
) {
    product_(RESULT, rows, columns, depth, a, b, b_step, 0, c, c_row);
}

#endif
