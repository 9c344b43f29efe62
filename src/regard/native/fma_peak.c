/* How fast this processor multiplies and adds: the yardstick of every benchmark.
 *
 * REGARD_LANES independent numbers go through x <- x * multiply + add, `rounds` times, in as many
 * accumulators as hide the latency of the instruction. Each starts from a value read from memory:
 * equal accumulators would be merged by the compiler and report a speed that no machine has.
 */
#include "vector.h"

#define REGARD_LANES 384 /* a multiple of accumulators * width on every instruction set */
#define ACCUMULATORS (REGARD_REGISTERS >= 32 ? 24 : 12)

/* Updates lanes[REGARD_LANES] in place and returns the floating-point operations it took. */
REGARD_EXPORT(double, fma_peak)
(float *lanes, int64_t rounds, float multiply, float add) {
    const vector factor = v_broadcast(multiply), term = v_broadcast(add);
    for (int block = 0; block < REGARD_LANES; block += ACCUMULATORS * REGARD_WIDTH) {
        vector x[ACCUMULATORS];
        REGARD_UNROLL
        for (int i = 0; i < ACCUMULATORS; i++) x[i] = v_load(lanes + block + i * REGARD_WIDTH);
        for (int64_t round = 0; round < rounds; round++) {
            REGARD_UNROLL
            for (int i = 0; i < ACCUMULATORS; i++) x[i] = x[i] * factor + term;
        }
        REGARD_UNROLL
        for (int i = 0; i < ACCUMULATORS; i++) v_store(lanes + block + i * REGARD_WIDTH, x[i]);
    }
    return 2.0 * REGARD_LANES * (double)rounds;
}
