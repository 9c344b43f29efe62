/* Weights of a softmax whose keys come block by block, one row of a tile in each lane.
 *
 * A row's weights are 2^(score - shift). The shift is the largest score of the first block in
 * which the row sees a key; where a later block exceeds it by RAISE_ABOVE bits it is raised, and
 * what has been stored is multiplied down. So no later key changes a bit of the weights unless it
 * is 2^40 times heavier, nothing overflows, and one pass is enough. It begins with a shift of
 * minus infinity and a total of 0; hidden keys have a score of minus infinity.
 */
#ifndef REGARD_ONLINE_H
#define REGARD_ONLINE_H

#include <math.h>

#include "exp.h"
#include "panel.h"

#define RAISE_ABOVE 40.0f

/* Raises the shift of the rows whose maximum `top` asks for it, and multiplies their totals down.
 * Returns whether anything else that has been weighted is to be multiplied by `factor`. */
REGARD_SHARED int online_raise(const vector *top, vector *shift, vector *total, vector *factor) {
    vector_mask raised[REGARD_VECTORS], any = {0}, stored = {0};
    FOR_VECTORS(v) {
        raised[v] = (vector_mask)(top[v] > shift[v] + v_broadcast(RAISE_ABOVE));
        any |= raised[v];
        stored |= raised[v] & (vector_mask)(total[v] != (vector){0});
    }
    if (!v_any(any)) return 0;
    FOR_VECTORS(v) {
        const vector smaller = v_exp2(shift[v] - top[v]);
        factor[v] = v_select(raised[v], smaller, v_broadcast(1));
        shift[v] = v_select(raised[v], top[v], shift[v]);
    }
    if (!v_any(stored)) return 0; /* nothing but zeros */
    FOR_VECTORS(v) total[v] *= factor[v];
    return 1;
}

REGARD_INLINE void online_weigh_(
    const int vectors, lanes *weights, int64_t count, const vector *shift, vector *total
) {
    lanes shown, sum;
    FOR_FIRST(v) {
        const vector_mask none = (vector_mask)(shift[v] == v_broadcast(-INFINITY));
        shown[v] = v_keep(~none, shift[v]);
        sum[v] = (vector){0};
    }
    for (int64_t key = 0; key < count; key += REGARD_ROWS) {
        lanes part; /* short sums first: a long one of floats loses digits */
        FOR_FIRST(v) part[v] = (vector){0};
        FOR_ROWS(r) FOR_FIRST(v) {
            const vector weight = v_exp2(weights[key + r][v] - shown[v]);
            weights[key + r][v] = weight;
            part[v] += weight;
        }
        FOR_FIRST(v) sum[v] += part[v];
    }
    FOR_FIRST(v) total[v] += sum[v];
}

/* Scores of `count` keys to weights, in place; adds them to the totals. */
REGARD_SHARED void online_weigh(
    int vectors, lanes *weights, int64_t count, const vector *shift, vector *total
) {
    WITH_VECTORS(vectors, online_weigh_, weights, count, shift, total);
}

#endif
