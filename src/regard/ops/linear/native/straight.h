/* What a run without exceptions needs of a chunk, made once for all panels of a head.
 *
 * The state is kept as S = g X with one number g, the product of the decays that X has not been
 * multiplied by: a pass then spends nothing on the decay. Where g leaves [1 / MOST_LEFT,
 * MOST_LEFT] the next pass multiplies X by it.
 *
 * With e the values of a chunk's tokens (under the delta rule what is corrected, v - S^T k), in
 * the order of the run,
 *
 *     e_i     = value_i + missed_i (X^T k)_i + sum_{j < i} of[1]_ij e_j
 *     seen_i  = seen_i (X^T q)_i + sum_{j <= i} of[0]_ij e_j
 *     X      += sum_j row_j (leave_j e_j)^T
 *
 * where every factor is a number: decays, beta, divisors and g are in them. Of the same rule seen
 * from behind (CARRIES),
 *
 *     seen_i  = seen_i (X^T k)_i + sum_{j <= i} of[0]_ij e_j + sum_{j < i} of[1]_ij seen_j
 *     X      += sum_j row_j (leave_j e_j)^T - second row_j (leave_j beta_j seen_j)^T
 */
#ifndef LINEAR_STRAIGHT_H
#define LINEAR_STRAIGHT_H

#include "chunk.h"

#define MOST_LEFT 16.0f

typedef struct {
    float of[2][TOKENS][TOKENS];
    float seen[TOKENS], missed[TOKENS], leave[TOKENS];
    float before, after; /* g when the chunk is entered and when it is left */
    int32_t folds;       /* X is multiplied by `before` on the way in */
} Settled;

/* Numbers per token, each or none. */
typedef struct {
    const float *factor, *beta, *scale; /* decay; of a value; of what is seen */
} Numbers;

static inline int is_near_one(float g) { return g >= 1 / MOST_LEFT && g <= MOST_LEFT; }

INLINE void settled_(
    const int mirror, const int kinds, const int carries, Chunk chunk, const Scores *scores,
    Numbers by, float *left, Settled *to
) {
    float within[TOKENS], beta[TOKENS];
    const float g = !mirror && chunk.forgets ? 1 : *left;
    to->before = g, to->folds = !is_near_one(g);
    float passed = to->folds ? 1 : g;
    EACH(p, TOKENS) {
        const int i = mirror ? TOKENS - 1 - p : p, between = mirror ? i + 1 : i;
        const int64_t t = chunk.start + i;
        const int there = i < chunk.count;
        const float scale = !there ? 0 : by.scale ? by.scale[t] : 1;
        float d = 1;
        if (by.factor && (!mirror || p > 0) && between < chunk.count &&
            !(between == 0 && chunk.forgets))
            d = by.factor[chunk.start + between];
        beta[p] = !there ? 0 : by.beta ? by.beta[t] : 1;
        EACH(j, p) within[j] *= d;
        within[p] = 1;
        passed *= d;
        to->seen[p] = passed * scale, to->missed[p] = carries ? beta[p] : -passed;
        EACH(j, TOKENS) {
            const int other = mirror ? TOKENS - 1 - j : j;
            const float pair = j > p ? 0 : within[j] * beta[j], plain = carries ? within[j] : pair;
            to->of[0][p][j] = j > p ? 0 : scale * plain * scores->of[0][mirror ? other : i]
                                                                       [mirror ? i : other];
            if (kinds > 1) to->of[1][p][j] = j < p ? -pair * scores->of[1][mirror ? other : i]
                                                                          [mirror ? i : other] : 0;
        }
    }
    const int ends = mirror && by.factor && !chunk.forgets;
    const float last = ends ? by.factor[chunk.start] : 1;
    to->after = mirror && chunk.forgets ? 1 : passed * last;
    const float enter = is_near_one(to->after) ? 1 / to->after : 1;
    EACH(j, TOKENS) to->leave[j] = within[j] * (carries ? 1 : beta[j]) * last * enter;
    *left = to->after;
}

#endif
