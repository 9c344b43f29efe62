/* One pass over a panel of a state: what is pending is written, what comes next is read.
 *
 * A state [rows][columns] is cut into panels of one or two vectors of columns, which no rule ties
 * to each other. A panel stays in the L1 cache, so that a pass runs at the speed of arithmetic:
 *
 *     s = decay * s + sum_j write_j[row] * weight_j       sum_i += read_i[row] * s
 *
 * for TOKENS tokens at once, whose own interplay is a small triangle of numbers (`walk.h`). That
 * is (reads + writes + 1 / TOKENS) operations per number and token, where token after token takes
 * one more.
 */
#ifndef LINEAR_SWEEP_H
#define LINEAR_SWEEP_H

#include "memory.h"
#include "vector.h"

#define INLINE static inline __attribute__((always_inline))

#define TOKENS (REGARD_REGISTERS >= 32 ? 4 : 2) /* per pass: what the registers hold */
#define VECTORS 2                               /* per panel, or 1 */
#define COLUMNS (VECTORS * REGARD_WIDTH)

/* What a decay multiplies: nothing, all numbers alike, every column or every row on its own. */
enum { NO_DECAY, ONE_DECAY, COLUMN_DECAY, ROW_DECAY };

/* TOKENS rows of numbers, one number per row of the state: token i at `at + i * step`. */
typedef struct {
    const float *at;
    int64_t step;
} Rows;

typedef struct {
    int64_t rows;
    const vector *from; /* [rows][vectors] */
    vector *to;         /* may be `from` */
    const vector *beside;
    Rows read[2], write[2];
    const float *row_decay;
    vector decay[VECTORS];
    vector weight[2][TOKENS][VECTORS];
    vector sum[2][TOKENS][VECTORS]; /* in and out */
    vector product[VECTORS];        /* in and out: sum over rows of s * beside */
} Sweep;

#define EACH(i, count) REGARD_UNROLL for (int i = 0; i < (count); i++)

typedef void (*Pass)(Sweep *s);

/* The pass for (reads, writes) of (0, 1), (0, 2), (1, 1), (2, 1), (1, 2); the product only for
 * one read. */
#define pass_of REGARD_JOIN(linear_pass_of, REGARD_ISA)
Pass pass_of(int kind, int reads, int writes, int dot, int vectors);

#endif
