/* The passes: every combination of reads, writes and decays that a run makes, by name. */
#include "sweep.h"

/* `reads`, `writes`: how many kinds of them; `dot`: whether `product` is asked for. */
INLINE void sweep_(
    const int kind, const int reads, const int writes, const int dot, const int vectors, Sweep *s
) {
    vector sum[2][TOKENS][VECTORS], weight[2][TOKENS][VECTORS], product[VECTORS], decay[VECTORS];
    EACH(r, reads) EACH(i, TOKENS) EACH(v, vectors) sum[r][i][v] = s->sum[r][i][v];
    EACH(w, writes) EACH(j, TOKENS) EACH(v, vectors) weight[w][j][v] = s->weight[w][j][v];
    EACH(v, vectors) product[v] = s->product[v], decay[v] = s->decay[v];
    const float *read[2] = {s->read[0].at, s->read[1].at};
    const float *write[2] = {s->write[0].at, s->write[1].at};
    const int64_t read_step[2] = {s->read[0].step, s->read[1].step};
    const int64_t write_step[2] = {s->write[0].step, s->write[1].step};
    const vector *from = s->from, *beside = s->beside;
    vector *to = s->to;
    const float *row_decay = s->row_decay;
    for (int64_t row = 0; row < s->rows; row++) {
        vector x[VECTORS];
        EACH(v, vectors) x[v] = from[row * vectors + v];
        if (kind == ONE_DECAY) EACH(v, vectors) x[v] *= decay[0];
        if (kind == COLUMN_DECAY) EACH(v, vectors) x[v] *= decay[v];
        if (kind == ROW_DECAY) EACH(v, vectors) x[v] *= row_decay[row];
        EACH(w, writes) EACH(j, TOKENS) {
            const float a = write[w][j * write_step[w] + row];
            EACH(v, vectors) x[v] += a * weight[w][j][v];
        }
        EACH(v, vectors) to[row * vectors + v] = x[v];
        EACH(r, reads) EACH(i, TOKENS) {
            const float a = read[r][i * read_step[r] + row];
            EACH(v, vectors) sum[r][i][v] += a * x[v];
        }
        if (dot) EACH(v, vectors) product[v] += x[v] * beside[row * vectors + v];
    }
    EACH(r, reads) EACH(i, TOKENS) EACH(v, vectors) s->sum[r][i][v] = sum[r][i][v];
    if (dot) EACH(v, vectors) s->product[v] = product[v];
}

#define SWEEP_(kind, reads, writes, dot, vectors)                                            \
    static void sweep_##kind##_##reads##_##writes##_##dot##_##vectors(Sweep *s) {            \
        sweep_(kind, reads, writes, dot, vectors, s);                                        \
    }
#define SWEEPS_OF_(kind, vectors)                                                            \
    SWEEP_(kind, 0, 1, 0, vectors) SWEEP_(kind, 0, 2, 0, vectors)                            \
    SWEEP_(kind, 1, 1, 0, vectors) SWEEP_(kind, 2, 1, 0, vectors)                            \
    SWEEP_(kind, 1, 2, 0, vectors) SWEEP_(kind, 1, 1, 1, vectors) SWEEP_(kind, 1, 2, 1, vectors)
SWEEPS_OF_(0, 1) SWEEPS_OF_(1, 1) SWEEPS_OF_(2, 1) SWEEPS_OF_(3, 1)
SWEEPS_OF_(0, 2) SWEEPS_OF_(1, 2) SWEEPS_OF_(2, 2) SWEEPS_OF_(3, 2)

#define PASS_OF_(kind, vectors, reads, writes, dot)                                          \
    (dot ? (writes == 2 ? sweep_##kind##_1_2_1_##vectors : sweep_##kind##_1_1_1_##vectors)   \
     : reads == 0 ? (writes == 2 ? sweep_##kind##_0_2_0_##vectors                            \
                                 : sweep_##kind##_0_1_0_##vectors)                           \
     : reads == 2 ? sweep_##kind##_2_1_0_##vectors                                           \
     : writes == 2 ? sweep_##kind##_1_2_0_##vectors : sweep_##kind##_1_1_0_##vectors)

Pass pass_of(int kind, int reads, int writes, int dot, int vectors) {
    if (vectors == 1) switch (kind) {
        case NO_DECAY: return PASS_OF_(0, 1, reads, writes, dot);
        case ONE_DECAY: return PASS_OF_(1, 1, reads, writes, dot);
        case COLUMN_DECAY: return PASS_OF_(2, 1, reads, writes, dot);
        default: return PASS_OF_(3, 1, reads, writes, dot);
    }
    switch (kind) {
    case NO_DECAY: return PASS_OF_(0, 2, reads, writes, dot);
    case ONE_DECAY: return PASS_OF_(1, 2, reads, writes, dot);
    case COLUMN_DECAY: return PASS_OF_(2, 2, reads, writes, dot);
    default: return PASS_OF_(3, 2, reads, writes, dot);
    }
}
