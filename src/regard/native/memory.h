/* Work space of one call: a single aligned block, cut into pieces by whoever asked for it.
 *
 * Sizes are known before anything runs, so that there is one allocation that may fail, before a
 * thread is started, and it fails with an error code.
 */
#ifndef REGARD_MEMORY_H
#define REGARD_MEMORY_H

#include <stdint.h>
#include <stdlib.h>
#if defined(_WIN32)
#include <malloc.h>
#endif

#define REGARD_ALIGNMENT 64
#define REGARD_NO_MEMORY (-1) /* what an exported function returns where it got none */

static inline int64_t up_to(int64_t count, int64_t step) {
    return (count + step - 1) / step * step;
}

/* Bytes rounded so that the next piece is aligned too. */
static inline int64_t aligned_bytes(int64_t bytes) { return up_to(bytes, REGARD_ALIGNMENT); }

/* NULL where there is no such memory; of zero bytes, too, a block that `free_block` takes. */
static inline void *aligned_block(int64_t bytes) {
    const size_t size = (size_t)aligned_bytes(bytes > 0 ? bytes : 1);
#if defined(_WIN32)
    return _aligned_malloc(size, REGARD_ALIGNMENT);
#else
    return aligned_alloc(REGARD_ALIGNMENT, size);
#endif
}

static inline void free_block(void *block) {
#if defined(_WIN32)
    _aligned_free(block);
#else
    free(block);
#endif
}

/* Cuts `bytes` off the front of a block. With a block that starts at NULL, `*at` ends up as the
 * size of all pieces: the same function measures and cuts. */
static inline void *take_bytes(char **at, int64_t bytes) {
    char *piece = *at;
    *at = (char *)((intptr_t)piece + (intptr_t)aligned_bytes(bytes));
    return piece;
}

#endif
