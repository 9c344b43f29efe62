/* Every primitive of vector.h in one small function, so that a test can hold each instruction set
 * to the same numbers. */
#include "vector.h"

/* out[i] = max(x[i], y[i]) where x[i] > threshold, else threshold; the three need no alignment. */
REGARD_EXPORT(void, vector_check)
(const float *x, const float *y, float *out, int64_t count, float threshold) {
    const vector least = v_broadcast(threshold);
    int64_t i = 0;
    for (; i + REGARD_WIDTH <= count; i += REGARD_WIDTH) {
        const vector a = v_load(x + i);
        v_store(out + i, v_select(a > least, v_max(a, v_load(y + i)), least));
    }
    if (i < count) { /* the ragged end goes through a full vector of our own */
        float a[REGARD_WIDTH] = {0}, b[REGARD_WIDTH] = {0};
        for (int64_t j = i; j < count; j++) a[j - i] = x[j], b[j - i] = y[j];
        v_store(a, v_select(v_load(a) > least, v_max(v_load(a), v_load(b)), least));
        for (int64_t j = i; j < count; j++) out[j] = a[j - i];
    }
}
