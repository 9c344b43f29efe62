/* What this library holds and what the processor at hand can run. Compiled for any processor. */
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* The instruction sets whose bodies are in this library, best first, separated by commas. */
EXPORT const char *regard_built(void) { return REGARD_BUILT; }

/* The fingerprint of the sources it was compiled from. */
EXPORT const char *regard_digest(void) { return REGARD_DIGEST; }

/* Whether processor and operating system run an instruction set: 1 or 0. */
EXPORT int regard_runs(const char *isa) {
#if defined(__x86_64__)
    if (strcmp(isa, "avx512") == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("fma");
    if (strcmp(isa, "avx2") == 0)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(__aarch64__)
    if (strcmp(isa, "neon") == 0) return 1;
#endif
    return strcmp(isa, "baseline") == 0;
}
