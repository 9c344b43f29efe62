/* `settle.h` for every rule, direction and kind of decay. */
#include "settle.h"

/* Turns the sums of a pass into results, and values into weights of the next pass. */
INLINE void settle_(
    const int mirror, const int second_read, const int second_write, const int rule,
    const int decay, const int vectors, const Run *run, const Chunk *chunk, const Scores *scores,
    Sweep *s
) {
    vector value[2][TOKENS][VECTORS], passed[VECTORS];
    EACH(v, vectors) passed[v] = (vector){0} + 1.0f;
    EACH(p, TOKENS) {
        const int i = mirror ? TOKENS - 1 - p : p;
        const int64_t t = chunk->start + i;
        const int there = i < chunk->count;
        /* What lies between the token before, in the order of the run, and this one. */
        const int between = mirror ? i + 1 : i;
        if (decay && (!mirror || p > 0)) {
            vector d[VECTORS];
            if (decay == ONE_DECAY) {
                const vector one =
                    v_broadcast(between < chunk->count ? run->factor[chunk->start + between] : 1);
                EACH(v, vectors) d[v] = one;
            } else {
                EACH(v, vectors) d[v] = (vector){0} + 1.0f;
                if (between < chunk->count)
                    lane_load(run, run->factors, chunk->start + between, vectors, d);
            }
            EACH(v, vectors) {
                passed[v] *= d[v];
                EACH(j, p) {
                    const int other = mirror ? TOKENS - 1 - j : j;
                    value[0][other][v] *= d[v];
                    if (second_write) value[1][other][v] *= d[v];
                }
            }
        }
        vector given[VECTORS], missed[VECTORS], seen[VECTORS];
        EACH(v, vectors) given[v] = (vector){0};
        if (there) lane_load(run, run->value[0], t, vectors, given);
        if (second_read) {
            EACH(v, vectors) {
                missed[v] = s->sum[1][i][v];
                if (decay) missed[v] *= passed[v];
                if (run->keeps) s->sum[1][i][v] = missed[v];
                EACH(j, p) missed[v] += scores->of[1][i][j] * value[0][j][v];
            }
            if (rule == CORRECTS) EACH(v, vectors) missed[v] = given[v] - missed[v];
            if (there) lane_put(run, &run->missed, t, vectors, missed);
        }
        if (rule == CORRECTS) {
            const float beta = there ? run->beta[t] : 0;
            EACH(v, vectors) value[0][i][v] = beta * missed[v];
        } else {
            const float scale = there && run->value_scale[0] ? run->value_scale[0][t] : 1;
            EACH(v, vectors) value[0][i][v] = scale * given[v];
        }
        EACH(v, vectors) {
            seen[v] = s->sum[0][i][v];
            if (decay) seen[v] *= passed[v];
            if (run->keeps) s->sum[0][i][v] = seen[v];
            EACH(j, p + 1) {
                const int other = mirror ? TOKENS - 1 - j : j;
                seen[v] += (mirror ? scores->of[0][other][i] : scores->of[0][i][other]) *
                           value[0][other][v];
            }
            if (second_write) EACH(j, p) {
                const int other = TOKENS - 1 - j;
                seen[v] += scores->of[1][other][i] * value[1][other][v];
            }
        }
        if (there) lane_put(run, &run->seen, t, vectors, seen);
        if (rule == CARRIES) {
            const float beta = there ? run->beta[t] : 0;
            vector carried[VECTORS];
            EACH(v, vectors) carried[v] = beta * seen[v], value[1][i][v] = -carried[v];
            if (there) lane_put(run, &run->missed, t, vectors, carried);
        } else if (second_write) {
            vector second[VECTORS];
            EACH(v, vectors) second[v] = (vector){0};
            if (there) lane_load(run, run->value[1], t, vectors, second);
            const float scale = there && run->value_scale[1] ? run->value_scale[1][t] : 1;
            EACH(v, vectors) value[1][i][v] = scale * second[v];
        }
    }
    if (mirror && decay) {
        vector d[VECTORS];
        if (decay == ONE_DECAY) EACH(v, vectors) d[v] = v_broadcast(run->factor[chunk->start]);
        else lane_load(run, run->factors, chunk->start, vectors, d);
        EACH(v, vectors) {
            passed[v] *= d[v];
            EACH(j, TOKENS) {
                value[0][j][v] *= d[v];
                if (second_write) value[1][j][v] *= d[v];
            }
        }
    }
    EACH(v, vectors) {
        if (decay) s->decay[v] = passed[v];
        EACH(j, TOKENS) {
            s->weight[0][j][v] = value[0][j][v];
            if (second_write) s->weight[1][j][v] = value[1][j][v];
        }
    }
}

#define SETTLE_(m, r, w, rule, decay, vectors)                                                 \
    static void settle_##m##r##w##rule##decay##vectors(                                        \
        const Run *run, const Chunk *chunk, const Scores *scores, Sweep *s                     \
    ) {                                                                                        \
        settle_(m, r, w, rule, decay, vectors, run, chunk, scores, s);                         \
    }
#define SETTLES_(m, r, w, rule)                                                                \
    SETTLE_(m, r, w, rule, 0, 1) SETTLE_(m, r, w, rule, 1, 1) SETTLE_(m, r, w, rule, 2, 1)     \
    SETTLE_(m, r, w, rule, 0, 2) SETTLE_(m, r, w, rule, 1, 2) SETTLE_(m, r, w, rule, 2, 2)
SETTLES_(0, 0, 0, 0) SETTLES_(0, 1, 0, 0) SETTLES_(0, 1, 0, 1)
SETTLES_(1, 0, 0, 0) SETTLES_(1, 0, 1, 0) SETTLES_(1, 0, 1, 2)

#define OF_DECAY_(name, decay, vectors)                                                        \
    (decay == ONE_DECAY ? (vectors == 1 ? name##11 : name##12)                                 \
     : decay == COLUMN_DECAY ? (vectors == 1 ? name##21 : name##22)                            \
                             : (vectors == 1 ? name##01 : name##02))

Settle settle_of(const Run *run) {
    if (run->mirror) {
        if (!run->second_write) return OF_DECAY_(settle_1000, run->decay, run->vectors);
        if (run->rule == CARRIES) return OF_DECAY_(settle_1012, run->decay, run->vectors);
        return OF_DECAY_(settle_1010, run->decay, run->vectors);
    }
    if (!run->second_read) return OF_DECAY_(settle_0000, run->decay, run->vectors);
    if (run->rule == CORRECTS) return OF_DECAY_(settle_0101, run->decay, run->vectors);
    return OF_DECAY_(settle_0100, run->decay, run->vectors);
}
