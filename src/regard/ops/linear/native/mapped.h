/* Rows of queries and keys as a walk reads them, made of the caller's a block of tokens at a time:
 * features that nobody else needs never leave the cache. They are what the operators of maps give,
 * bit for bit: whether a gradient is asked for changes no output.
 */
#ifndef LINEAR_MAPPED_H
#define LINEAR_MAPPED_H

#include "activate.h"
#include "call.h"
#include "maps.h"
#include "unit.h"

#define PROJECTED 32 /* rows of a product at once */

/* Floats of work space that a map needs. */
REGARD_SHARED int64_t map_floats(const Map *map) {
    return map->kind == LEARNED && map->weight
               ? projection_floats(PROJECTED, map->inner, map->columns) : 0;
}

INLINE void map_rows_(
    const int kind, const float *x, int64_t step, int64_t count, int64_t width, float scale,
    int64_t stride, float *to
) {
    for (int64_t t = 0; t < count; t++) for (int64_t c = 0; c < width; c += REGARD_WIDTH) {
        const int64_t left = width - c;
        vector y = part_load(x + t * step + c, left);
        if (kind == RELU_MAP) y = map_(MAP_RELU, y);
        part_store(to + t * stride + c, y * scale, left);
    }
}

/* to [count][stride] = the rows of head `h` at x, mapped. */
REGARD_SHARED void map_rows(
    const Map *map, const float *x, int64_t step, int64_t h, int64_t count, int64_t stride,
    float *work, float *to
) {
    const int64_t D = map->inner;
    const float scale = (float)map->scale;
    switch (map->kind) {
        case LEARNED: {
            const int64_t C = map->columns;
            const Activation kind = {map->name, C, map->full, map->shifted};
            Projection by = {map->weight, map->bias, D, C, C, map->skip};
            if (map->weights > 1) by.weight += h * D * C;
            if (by.bias && map->biases > 1) by.bias += h * C;
            for (int64_t t = 0; t < count; t += PROJECTED) {
                const int64_t rows = count - t < PROJECTED ? count - t : PROJECTED;
                project_rows(&by, x + t * step, step, rows, work);
                activate_rows(&kind, work, rows, C, to + t * stride);
            }
            for (int64_t i = 0; scale != 1 && i < count * stride; i++) to[i] *= scale;
            break;
        }
        case UNIT:
            for (int64_t t = 0; t < count; t++) {
                const Norm n = norm_of(x + t * step, D);
                for (int64_t c = 0; c < D; c += REGARD_WIDTH)
                    part_store(to + t * stride + c,
                               part_load(x + t * step + c, D - c) * n.scale / n.norm * scale,
                               D - c);
            }
            break;
        case RELU_MAP: map_rows_(RELU_MAP, x, step, count, D, scale, stride, to); break;
        default: map_rows_(TIMES, x, step, count, D, scale, stride, to);
    }
}

#endif
