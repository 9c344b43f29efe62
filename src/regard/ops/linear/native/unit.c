/* Rows divided by their norms, and the way back: x -> y = x / |x|, dx = (dy - y (y . dy)) / |x|.
 *
 * Rows whose squares would overflow or vanish are brought to another size first.
 */
#include <math.h>

#include "parts.h"
#include "reduce.h"

/* A row times `scale` has the norm `norm`, neither of which overflows. */
typedef struct {
    float scale, norm;
} Norm;

static Norm norm_of(const float *x, int64_t width) {
    vector largest = {0}, squares = {0};
    for (int64_t c = 0; c < width; c += REGARD_WIDTH) {
        const vector part = part_load(x + c, width - c);
        largest = v_max(largest, v_max(part, -part));
        squares += part * part;
    }
    const float top = v_top(largest), sum = v_sum(squares);
    if (sum == 0 && top == 0) return (Norm){1, 1}; /* zeros are left as they are */
    if (width == 1) return (Norm){1, top};
    if (sum > 1e-30f && sum < 1e30f) return (Norm){1, sqrtf(sum)}; /* nothing was lost */
    const float scale = top < 1e-37f ? 1e38f : 1 / top; /* the inverse of less overflows */
    squares = (vector){0};
    for (int64_t c = 0; c < width; c += REGARD_WIDTH) {
        const vector part = part_load(x + c, width - c) * scale;
        squares += part * part;
    }
    return (Norm){scale, sqrtf(v_sum(squares))};
}

/* y = unit rows of x, both [rows][width]. */
REGARD_EXPORT(void, linear_unit)
(const float *x, int64_t rows, int64_t width, float *y) {
    for (int64_t row = 0; row < rows; row++, x += width, y += width) {
        const Norm n = norm_of(x, width);
        for (int64_t c = 0; c < width; c += REGARD_WIDTH)
            part_store(y + c, part_load(x + c, width - c) * n.scale / n.norm, width - c);
    }
}

/* dx from dy and x, all [rows][width]; exactly 0 where dy is. */
REGARD_EXPORT(void, linear_unit_gradient)
(const float *x, const float *dy, int64_t rows, int64_t width, float *dx) {
    for (int64_t row = 0; row < rows; row++, x += width, dy += width, dx += width) {
        const Norm n = norm_of(x, width);
        vector along = {0};
        for (int64_t c = 0; c < width; c += REGARD_WIDTH) {
            const vector d = part_load(dy + c, width - c);
            along += d * (part_load(x + c, width - c) * n.scale / n.norm);
        }
        const float share = v_sum(along);
        for (int64_t c = 0; c < width; c += REGARD_WIDTH) {
            const vector y = part_load(x + c, width - c) * n.scale / n.norm;
            const vector d = part_load(dy + c, width - c) - share * y;
            part_store(dx + c, d / n.norm * n.scale, width - c);
        }
    }
}
