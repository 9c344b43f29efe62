/* Rows divided by their norms, and the way back: x -> y = x / |x|, dx = (dy - y (y . dy)) / |x|. */
#include "unit.h"

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
