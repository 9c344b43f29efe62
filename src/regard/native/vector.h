/* Vectors of floats in one source for every instruction set.
 *
 * A C body includes this file and is compiled once per instruction set, with
 *   REGARD_ISA        the name of the set, the suffix of every exported function
 *   REGARD_ISA_<SET>  1
 *   REGARD_WIDTH      floats per vector
 *   REGARD_REGISTERS  vector registers
 *   REGARD_VECTORS    vectors (of queries) and
 *   REGARD_ROWS       broadcast rows (of keys) of a microkernel's block of accumulators
 * (table.py holds the numbers). The types are GCC's and clang's vector extensions; + - * on
 * them, and scalar * vector, compile to single instructions and contract to fused ones.
 *
 *   - C has no ?: on vectors: use v_select.
 *   - `0 + x` is no free broadcast (it keeps the sign of -0): use v_broadcast or scalar * vector.
 *   - User tensors are only 4-byte aligned: v_load, v_store. Work space from aligned_alloc may be
 *     read as `vector` directly. Never read past the end of user memory.
 */
#ifndef REGARD_VECTOR_H
#define REGARD_VECTOR_H

#include <stdint.h>

#define REGARD_BYTES (4 * REGARD_WIDTH)

typedef float vector __attribute__((vector_size(REGARD_BYTES)));
typedef int32_t vector_mask __attribute__((vector_size(REGARD_BYTES))); /* lanes of 0 or -1 */
typedef float unaligned_vector __attribute__((vector_size(REGARD_BYTES), aligned(4), may_alias));

/* REGARD_EXPORT(double, name)(arguments) { ... } defines the exported regard_name_<set>. */
#define REGARD_JOIN_(name, isa) regard_##name##_##isa
#define REGARD_JOIN(name, isa) REGARD_JOIN_(name, isa)
#define REGARD_EXPORT(type, name) \
    __attribute__((visibility("default"))) type REGARD_JOIN(name, REGARD_ISA)

/* A function of a header, which not every body that includes it calls. */
#define REGARD_SHARED static __attribute__((unused))

/* Before a loop over a block of registers, which must vanish for the block to live in them. */
#if defined(__clang__)
#define REGARD_UNROLL _Pragma("clang loop unroll(full)")
#else
#define REGARD_UNROLL _Pragma("GCC unroll 32")
#endif

static inline vector v_load(const float *from) { return *(const unaligned_vector *)from; }

static inline void v_store(float *to, vector x) { *(unaligned_vector *)to = x; }

static inline vector v_broadcast(float x) { return x - (vector){0}; }

/* mask ? a : b, lane by lane; a mask is what a comparison of vectors gives. */
static inline vector v_select(vector_mask mask, vector a, vector b) {
    return (vector)((mask & (vector_mask)a) | (~mask & (vector_mask)b));
}

/* mask ? a : 0, exactly, whatever a is. */
static inline vector v_keep(vector_mask mask, vector a) { return (vector)(mask & (vector_mask)a); }

/* The larger of both, lane by lane; b where either is NaN. */
#if defined(REGARD_ISA_AVX512)
#include <immintrin.h>
static inline vector v_max(vector a, vector b) {
    return (vector)_mm512_max_ps((__m512)a, (__m512)b);
}
#elif defined(REGARD_ISA_AVX2)
#include <immintrin.h>
static inline vector v_max(vector a, vector b) {
    return (vector)_mm256_max_ps((__m256)a, (__m256)b);
}
#elif defined(__SSE__)
#include <xmmintrin.h>
static inline vector v_max(vector a, vector b) { return (vector)_mm_max_ps((__m128)a, (__m128)b); }
#else
static inline vector v_max(vector a, vector b) { return v_select(a > b, a, b); }
#endif

/* Whether any lane of a mask is set. */
static inline int v_any(vector_mask mask) {
#if defined(REGARD_ISA_AVX512)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(REGARD_ISA_AVX2)
    return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE__)
    return _mm_movemask_ps((__m128)mask) != 0;
#else
    int32_t any = 0;
    for (int i = 0; i < REGARD_WIDTH; i++) any |= mask[i];
    return any != 0;
#endif
}

#endif
