/* Rows divided by their norms. Rows whose squares would overflow or vanish are brought to another
 * size first.
 */
#ifndef LINEAR_UNIT_H
#define LINEAR_UNIT_H

#include <math.h>

#include "parts.h"
#include "reduce.h"

/* A row times `scale` has the norm `norm`, neither of which overflows. */
typedef struct {
    float scale, norm;
} Norm;

REGARD_SHARED Norm norm_of(const float *x, int64_t width) {
    vector squares = {0}, largest = {0};
    for (int64_t c = 0; c < width; c += REGARD_WIDTH) {
        const vector part = part_load(x + c, width - c);
        squares += part * part;
    }
    const float sum = v_sum(squares);
    if (width > 1 && sum > 1e-30f && sum < 1e30f) return (Norm){1, sqrtf(sum)}; /* all is there */
    for (int64_t c = 0; c < width; c += REGARD_WIDTH) {
        const vector part = part_load(x + c, width - c);
        largest = v_max(largest, v_max(part, -part));
    }
    const float top = v_top(largest);
    if (sum == 0 && top == 0) return (Norm){1, 1}; /* zeros are left as they are */
    if (width == 1) return (Norm){1, top};
    const float scale = top < 1e-37f ? 1e38f : 1 / top; /* the inverse of less overflows */
    squares = (vector){0};
    for (int64_t c = 0; c < width; c += REGARD_WIDTH) {
        const vector part = part_load(x + c, width - c) * scale;
        squares += part * part;
    }
    return (Norm){scale, sqrtf(v_sum(squares))};
}

#endif
