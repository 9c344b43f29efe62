/* The largest numbers of every row, in falling order, with their places.
 *
 * A row is read twice: once for the largest number that every lane meets, which already bounds
 * the answer from below, and once for the few numbers that reach that bound. Equal numbers come in
 * the order of their places, NaN before all others.
 */
#ifndef REGARD_LARGEST_H
#define REGARD_LARGEST_H

#include "reduce.h"

/* Whether a number goes before another: NaN counts as the largest. */
static inline int precedes(float x, float other) { return !(x <= other) && other == other; }

typedef struct {
    float *values;
    int32_t *places;
    int64_t count, wanted;
} Best;

static inline void offer(Best *best, float x, int32_t place) {
    int64_t at = best->count;
    if (at == best->wanted) {
        if (!precedes(x, best->values[at - 1])) return;
        at--;
    } else {
        best->count++;
    }
    for (; at > 0 && precedes(x, best->values[at - 1]); at--) {
        best->values[at] = best->values[at - 1];
        best->places[at] = best->places[at - 1];
    }
    best->values[at] = x;
    best->places[at] = place;
}

/* A number that `wanted` numbers of the row reach, as high as is easily found; -inf if unknown. */
static inline float bound(const float *row, int64_t width, int64_t wanted) {
    const vector least = v_broadcast(-__builtin_inff());
    if (wanted > REGARD_WIDTH || width < REGARD_WIDTH) return least[0];
    vector lanes = least; /* the largest that each lane meets; NaN is passed over */
    for (int64_t j = 0; j + REGARD_WIDTH <= width; j += REGARD_WIDTH)
        lanes = v_max(v_load(row + j), lanes);
    float top = v_top(lanes);
    for (int64_t found = 1; found < wanted; found++) { /* equal lanes go together: lower, still true */
        lanes = v_select(lanes == v_broadcast(top), least, lanes);
        top = v_top(lanes);
    }
    return top;
}

/* Of a row of `width` numbers, with wanted <= width < 2^31. */
REGARD_SHARED void largest_of_row(
    const float *x, int64_t width, int64_t wanted, float *values, int32_t *places
) {
    Best best = {values, places, 0, wanted};
    float floor = bound(x, width, wanted);
    int64_t j = 0;
    for (; j + REGARD_WIDTH <= width; j += REGARD_WIDTH) {
        const vector now = v_load(x + j), edge = v_broadcast(floor);
        if (!v_any(~(now < edge))) continue;
        for (int i = 0; i < REGARD_WIDTH; i++)
            if (!(now[i] < floor)) offer(&best, now[i], (int32_t)(j + i));
        if (best.count == wanted) floor = best.values[wanted - 1];
    }
    for (; j < width; j++) offer(&best, x[j], (int32_t)j);
}

#endif
